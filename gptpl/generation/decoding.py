"""The decoding loop: prompts of any lengths continued together, one token a row at a time."""

# B rows that go on, V vocabulary

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gptpl.errors import InputError
from gptpl.generation.next_logits import NextLogits
from gptpl.generation.penalties import NO_TOKEN, check_token_ids
from gptpl.generation.randomness import row_generators
from gptpl.generation.sampling import SamplingRules, is_greedy, next_token
from gptpl.model.protocol import Cached, device_of, vocab_size


@dataclass(frozen=True, kw_only=True)
class TokenDetails:
    """What the model itself thought where a token was chosen: before any sampling rule, temperature 1.

    Attributes:
        log_probability: of the chosen token, in nats.
        entropy: of the distribution, in nats.
        alternatives: the most likely tokens, best first, each with its log-probability.
    """

    log_probability: float
    entropy: float
    alternatives: tuple[tuple[int, float], ...]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One token for each row that still went on.

    Attributes:
        rows: numbers of those rows; row = prompt * num_samples + sample.
        tokens: the token of each.
        details: what the model thought at each; None where that was not asked for.
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
            tokens = _padded(read, self._device)
        if self._rules.look_back or self._rules.forced_tokens:
            written = _padded([self.written[row] for row in self.rows], self._device)
        generators = None if self._generators is None else [self._generators[row] for row in self.rows]
        return next_token(logits, self._rules, tokens=tokens, written=written, generators=generators)


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


def _padded(rows: list[list[int]], device: torch.device) -> Tensor:
    """The rows as one (B, T) int64 tensor, the shorter ones filled up with "no token"."""
    T = max(map(len, rows))
    filled = [row + [NO_TOKEN] * (T - len(row)) for row in rows]
    return torch.tensor(filled, dtype=torch.int64, device=device)


def _details(logits: Tensor, chosen: Tensor, alternatives: int) -> list[TokenDetails]:
    log_p = torch.log_softmax(logits.float(), dim=-1)  # (B, V)
    entropy = -(log_p.exp() * log_p).sum(dim=-1)  # (B,)
    best, ids = log_p.topk(alternatives, dim=-1)  # (B, alternatives)
    own = log_p.gather(-1, chosen[:, None]).squeeze(-1)  # (B,)
    return [
        TokenDetails(
            log_probability=log_probability,
            entropy=row_entropy,
            alternatives=tuple(zip(row_ids, row_best, strict=True)),
        )
        for log_probability, row_entropy, row_ids, row_best in zip(
            own.tolist(), entropy.tolist(), ids.tolist(), best.tolist(), strict=True
        )
    ]
