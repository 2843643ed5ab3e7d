"""How the next token is chosen: the rules a user can set, in one value, and what each does to the logits.

Rules are pure functions from logits to logits. They let a token out by setting its logit to -inf, so that
they compose in any order; `reshape_logits` composes them in the usual one, and `next_token` draws.
"""

# B batch, T time, V vocabulary

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from gptpl.errors import InputError

log = logging.getLogger(__name__)

NO_TOKEN = -1
"""Fills the rows of `tokens` that are shorter than the longest; no rule counts it."""
_USUAL_NUCLEUS = 1024  # tokens
_FILTERS = ("temperature", "top_k", "top_p", "min_p", "typical_p")


@dataclass(frozen=True, kw_only=True)
class SamplingRules:
    """Which rules shape the distribution of the next token; the default is greedy.

    They act in this order, which is that of Hugging Face's `generate`: penalties, bans, the forced token,
    then (not where greedy, for they never change the best token) temperature, top-k, top-p, min-p, typical.

    Attributes:
        temperature: 0 is greedy, the most likely token; below 1 careful, above 1 daring.
        top_k: keep the k most likely tokens; None: all.
        top_p: keep the most likely tokens that have this probability together; None: all.
        min_p: keep tokens at least this share as likely as the most likely one; None: all.
        typical_p: keep the tokens of typical surprise that have this probability together; None: all.
        repetition_penalty: divides the logits of tokens in the prompt and the text so far; 1: none.
        frequency_penalty: subtracted for every time that a token is in the text so far, prompt excluded.
        presence_penalty: subtracted once for every token in the text so far, prompt excluded.
        banned_tokens: ids that are never written.
        forced_tokens: ids that the continuation begins with.

    Raises InputError for a value out of its range, naming it. What depends on the vocabulary is checked by
    `check_vocabulary`.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    banned_tokens: tuple[int, ...] = ()
    forced_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        penalties = ("repetition_penalty", "frequency_penalty", "presence_penalty")
        for name in ("temperature", "top_p", "min_p", "typical_p", *penalties):
            value, remedy = getattr(self, name), ", or null" if name.endswith("_p") else ""
            if not (_is_number(value) or (value is None and remedy)):
                raise InputError(f"{name}={value!r} is no number: give one{remedy}")
        _check_temperature(self.temperature)
        if self.top_k is not None and (not _is_whole(self.top_k) or self.top_k < 1):
            raise InputError(f"top_k={self.top_k!r} is no number of tokens: give 1 or more, or null for all")
        _check_share("top_p", self.top_p)
        _check_share("typical_p", self.typical_p)
        _check_min_p(self.min_p)
        _check_penalties(self.repetition_penalty, self.frequency_penalty, self.presence_penalty)
        for name in ("banned_tokens", "forced_tokens"):
            ids = getattr(self, name)
            if isinstance(ids, str) or not isinstance(ids, Sequence) or not all(map(_is_whole, ids)):
                raise InputError(f"{name}={ids!r}: give a list of token ids, such as [50256]")
            object.__setattr__(self, name, tuple(ids))

    @classmethod
    def of(cls, value: "SamplingRules | Mapping[str, Any]") -> Self:
        """Rules from themselves or from a mapping such as `{temperature: 0.8, top_k: 40}`."""
        if isinstance(value, cls):
            return value
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(value, Mapping):
            raise InputError(f"sampling rules {value!r}: give a mapping with keys among {', '.join(names)}")
        for key in value:
            if key not in names:
                raise InputError(f"{key!r} is no sampling rule: the rules are {', '.join(names)}")
        return cls(**value)

    @property
    def name(self) -> str:
        """Such as "greedy" or "temperature 0.8, top-k 40"; rules that change nothing are left out."""
        parts = [f"temperature {self.temperature:g}"] if self.temperature else ["greedy"]
        for name, value in self.changes.items():
            if name == "temperature" or (name in _FILTERS and not self.temperature):
                continue
            shown = f"{value:g}" if _is_number(value) else " ".join(map(str, value))
            parts.append(f"{name.replace('_', '-' if name in _FILTERS else ' ')} {shown}")
        return ", ".join(parts)

    @property
    def changes(self) -> dict[str, Any]:
        """The fields that differ from their defaults."""
        return {
            field.name: value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default
        }

    @property
    def look_back(self) -> bool:
        """Whether a rule looks at the tokens so far."""
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise InputError for a top_k above the vocabulary, an unknown token id, and a ban of all."""
        if self.top_k is not None:
            _check_top_k(self.top_k, vocab_size)
        check_token_ids("banned_tokens", self.banned_tokens, vocab_size=vocab_size)
        check_token_ids("forced_tokens", self.forced_tokens, vocab_size=vocab_size)

    def within(self, vocab_size: int) -> Self:
        """These rules for a small vocabulary: the 40 most likely of 20 tokens are all, which the log says."""
        if self.top_k is None or self.top_k <= vocab_size:
            return self
        log.info("top_k=%d exceeds the vocabulary of %d tokens: all are kept", self.top_k, vocab_size)
        return dataclasses.replace(self, top_k=None)


