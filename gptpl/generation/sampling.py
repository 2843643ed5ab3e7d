"""The choice of the next token: the rules that a user can set, as one value, and their effect on logits.

Rules are pure functions from logits to logits. They exclude a token by setting its logit to -inf, so they
compose in any order; `reshape_logits` applies them in the usual one, and `next_token` draws.
"""

# B batch, T time, V vocabulary

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from gptpl.errors import InputError
from gptpl.settings import SEED

log = logging.getLogger(__name__)

NO_TOKEN = -1
"""Pads the rows of `tokens` that are shorter than the longest; no rule counts it."""
_USUAL_NUCLEUS = 1024  # tokens
_RANGES: Mapping[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda value: value >= 0, "0 (greedy) or a positive number"),
    "top_k": (lambda value: value >= 1 and isinstance(value, int), "a positive whole number or null"),
    "top_p": (lambda value: 0 < value <= 1, "above 0 and at most 1, or null"),
    "min_p": (lambda value: 0 <= value <= 1, "from 0 to 1, or null"),
    "typical_p": (lambda value: 0 < value <= 1, "above 0 and at most 1, or null"),
    "repetition_penalty": (lambda value: value > 0, "a positive number (1: no penalty)"),
    "frequency_penalty": (lambda value: True, "a finite number (0: no penalty)"),
    "presence_penalty": (lambda value: True, "a finite number (0: no penalty)"),
}


@dataclass(frozen=True, kw_only=True)
class SamplingRules:
    """The rules that shape the distribution of the next token; the default is greedy.

    They act in the order of Hugging Face's `generate`: penalties, bans, the forced token, then, unless
    greedy, temperature, top-k, top-p, min-p, typical.

    Attributes:
        temperature: 0 is greedy, the most likely token; below 1 is careful, above 1 daring.
        top_k: keep the k most likely tokens; None: all.
        top_p: keep the most likely tokens whose probabilities reach this sum; None: all.
        min_p: keep tokens at least this many times as likely as the most likely one; None: all.
        typical_p: keep the tokens of typical surprise whose probabilities reach this sum; None: all.
        repetition_penalty: divides the logits of tokens in the prompt and the text so far; 1: none.
        frequency_penalty: subtracted for every time a token occurs in the text so far, prompt excluded.
        presence_penalty: subtracted once for every token in the text so far, prompt excluded.
        banned_tokens: ids that are never written.
        forced_tokens: ids that the continuation begins with.

    Raises InputError for a value out of its range; `check_vocabulary` checks what depends on the vocabulary.
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
        for name, (is_in_range, wanted) in _RANGES.items():
            value = getattr(self, name)
            if value is None and getattr(SamplingRules, name) is None:
                continue
            finite = _is_number(value) and -math.inf < value < math.inf
            if not (finite and is_in_range(value)):
                raise InputError(f"{name} must be {wanted}, got {value!r}")
        for name in ("banned_tokens", "forced_tokens"):
            ids = getattr(self, name)
            is_list = isinstance(ids, Sequence) and not isinstance(ids, str)
            if not (is_list and all(isinstance(each, int) and not isinstance(each, bool) for each in ids)):
                raise InputError(f"{name} must be a list of token ids, such as [50256], got {ids!r}")
            object.__setattr__(self, name, tuple(ids))

    @classmethod
    def of(cls, value: "SamplingRules | Mapping[str, Any]") -> Self:
        """The rules themselves, or those of a mapping such as `{temperature: 0.8, top_k: 40}`."""
        if isinstance(value, cls):
            return value
        names = [field.name for field in dataclasses.fields(cls)]
        settings = value if isinstance(value, Mapping) else {str(value): None}
        for name in settings:
            if name not in names:
                raise InputError(f"unknown sampling rule {name!r}: choose from {', '.join(names)}")
        return cls(**settings)

    @property
    def name(self) -> str:
        """Such as "greedy" or "temperature 0.8, top-k 40"; rules without effect are left out."""
        parts = [f"temperature {self.temperature:g}"] if self.temperature else ["greedy"]
        for name, value in self.changes.items():
            if name == "temperature" or (name in FILTERS and not self.temperature):
                continue
            shown = f"{value:g}" if _is_number(value) else " ".join(map(str, value))
            parts.append(f"{name.replace('_', '-' if name in FILTERS else ' ')} {shown}")
        return ", ".join(parts)

    @property
    def changes(self) -> dict[str, Any]:
        """The fields that differ from their defaults."""
        fields = ((field, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {field.name: value for field, value in fields if value != field.default}

    @property
    def look_back(self) -> bool:
        """Whether a rule needs the tokens so far."""
        penalties = self.frequency_penalty, self.presence_penalty
        return self.repetition_penalty != 1 or any(penalties) or bool(self.forced_tokens)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise InputError for a top_k above the vocabulary, an unknown token id, a ban of every token."""
        if self.top_k is not None and self.top_k > vocab_size:
            raise InputError(f"top_k must be from 1 to {vocab_size} (the vocabulary), got {self.top_k}")
        check_token_ids("banned_tokens", self.banned_tokens, vocab_size=vocab_size)
        check_token_ids("forced_tokens", self.forced_tokens, vocab_size=vocab_size)
        if len(set(self.banned_tokens)) == vocab_size:
            raise InputError(f"banned_tokens holds all {vocab_size} tokens: leave one that can be written")

    def within(self, vocab_size: int) -> Self:
        """These rules with a top_k above the vocabulary replaced by "all", which is logged."""
        if self.top_k is None or self.top_k <= vocab_size:
            return self
        log.info("top_k=%d exceeds the vocabulary of %d tokens: all are kept", self.top_k, vocab_size)
        return dataclasses.replace(self, top_k=None)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_token_ids(name: str, ids: Sequence[int], *, vocab_size: int) -> None:
    """Raise InputError for an id outside 0..vocab_size-1."""
    for token in ids:
        if not 0 <= token < vocab_size:
            raise InputError(f"{name} must hold token ids from 0 to {vocab_size - 1}, got {token}")


