"""How the next token is chosen: the rules a user can set, in one value, and their order."""

# B batch, T time, V vocabulary

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from gptpl.errors import InputError
from gptpl.generation.penalties import (
    ban_tokens,
    check_finite,
    check_repetition_penalty,
    check_token_ids,
    force_token,
    penalise_frequency,
    penalise_repetition,
)
from gptpl.generation.rules import (
    apply_temperature,
    check_share,
    check_temperature,
    check_top_k,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    keep_typical,
)

log = logging.getLogger(__name__)

_NUMBERS = ("temperature", "top_p", "min_p", "typical_p")
_PENALTIES = ("repetition_penalty", "frequency_penalty", "presence_penalty")


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
        for name in (*_NUMBERS, *_PENALTIES):
            value = getattr(self, name)
            optional = name in _NUMBERS[1:]
            if not (_is_number(value) or (value is None and optional)):
                raise InputError(f"{name}={value!r} is no number: give one" + ", or null" * optional)
        check_temperature(self.temperature)
        if self.top_k is not None and (not _is_whole(self.top_k) or self.top_k < 1):
            raise InputError(f"top_k={self.top_k!r} is no number of tokens: give 1 or more, or null for all")
        for name in ("top_p", "typical_p"):
            if (share := getattr(self, name)) is not None:
                check_share(name, share)
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise InputError(f"min_p={self.min_p} is out of range: give a number from 0 (no limit) to 1")
        check_repetition_penalty(self.repetition_penalty)
        check_finite("frequency_penalty", self.frequency_penalty)
        check_finite("presence_penalty", self.presence_penalty)
        for name in ("banned_tokens", "forced_tokens"):
            object.__setattr__(self, name, _checked_ids(name, getattr(self, name)))

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
            filters = name in (*_NUMBERS, "top_k")
            if name == "temperature" or (filters and not self.temperature):
                continue
            shown = f"{value:g}" if _is_number(value) else " ".join(map(str, value))
            parts.append(f"{name.replace('_', '-' if filters else ' ')} {shown}")
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
            check_top_k(self.top_k, vocab_size=vocab_size)
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


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _checked_ids(name: str, ids: Any) -> tuple[int, ...]:
    if isinstance(ids, str) or not isinstance(ids, Sequence) or not all(map(_is_whole, ids)):
        raise InputError(f"{name}={ids!r}: give a list of token ids, such as [50256]")
    return tuple(ids)