def reshape_logits(
    logits: Tensor, rules: SamplingRules, *, tokens: Tensor | None = None, written: Tensor | None = None
) -> Tensor:
    """Logits (B, V) after every rule, in fp32; their softmax is what the next token is drawn from.

    `tokens` (B, T) int64 are the prompt and the text so far, `written` (B, n) the text so far alone, both
    with -1 for "no token"; None counts as empty. Where the rules are greedy, the filters are left out.
    """
    logits = logits.float()
    if rules.repetition_penalty != 1 and tokens is not None:
        logits = penalise_repetition(logits, tokens, rules.repetition_penalty)
    if (rules.frequency_penalty or rules.presence_penalty) and written is not None:
        logits = penalise_frequency(
            logits, written, frequency=rules.frequency_penalty, presence=rules.presence_penalty
        )
    logits = ban_tokens(logits, rules.banned_tokens)
    position = 0 if written is None else written.shape[1]
    if position < len(rules.forced_tokens):
        logits = force_token(logits, rules.forced_tokens[position])
    if is_greedy(rules):
        return logits
    # The best logit, now 0, cannot overflow at a tiny temperature.
    logits = apply_temperature(logits - logits.amax(dim=-1, keepdim=True), rules.temperature)
    if rules.top_k is not None:
        logits = keep_top_k(logits, rules.top_k)
    if rules.top_p is not None:
        logits = keep_top_p(logits, rules.top_p)
    if rules.min_p is not None:
        logits = keep_min_p(logits, rules.min_p)
    if rules.typical_p is not None:
        logits = keep_typical(logits, rules.typical_p)
    return logits


def next_token(
    logits: Tensor,
    rules: SamplingRules,
    *,
    tokens: Tensor | None = None,
    written: Tensor | None = None,
    generators: Sequence[torch.Generator] | torch.Generator | None = None,
) -> Tensor:
    """Choose one token a row: logits (B, V) -> (B,) int64; arguments as for `reshape_logits` and `draw`.

    Greedy rules take the argmax, the lowest id among equals, and draw no random number.
    """
    reshaped = reshape_logits(logits, rules, tokens=tokens, written=written)
    return reshaped.argmax(dim=-1) if is_greedy(rules) else draw(reshaped, generators)


def is_greedy(rules: SamplingRules) -> bool:
    """Whether nothing is drawn: temperature 0, or one so small that fp32 cannot divide by it."""
    return rules.temperature < torch.finfo(torch.float32).tiny


# ------------------------------------------------------------------------------------------------------ rules