def reshape_logits(
    logits: Tensor, rules: SamplingRules, *, tokens: Tensor | None = None, written: Tensor | None = None
) -> Tensor:
    """Apply every rule: logits (B, V) -> logits in fp32 whose softmax the next token is drawn from.

    `tokens` (B, T) int64 are the prompt and the text so far, `written` (B, n) the text so far alone, both
    padded with NO_TOKEN; None counts as empty. Greedy rules apply no filters.
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
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / rules.temperature
    for name, keep in FILTERS.items():
        if (limit := getattr(rules, name)) is not None:
            logits = keep(logits, limit)
    return logits


def next_token(
    logits: Tensor,
    rules: SamplingRules,
    *,
    tokens: Tensor | None = None,
    written: Tensor | None = None,
    generators: Sequence[torch.Generator] | torch.Generator | None = None,
) -> Tensor:
    """Choose one token per row: logits (B, V) -> (B,) int64; arguments as for `reshape_logits` and `draw`.

    Greedy rules take the argmax, the lowest id among equals, and draw no random number.
    """
    reshaped = reshape_logits(logits, rules, tokens=tokens, written=written)
    return reshaped.argmax(dim=-1) if is_greedy(rules) else draw(reshaped, generators)


def is_greedy(rules: SamplingRules) -> bool:
    """Whether nothing is drawn: temperature 0, or one so small that fp32 cannot divide by it."""
    return rules.temperature < torch.finfo(torch.float32).tiny


# ------------------------------------------------------------------------------------------------------ rules


def penalise_repetition(logits: Tensor, tokens: Tensor, penalty: float) -> Tensor:
    """Divide the logit of every token in `tokens` by `penalty`, or multiply it where it is negative.

    Logits (B, V), tokens (B, T) int64 padded with NO_TOKEN. 1.2 is usual; below 1 rewards repetition.
    Source: Keskar et al. 2019, "CTRL: A Conditional Transformer Language Model for Controllable Generation".
    """
    penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(token_counts(tokens, logits.shape[-1]) > 0, penalised, logits)


def penalise_frequency(logits: Tensor, tokens: Tensor, *, frequency: float, presence: float = 0.0) -> Tensor:
    """Subtract `frequency` times a token's count in `tokens` from its logit, and `presence` if it occurs.

    Logits (B, V), tokens (B, T) int64 padded with NO_TOKEN. Negative numbers reward repetition.
    Source: OpenAI's API reference, frequency_penalty and presence_penalty.
    """
    counts = token_counts(tokens, logits.shape[-1])
    return logits - frequency * counts - presence * (counts > 0).to(logits.dtype)


def ban_tokens(logits: Tensor, banned: Sequence[int]) -> Tensor:
    """Set the logits (..., V) of the banned token ids to -inf."""
    if not banned:
        return logits
    return logits.index_fill(-1, torch.tensor(list(banned), device=logits.device), -math.inf)


def force_token(logits: Tensor, token: int) -> Tensor:
    """Leave one token id: its logit becomes 0, every other of logits (..., V) -inf."""
    forced = torch.full_like(logits, -math.inf)
    forced[..., token] = 0.0
    return forced


def token_counts(tokens: Tensor, vocab_size: int) -> Tensor:
    """Count each token id in each row: (B, T) int64 padded with NO_TOKEN -> (B, V) int64."""
    counts = tokens.new_zeros((len(tokens), vocab_size + 1))  # the last column counts the padding
    places = tokens.masked_fill(tokens == NO_TOKEN, vocab_size)
    return counts.scatter_add_(1, places, torch.ones_like(tokens))[:, :vocab_size]


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest logits (..., V) of each row and set the others to -inf.

    Exactly k survive: where several logits tie for the last place, as bf16 logits often do, the lowest token
    ids win, as in argmax. So k = 1 is greedy.
    Source: Fan, Lewis and Dauphin 2018, "Hierarchical Neural Story Generation".
    """
    return _keep_largest(logits, logits.topk(k, dim=-1).values[..., -1:], count=k)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest most likely tokens whose probabilities reach p together (nucleus sampling).

    The most likely token always stays. Among equals the lowest token ids come first. p = 1 keeps every token.
    Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration".
    """
    if p == 1:
        return logits
    # The nucleus is usually small: finding the largest thousand is ten times faster than sorting all.
    for count in (min(_USUAL_NUCLEUS, logits.shape[-1]), logits.shape[-1]):
        largest = logits.topk(count, dim=-1).values  # (..., count) descending
        probabilities = (largest - logits.logsumexp(dim=-1, keepdim=True)).exp()
        before = probabilities.cumsum(dim=-1) - probabilities  # the sum over the likelier tokens
        within = (before < p).sum(dim=-1, keepdim=True).clamp(min=1)  # (..., 1) size of the nucleus
        if count == logits.shape[-1] or bool((within < count).all()):
            break
    return _keep_largest(logits, largest.gather(-1, within - 1), count=within)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep the tokens at least p times as likely as the most likely one; p = 0 keeps every token.

    Source: Nguyen et al. 2024, "Turning Up the Heat: Min-p Sampling for Creative and Coherent LLM Outputs".
    """
    if p == 0:
        return logits
    best = logits.amax(dim=-1, keepdim=True)  # (..., 1)
    return logits.masked_fill(logits < best + math.log(p), -math.inf)


