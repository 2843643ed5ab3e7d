"""Tokens in, tokens out: prompts of any lengths continued together with a cache, a token a row at a time."""

# B rows that go on, C context length, T time, V vocabulary

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gptpl.errors import InputError
from gptpl.generation.sampling import (
    NO_TOKEN,
    SamplingRules,
    check_token_ids,
    is_greedy,
    next_token,
    row_generators,
)
from gptpl.model import eval_mode
from gptpl.model.protocol import Cached, body_and_head, cached_form, context_length, device_of, vocab_size

GREEDY = SamplingRules()
LONG_ROWS_AT_A_TIME = 8  # whose activations exist together: 0.1 GB a layer of GPT-2 small


def generate(
    model: nn.Module | Cached,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    rules: SamplingRules = GREEDY,
    eot_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue each row of `prompt` (B, T) int64, on the model's device, by up to `max_new_tokens` tokens.

    Returns (B, T + n) int64, n <= max_new_tokens: the prompt, whole, and what follows it. A row ends at the
    first `eot_id` it emits (one in the prompt does not count) and is filled with `eot_id` from there;
    decoding stops when every row has ended. One row alone draws the numbers that the book's loop draws from
    the same seed, so it gives the book's text. See `Decoding` for the rest.

    Raises InputError for an empty or unbatched prompt, and as `Decoding`.
    """
    shape = tuple(prompt.shape)
    if len(shape) != 2:
        raise InputError(f"prompt has shape {shape}: give a batch of token ids, (B, T), such as ids[None]")
    if prompt.numel() == 0:
        raise InputError(f"prompt of shape {shape} is empty: give at least one token, such as end-of-text")
    decoding = Decoding(
        model, prompt.tolist(), rules=rules, max_new_tokens=max_new_tokens, eot_id=eot_id, generator=generator
    )
    while decoding.step():
        pass
    # Only rows that end are shorter than others, and only an eot_id ends them.
    written = _filled(decoding.written, eot_id or 0, prompt.device)
    return torch.cat([prompt, written], dim=1)


@dataclass(frozen=True, kw_only=True)
class TokenDetails:
    """What the model itself thought where a token was chosen: before any sampling rule, temperature 1.

    The token's log-probability and the distribution's entropy are in nats; `alternatives` are the most likely
    tokens, best first, each with its log-probability.
    """

    log_probability: float
    entropy: float
    alternatives: tuple[tuple[int, float], ...]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One token for each row that still went on.

    `rows` are the numbers of those rows, row = prompt * num_samples + sample, `tokens` and `details` theirs;
    no details where they were not asked for.
    """

    rows: list[int]
    tokens: list[int]
    details: list[TokenDetails] | None


class Decoding:
    """Continues prompts, `num_samples` times each; every call of `step` gives each row one more token.

    The samples of a prompt share one reading of it. While a row is no longer than the context, the time for a
    token hardly depends on how many there are; beyond, each costs a whole forward pass (see `NextLogits`).

    A row draws from a generator of its own (see `row_generators`), so its text does not depend on which other
    prompts are decoded with it; up to rounding, for a product of several rows may differ from that of one in
    the last bits.

    Args:
        model: works as in evaluation mode, without gradients; its mode and weights stay as they are. For many
            decodings make a `CachedGPT` once and give that.
        prompts: token ids, at least one each.
        rules: how tokens are chosen.
        max_new_tokens: 0 or more; `step` gives each row no more.
        num_samples: continuations of each prompt, 1 or more.
        eot_id: a row ends with this token, which is its last; None: rows do not end by themselves.
        generator: on the model's device; None: one seeded by torch's global one. Greedy rules draw nothing.
        alternatives: how many of them `Step.details` shows, 0 or more; None: no details.

    Raises InputError for no prompts, an empty prompt, an unknown token id, and numbers out of range.
    """

    def __init__(
        self,
        model: nn.Module | Cached,
        prompts: Sequence[Sequence[int]],
        *,
        rules: SamplingRules,
        max_new_tokens: int,
        num_samples: int = 1,
        eot_id: int | None = None,
        generator: torch.Generator | None = None,
        alternatives: int | None = None,
    ) -> None:
        check_counts(max_new_tokens=max_new_tokens, num_samples=num_samples)
        V = vocab_size(model)
        check_prompts(prompts, vocab_size=V)
        rules.check_vocabulary(V)
        if alternatives is not None and not 0 <= alternatives <= V:
            raise InputError(f"alternatives={alternatives} is out of range: give 0 to {V}")
        self._model, self._rules, self._eot_id, self._alternatives = model, rules, eot_id, alternatives
        self._prompts, self._num_samples = prompts, num_samples
        self._left = max_new_tokens
        self._device = device_of(model)
        self.rows = list(range(len(prompts) * num_samples))
        """Numbers of the rows that go on."""
        self.written: list[list[int]] = [[] for _ in self.rows]
        """The new tokens of every row, by its number."""
        self._generators: list[torch.Generator] | None = None
        if not is_greedy(rules):
            self._generators = row_generators(
                generator, prompts=len(prompts), samples=num_samples, device=self._device
            )
        self._next: NextLogits | None = None
        self._last: Step | None = None

    def step(self) -> Step | None:
        """The next token of each row that goes on; None when none does, or max_new_tokens are written."""
        if not self.rows or not self._left:
            return None
        logits = self._logits()  # (B, V)
        chosen = self._chosen(logits)  # (B,)
        details = None if self._alternatives is None else _details(logits, chosen, self._alternatives)
        step = self._last = Step(rows=list(self.rows), tokens=chosen.tolist(), details=details)
        self._left -= 1
        for row, token in zip(step.rows, step.tokens, strict=True):
            self.written[row].append(token)
        self.end([row for row, token in zip(step.rows, step.tokens, strict=True) if token == self._eot_id])
        return step

    def end(self, rows: Sequence[int]) -> None:
        """Let these rows go on no longer, as where a text is complete."""
        self.rows = [row for row in self.rows if row not in rows]

    def _logits(self) -> Tensor:
        if self._next is None or self._last is None:
            room = max(map(len, self._prompts)) + self._left
            self._next = NextLogits(self._model, rows=len(self.rows), room=room)
            logits = self._next.start(self._prompts, copies=self._num_samples)
            return logits if len(self.rows) == len(logits) else logits[self.rows]
        places = {row: place for place, row in enumerate(self._last.rows)}
        parents = [places[row] for row in self.rows]
        return self._next.advance(parents, [self._last.tokens[parent] for parent in parents])

    def _chosen(self, logits: Tensor) -> Tensor:
        tokens = written = None
        if self._rules.look_back:
            read = [[*self._prompts[row // self._num_samples], *self.written[row]] for row in self.rows]
            tokens = _filled(read, NO_TOKEN, self._device)
        if self._rules.look_back or self._rules.forced_tokens:
            written = _filled([self.written[row] for row in self.rows], NO_TOKEN, self._device)
        generators = None if self._generators is None else [self._generators[row] for row in self.rows]
        return next_token(logits, self._rules, tokens=tokens, written=written, generators=generators)


class NextLogits:
    """Rows of tokens, and after each change of them the logits of their next tokens.

    A row of up to `context_length` tokens goes on from its keys and values. A longer one is seen through its
    last `context_length` tokens; there every token has another learned position than before, nothing kept
    can be used, and each new token costs a whole forward pass over them. So it does from the first token on
    with a model that has no form for decoding.

    There will be at most `rows` rows of at most `room` tokens. The model works as in evaluation mode and
    without gradients; its mode and weights stay as they are.
    """

    def __init__(self, model: nn.Module | Cached, *, rows: int, room: int) -> None:
        self._cached = cached_form(model, rows=rows)
        self._model = model if isinstance(model, nn.Module) else model.model
        self._device = device_of(model)
        self._context = context_length(self._model)
        self._capacity = min(room, self._context)
        self._cache: Any = None  # of the rows that fit, in their order
        self._rows: list[list[int]] = []

    def start(self, prompts: Sequence[Sequence[int]], *, copies: int) -> Tensor:
        """Begin with `copies` rows of each prompt (one after another), which is read once: (B, V)."""

        def prefill(cached: Cached, fitting: list[int]) -> Tensor:
            self._cache = cached.new_cache(rows=len(fitting), capacity=self._capacity)
            logits = cached.prefill([prompts[i] for i in fitting], self._cache)
            self._cache.select([place for place in range(len(fitting)) for _ in range(copies)])
            return logits

        self._rows = [list(prompt) for prompt in prompts]
        logits = self._logits(prefill).repeat_interleave(copies, dim=0)
        self._rows = [list(prompt) for prompt in prompts for _ in range(copies)]
        return logits

    def advance(self, parents: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Go on with rows made of earlier ones: row i is row parents[i] and tokens[i] behind it: (B, V).

        A row that is nobody's parent is given up; one may be the parent of several.
        """
        fitted = [i for i, row in enumerate(self._rows) if self._fits(row)]
        places = {row: place for place, row in enumerate(fitted)}

        def step(cached: Cached, fitting: list[int]) -> Tensor:
            self._cache.select([places[parents[i]] for i in fitting])
            return cached.step(torch.tensor([tokens[i] for i in fitting], device=self._device), self._cache)

        self._rows = [[*self._rows[parent], token] for parent, token in zip(parents, tokens, strict=True)]
        return self._logits(step)

    def _fits(self, row: list[int]) -> bool:
        """Whether the row goes on from what is kept of it."""
        return self._cached is not None and len(row) <= self._context

    def _logits(self, read: Callable[[Cached, list[int]], Tensor]) -> Tensor:
        """Of all rows (B, V): `read` gives those of the rows that fit."""
        fitting = [i for i, row in enumerate(self._rows) if self._fits(row)]
        others = [i for i, row in enumerate(self._rows) if not self._fits(row)]
        parts: list[Tensor] = []
        # Autocast would mix its data type with that of the packed weights.
        with torch.inference_mode(), torch.autocast(self._device.type, enabled=False):
            if self._cached is not None and fitting:
                parts.append(read(self._cached, fitting))
            if others:
                parts.append(self._read_whole([self._rows[i] for i in others]))
            if not fitting:
                self._cache = None
            if len(parts) == 1:
                return parts[0]
            order = torch.tensor([*fitting, *others], device=self._device).argsort()
            return torch.cat(parts)[order]

    def _read_whole(self, rows: list[list[int]]) -> Tensor:
        """Logits (n, V) after the last C tokens of each of n rows, by forward passes over them."""
        seen = [row[-self._context :] for row in rows]
        # What fills up a shorter row lies behind it: no position looks there.
        filled = _filled(seen, 0, self._device)  # (n, T)
        ends = torch.tensor([len(row) - 1 for row in seen], device=self._device)
        body, head = body_and_head(self._model)
        parts = (torch.split(each, LONG_ROWS_AT_A_TIME) for each in (filled, ends))
        with eval_mode(self._model):
            last = [
                body(part)[torch.arange(len(part), device=self._device), end]
                for part, end in zip(*parts, strict=True)
            ]
            # The head on one position, not on all.
            logits: Tensor = head(torch.cat(last))
        return logits


def check_counts(*, max_new_tokens: int, num_samples: int) -> None:
    """Raise InputError unless max_new_tokens is at least 0 and num_samples at least 1."""
    if max_new_tokens < 0:
        raise InputError(f"max_new_tokens={max_new_tokens} is negative: give 0 or more")
    if num_samples < 1:
        raise InputError(f"num_samples={num_samples} samples nothing: give 1 or more")


def check_prompts(prompts: Sequence[Sequence[int]], *, vocab_size: int) -> None:
    """Raise InputError for no prompts, an empty one, and a token id that the model does not know."""
    if not prompts:
        raise InputError("there are no prompts: give at least one")
    for prompt in prompts:
        if not prompt:
            raise InputError("a prompt is empty: give at least one token, such as end-of-text")
        check_token_ids("prompt", [min(prompt), max(prompt)], vocab_size=vocab_size)


def _filled(rows: list[list[int]], token: int, device: torch.device) -> Tensor:
    """The rows as one (B, T) int64 tensor, the shorter ones filled up with the token."""
    T = max(map(len, rows))
    filled = [row + [token] * (T - len(row)) for row in rows]
    return torch.tensor(filled, dtype=torch.int64, device=device).view(len(rows), T)


def _details(logits: Tensor, chosen: Tensor, alternatives: int) -> list[TokenDetails]:
    log_p = torch.log_softmax(logits.float(), dim=-1)  # (B, V)
    entropy = -(log_p.exp() * log_p).sum(dim=-1)  # (B,)
    best, ids = log_p.topk(alternatives, dim=-1)  # (B, alternatives)
    own = log_p.gather(-1, chosen[:, None]).squeeze(-1)  # (B,)
    rows = zip(own.tolist(), entropy.tolist(), ids.tolist(), best.tolist(), strict=True)
    return [
        TokenDetails(
            log_probability=own_log_p,
            entropy=row_entropy,
            alternatives=tuple(zip(row_ids, row_best, strict=True)),
        )
        for own_log_p, row_entropy, row_ids, row_best in rows
    ]