def penalise_repetition(logits: Tensor, tokens: Tensor, penalty: float) -> Tensor:
    """Make every token that occurs in `tokens` less likely.

    Its logit is divided by `penalty`, or multiplied by it where negative. Logits (B, V), tokens (B, T) int64
    with -1 for "no token". 1 changes nothing, 1.2 is usual; below 1 rewards repetition. Raises InputError
    for one that is not positive and finite.

    Source: Keskar et al. 2019, "CTRL: A Conditional Transformer Language Model for Controllable Generation".
    """
    _check_penalties(repetition=penalty)
    penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(token_counts(tokens, logits.shape[-1]) > 0, penalised, logits)


def penalise_frequency(logits: Tensor, tokens: Tensor, *, frequency: float, presence: float = 0.0) -> Tensor:
    """Subtract from each token's logit `frequency` times its count in `tokens`, and `presence` if it occurs.

    Logits (B, V), tokens (B, T) int64 with -1 for "no token". 0 changes nothing; below 0 rewards repetition.
    Raises InputError for what is not finite.

    Source: OpenAI's API reference, frequency_penalty and presence_penalty.
    """
    _check_penalties(frequency=frequency, presence=presence)
    counts = token_counts(tokens, logits.shape[-1])
    return logits - frequency * counts - presence * (counts > 0).to(logits.dtype)


def ban_tokens(logits: Tensor, banned: Sequence[int]) -> Tensor:
    """Set the logits (..., V) of the token ids in `banned` to -inf, see `check_token_ids`."""
    if not banned:
        return logits
    check_token_ids("banned_tokens", banned, vocab_size=logits.shape[-1])
    return logits.index_fill(-1, torch.tensor(list(banned), device=logits.device), -math.inf)


def force_token(logits: Tensor, token: int) -> Tensor:
    """Leave one token id: its logit becomes 0, every other of logits (..., V) -inf.

    Raises InputError for an id outside 0..V-1.
    """
    check_token_ids("forced_tokens", [token], vocab_size=logits.shape[-1])
    forced = torch.full_like(logits, -math.inf)
    forced[..., token] = 0.0
    return forced


def token_counts(tokens: Tensor, vocab_size: int) -> Tensor:
    """How often each token id occurs in each row: (B, T) int64 with -1 for "no token" -> (B, V) int64."""
    counts = tokens.new_zeros((len(tokens), vocab_size + 1))  # the last column counts what is no token
    places = tokens.masked_fill(tokens == NO_TOKEN, vocab_size)
    return counts.scatter_add_(1, places, torch.ones_like(tokens))[:, :vocab_size]


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Divide logits (..., V) by temperature: below 1 sharpens the distribution, above 1 flattens it.

    Source: Ackley, Hinton and Sejnowski 1985, "A Learning Algorithm for Boltzmann Machines".

    Raises InputError for a temperature that is negative or not finite, and for 0.
    """
    _check_temperature(temperature)
    if temperature == 0:
        raise InputError("temperature=0 cannot divide logits: it means greedy, take their argmax instead")
    return logits / temperature


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest logits (..., V) of each row and set the others to -inf.

    Exactly k survive: where several logits tie for the last place, the lowest token ids win, as in argmax. So
    k = 1 is greedy even among equals, which bf16 logits often are. (A plain threshold would keep them all.)

    Source: Fan, Lewis and Dauphin 2018, "Hierarchical Neural Story Generation".

    Raises InputError unless 1 <= k <= V.
    """
    _check_top_k(k, logits.shape[-1])
    return _keep_largest(logits, logits.topk(k, dim=-1).values[..., -1:], count=k)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest most likely tokens whose probabilities reach p together (nucleus sampling).

    The most likely token always stays. Among equals the lowest token ids come first. p = 1 keeps every token.
    Raises InputError unless 0 < p <= 1.

    Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration".
    """
    _check_share("top_p", p)
    if p == 1:
        return logits
    # The nucleus is small as a rule: the largest thousand are found ten times faster than all are sorted.
    for count in (min(_USUAL_NUCLEUS, logits.shape[-1]), logits.shape[-1]):
        largest = logits.topk(count, dim=-1).values  # (..., count) descending
        probabilities = (largest - logits.logsumexp(dim=-1, keepdim=True)).exp()
        before = probabilities.cumsum(dim=-1) - probabilities  # what the likelier tokens have together
        within = (before < p).sum(dim=-1, keepdim=True).clamp(min=1)  # (..., 1) the nucleus
        if count == logits.shape[-1] or bool((within < count).all()):
            break
    return _keep_largest(logits, largest.gather(-1, within - 1), count=within)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep the tokens at least p times as likely as the most likely one; p = 0 keeps every token.

    Raises InputError unless 0 <= p <= 1.

    Source: Nguyen et al. 2024, "Turning Up the Heat: Min-p Sampling for Creative and Coherent LLM Outputs".
    """
    _check_min_p(p)
    if p == 0:
        return logits
    best = logits.amax(dim=-1, keepdim=True)  # (..., 1)
    return logits.masked_fill(logits < best + math.log(p), -math.inf)