def keep_typical(logits: Tensor, mass: float) -> Tensor:
    """Keep the tokens whose surprise is closest to the expected one, the fewest that reach `mass` together.

    A token's surprise is -log p, the expected one is the distribution's entropy: a dull and a far-fetched
    token are excluded alike. Among equals the lowest token ids come first. mass = 1 keeps every token.
    Source: Meister et al. 2023, "Locally Typical Sampling".
    """
    if mass == 1:
        return logits
    log_p = torch.log_softmax(logits, dim=-1)
    # A token that another rule excluded has probability 0, and 0 log 0 = 0 in an entropy.
    entropy = -(log_p.exp() * log_p).nan_to_num(nan=0.0).sum(dim=-1, keepdim=True)  # (..., 1)
    order = (-log_p - entropy).abs().argsort(dim=-1, stable=True)  # (..., V)
    probabilities = torch.softmax(logits, dim=-1).gather(-1, order)
    before = probabilities.cumsum(dim=-1) - probabilities  # the sum over the tokens before each one
    out = torch.empty_like(order, dtype=torch.bool).scatter_(-1, order, before >= mass)
    return logits.masked_fill(out.scatter(-1, order[..., :1], False), -math.inf)  # at least one stays


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


FILTERS: Mapping[str, Callable[[Tensor, Any], Tensor]] = {
    "top_k": keep_top_k,
    "top_p": keep_top_p,
    "min_p": keep_min_p,
    "typical_p": keep_typical,
}
"""The rules that exclude unlikely tokens, in the order in which they act."""