def keep_typical(logits: Tensor, mass: float) -> Tensor:
    """Keep the tokens whose surprise is closest to the expected one, the fewest that reach `mass` together.

    A token's surprise is -log p, the expected one is the distribution's entropy: a dull and a far-fetched
    token are let out alike. Among equals the lowest token ids come first. mass = 1 keeps every token.
    Raises InputError unless 0 < mass <= 1.

    Source: Meister et al. 2023, "Locally Typical Sampling".
    """
    _check_share("typical_p", mass)
    if mass == 1:
        return logits
    log_p = torch.log_softmax(logits, dim=-1)
    # A token that another rule has let out has probability 0, and 0 log 0 = 0 in an entropy.
    entropy = -(log_p.exp() * log_p).nan_to_num(nan=0.0).sum(dim=-1, keepdim=True)  # (..., 1)
    order = (-log_p - entropy).abs().argsort(dim=-1, stable=True)  # (..., V)
    probabilities = torch.softmax(logits, dim=-1).gather(-1, order)
    before = probabilities.cumsum(dim=-1) - probabilities  # what the tokens before each one have together
    out = torch.empty_like(order, dtype=torch.bool).scatter_(-1, order, before >= mass)
    return logits.masked_fill(out.scatter(-1, order[..., :1], False), -math.inf)  # one stays at least


def _keep_largest(logits: Tensor, threshold: Tensor, *, count: int | Tensor) -> Tensor:
    """Keep the `count` largest logits of each row; threshold (..., 1) is the smallest of them.

    Of equals at the threshold the lowest token ids stay.
    """
    keep = logits >= threshold
    if bool((keep.sum(dim=-1, keepdim=True) != count).any()):
        above, tied = logits > threshold, logits == threshold
        places_left = count - above.sum(dim=-1, keepdim=True)  # (..., 1)
        keep = above | (tied & (tied.cumsum(dim=-1) <= places_left))
    return logits.masked_fill(~keep, -math.inf)


# --------------------------------------------------------------------------------------------- random numbers


def draw(logits: Tensor, generators: Sequence[torch.Generator] | torch.Generator | None = None) -> Tensor:
    """One multinomial draw a row from softmax(logits), computed in fp32: (B, V) -> (B,) int64.

    By the one generator for all rows, one generator a row, or torch's global one (None); they must live on
    the logits' device. With a generator of its own a row's draw does not depend on the other rows.

    NaN logits make torch raise.
    """
    logits = logits.float()
    # Softmax does not feel the shift, and the best logit, now 0, cannot overflow.
    probabilities = torch.softmax(logits - logits.amax(dim=-1, keepdim=True), dim=-1)  # (B, V)
    if generators is None or isinstance(generators, torch.Generator):
        return torch.multinomial(probabilities, num_samples=1, generator=generators).squeeze(-1)
    rows = zip(probabilities, generators, strict=True)
    return torch.cat([torch.multinomial(row, num_samples=1, generator=own) for row, own in rows])


def check_seed(seed: int) -> None:
    """Raises InputError for a seed that not every random number generator takes."""
    if not 0 <= seed < 2**32:
        raise InputError(f"seed={seed} is no seed: give a number from 0 to {2**32 - 1}")


def seeded_generator(seed: int | None, device: torch.device) -> torch.Generator:
    """Random numbers of a seed; of None, of one from the system. Raises InputError as `check_seed`."""
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        check_seed(seed)
        generator.manual_seed(seed)
    return generator


def row_generators(
    generator: torch.Generator | None, *, prompts: int, samples: int, device: torch.device
) -> list[torch.Generator]:
    """One generator a row, row = prompt * samples + sample.

    The k-th samples of all prompts start in the same state: alone or in company, a prompt's k-th sample is
    the same. Of the first samples, the first row has `generator` itself, which so moves on, and the others
    have copies of it; the later samples' are seeded by numbers drawn from a copy. None: a generator seeded by
    torch's global one, so that `torch.manual_seed` decides.
    """
    if generator is None:
        generator = torch.Generator(device).manual_seed(int(torch.randint(2**62, ())))
    source = _copy(generator)
    seeds = [int(torch.randint(2**62, (), generator=source, device=device)) for _ in range(samples - 1)]
    rows: list[torch.Generator] = []
    for _ in range(prompts):
        rows.append(_copy(generator))
        rows += [torch.Generator(device).manual_seed(seed) for seed in seeds]
    rows[0] = generator
    return rows


def _copy(generator: torch.Generator) -> torch.Generator:
    """Not `clone_state`: on Apple's GPUs some versions of torch begin at the seed again."""
    return torch.Generator(generator.device).set_state(generator.get_state())


# ----------------------------------------------------------------------------------------------------- checks


def check_token_ids(name: str, ids: Sequence[int], *, vocab_size: int) -> None:
    """Raise InputError for an id outside 0..vocab_size-1, and for a ban of all of them."""
    for token in ids:
        if not 0 <= token < vocab_size:
            raise InputError(
                f"{name} holds {token}, which is no token id: give ids from 0 to {vocab_size - 1}"
            )
    if name == "banned_tokens" and len(set(ids)) == vocab_size:
        raise InputError(f"banned_tokens holds all {vocab_size} tokens: leave one that can be written")


def _check_temperature(temperature: float) -> None:
    if not (math.isfinite(temperature) and temperature >= 0):
        raise InputError(f"temperature={temperature} is out of range: give 0 (greedy) or a positive number")


def _check_top_k(top_k: int, vocab_size: int) -> None:
    if not 1 <= top_k <= vocab_size:
        raise InputError(
            f"top_k={top_k} is out of range: give 1 to {vocab_size} (the vocabulary) or leave it out"
        )


def _check_share(name: str, share: float | None) -> None:
    if share is not None and not 0 < share <= 1:
        raise InputError(f"{name}={share} is out of range: give a number above 0 and at most 1 (1: no limit)")


def _check_min_p(min_p: float | None) -> None:
    if min_p is not None and not 0 <= min_p <= 1:
        raise InputError(f"min_p={min_p} is out of range: give a number from 0 (no limit) to 1")


def _check_penalties(repetition: float = 1, frequency: float = 0, presence: float = 0) -> None:
    if not (math.isfinite(repetition) and repetition > 0):
        raise InputError(
            f"repetition_penalty={repetition} is out of range: give a positive number, 1 for no penalty"
        )
    for name, value in (("frequency_penalty", frequency), ("presence_penalty", presence)):
        if not math.isfinite(value):
            raise InputError(f"{name}={value} is no number to subtract: give a finite one, 0 for no penalty")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