# --------------------------------------------------------------------------------------------- random numbers


def draw(logits: Tensor, generators: Sequence[torch.Generator] | torch.Generator | None = None) -> Tensor:
    """Draw one token per row from softmax(logits), computed in fp32: (B, V) -> (B,) int64.

    `generators` on the logits' device: one for all rows, one per row, or torch's global one (None).
    """
    logits = logits.float()
    # The shift does not change the softmax, and the best logit, now 0, cannot overflow.
    probabilities = torch.softmax(logits - logits.amax(dim=-1, keepdim=True), dim=-1)  # (B, V)
    if generators is None or isinstance(generators, torch.Generator):
        return torch.multinomial(probabilities, num_samples=1, generator=generators).squeeze(-1)
    rows = zip(probabilities, generators, strict=True)
    return torch.cat([torch.multinomial(row, num_samples=1, generator=own) for row, own in rows])


def check_seed(seed: int) -> None:
    """Raise InputError for a seed that not every random number generator takes."""
    SEED.check("seed", seed)


def seeded_generator(seed: int | None, device: torch.device) -> torch.Generator:
    """A generator with this seed, or (None) with one from the system. Raises InputError as `check_seed`."""
    if seed is None:
        return mixed_generator(device)
    check_seed(seed)
    return torch.Generator(device).manual_seed(seed)


def mixed_generator(device: torch.device, *numbers: int) -> torch.Generator:
    """A generator seeded by all of the numbers; without any, by the system."""
    # Mixed into 32 bits because torch's CPU generator ignores the upper half of a seed.
    mixed = np.random.SeedSequence(numbers or None).generate_state(1)
    return torch.Generator(device).manual_seed(int(mixed[0]))


def row_generators(
    generator: torch.Generator | Sequence[torch.Generator] | None,
    *,
    prompts: int,
    samples: int,
    device: torch.device,
) -> list[torch.Generator]:
    """One generator per row, row = prompt * samples + sample; where there are as many already, these.

    The k-th samples of all prompts start in the same state: a prompt's k-th sample does not depend on the
    other prompts. The first row has `generator` itself, the other first samples copies of it; later samples
    are seeded by numbers drawn from a copy. None: a generator seeded by torch's global one.
    """
    if isinstance(generator, Sequence):
        if len(generator) != (wanted := prompts * samples):
            raise InputError(f"generator must be one, or one for each of {wanted} rows, got {len(generator)}")
        return list(generator)
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
    # Not `clone_state`: in some versions of torch it restarts from the seed on Apple's GPUs.
    return torch.Generator(generator.device).set_state(generator.get_state())
