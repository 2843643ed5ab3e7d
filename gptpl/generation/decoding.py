"""Tokens in, tokens out: prompts of any lengths continued together with a cache, or one by beam search."""

# B rows that continue, C context length, N beams, T time, V vocabulary

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gptpl.errors import InputError
from gptpl.generation.sampling import (
    NO_TOKEN,
    SamplingRules,
    ban_tokens,
    check_token_ids,
    is_greedy,
    next_token,
    row_generators,
)
from gptpl.model import eval_mode
from gptpl.model.inference import padded_rows
from gptpl.model.protocol import (
    Cached,
    body_and_head,
    cached_form,
    context_length,
    device_of,
    module_of,
    vocab_size,
)

GREEDY = SamplingRules()
LONG_ROWS_AT_A_TIME = 8  # whose activations exist together: 0.1 GB per layer of GPT-2 small


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

    Returns (B, T + n) int64, n <= max_new_tokens: the whole prompt and its continuation. A row ends at the
    first `eot_id` it emits (one in the prompt does not count) and is padded with it. One row alone draws the
    numbers of the book's loop from the same seed. Other arguments and errors are those of `Decoding`.
    """
    if prompt.dim() != 2 or not prompt.numel():
        raise InputError(f"prompt must have shape (B, T) with B, T >= 1, got {tuple(prompt.shape)}")
    decoding = Decoding(
        model, prompt.tolist(), rules=rules, max_new_tokens=max_new_tokens, eot_id=eot_id, generator=generator
    )
    while decoding.step():
        pass
    # Only rows that end are shorter than others, and only an eot_id ends them.
    return torch.cat([prompt, padded_rows(decoding.written, eot_id or 0, prompt.device)], dim=1)


@dataclass(frozen=True, kw_only=True)
class TokenDetails:
    """The model's own distribution where a token was chosen: before any sampling rule, at temperature 1.

    The token's log-probability and the distribution's entropy are in nats; `alternatives` are the most likely
    tokens, best first, each with its log-probability.
    """

    log_probability: float
    entropy: float
    alternatives: tuple[tuple[int, float], ...]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One token for each row that continues, with its `details` where they were asked for.

    `rows` are the numbers of those rows, row = prompt * num_samples + sample.
    """

    rows: list[int]
    tokens: list[int]
    details: list[TokenDetails] | None


class Decoding:
    """Continues prompts, `num_samples` times each; every call of `step` gives each row one more token.

    The samples of a prompt share one reading of it. A row draws from a generator of its own (see
    `row_generators`), so its text does not depend on which other prompts are decoded with it, up to rounding:
    a product of several rows may differ from that of one in the last bits.

    Args:
        model: used in evaluation mode and without gradients; its mode and weights stay as they are. For many
            decodings make a `CachedGPT` once and pass that.
        prompts: token ids, at least one each.
        rules: how tokens are chosen.
        max_new_tokens: most tokens that `step` gives each row, 0 or more.
        num_samples: continuations of each prompt, 1 or more.
        eot_id: a row ends with this token, which is its last; None: rows do not end by themselves.
        generator: on the model's device, or one for each row; None: one seeded by torch's global one. Greedy
            rules draw nothing.
        alternatives: number of them in `Step.details`, 0 or more; None: no details.

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
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        alternatives: int | None = None,
    ) -> None:
        V = vocab_size(model)
        check_prompts(prompts, vocab_size=V, max_new_tokens=max_new_tokens)
        if num_samples < 1:
            raise InputError(f"num_samples must be at least 1, got {num_samples}")
        rules.check_vocabulary(V)
        if alternatives is not None and not 0 <= alternatives <= V:
            raise InputError(f"alternatives must be from 0 to {V}, got {alternatives}")
        self._model, self._rules, self._eot_id, self._alternatives = model, rules, eot_id, alternatives
        self._prompts, self._num_samples = prompts, num_samples
        self._left = max_new_tokens
        self._device = device_of(model)
        self.rows = list(range(len(prompts) * num_samples))
        """Numbers of the rows that continue."""
        self.written: list[list[int]] = [[] for _ in self.rows]
        """The new tokens of every row, by its number."""
        self._generators: list[torch.Generator] | None = None
        if not is_greedy(rules):
            self._generators = row_generators(
                generator, prompts=len(prompts), samples=num_samples, device=self._device
            )
        self._next: NextLogits | None = None
        self._places = {row: row // num_samples for row in self.rows}  # of a row among those of `_next`

    def step(self) -> Step | None:
        """The next token of each row that continues; None when none does, or max_new_tokens are written."""
        if not self.rows or not self._left:
            return None
        logits = self._logits()  # (B, V)
        chosen = self._chosen(logits)  # (B,)
        details = None
        if self._alternatives is not None:
            details = token_details(logits.float().log_softmax(dim=-1), chosen, self._alternatives)
        step = Step(rows=list(self.rows), tokens=chosen.tolist(), details=details)
        self._left -= 1
        for row, token in zip(step.rows, step.tokens, strict=True):
            self.written[row].append(token)
        self.end([row for row, token in zip(step.rows, step.tokens, strict=True) if token == self._eot_id])
        return step

    def end(self, rows: Sequence[int]) -> None:
        """Stop continuing these rows, for example where a text is complete."""
        self.rows = [row for row in self.rows if row not in rows]

    def _logits(self) -> Tensor:
        places = [self._places[row] for row in self.rows]
        if self._next is None:
            room = max(map(len, self._prompts)) + self._left
            self._next = NextLogits(self._model, rows=len(self.rows), room=room)
            return self._next.start(self._prompts)[places]
        self._places = {row: place for place, row in enumerate(self.rows)}
        return self._next.advance(places, [self.written[row][-1] for row in self.rows])

    def _chosen(self, logits: Tensor) -> Tensor:
        tokens = written = None
        if self._rules.look_back:
            new = [self.written[row] for row in self.rows]
            read = [[*self._prompts[row // self._num_samples], *self.written[row]] for row in self.rows]
            tokens, written = (padded_rows(each, NO_TOKEN, self._device) for each in (read, new))
        generators = None if self._generators is None else [self._generators[row] for row in self.rows]
        return next_token(logits, self._rules, tokens=tokens, written=written, generators=generators)


class NextLogits:
    """Rows of tokens and, after each change to them, the logits of their next tokens.

    A row of up to `context_length` tokens continues from its cached keys and values, at about the same time
    per token however many there are. A longer one is seen through its last `context_length` tokens; there
    every token has another position than before, nothing cached can be used, and each new token costs a whole
    forward pass over them. So does every token of a model that has no form for decoding.

    There will be at most `rows` rows of at most `room` tokens.
    """

    def __init__(self, model: nn.Module | Cached, *, rows: int, room: int) -> None:
        self._cached = cached_form(model, rows=rows)
        self._model = module_of(model)
        self._device = device_of(model)
        self._context = context_length(self._model)
        self._capacity = min(room, self._context)
        self._cache: Any = None  # of the rows that fit, in their order
        self._rows: list[list[int]] = []

    def start(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Start with a row of each prompt: (B, V)."""
        return self._replace([list(prompt) for prompt in prompts], parents=None)

    def advance(self, parents: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Replace the rows: new row i is row parents[i] followed by tokens[i]; returns (B, V).

        A row may be the parent of several rows, or of none.
        """
        rows = [[*self._rows[parent], token] for parent, token in zip(parents, tokens, strict=True)]
        return self._replace(rows, parents)

    def _fitting(self) -> list[int]:
        """The rows that are in the cache, in its order."""
        if self._cached is None:
            return []
        return [i for i, row in enumerate(self._rows) if len(row) <= self._context]

    def _replace(self, rows: list[list[int]], parents: Sequence[int] | None) -> Tensor:
        """Read new rows, all of them or, where they have parents, their last tokens: (B, V)."""
        places = {row: place for place, row in enumerate(self._fitting())}
        self._rows = rows
        fitting = self._fitting()
        others = sorted(set(range(len(rows))) - set(fitting))
        parts: list[Tensor] = []
        # Autocast would mix its data type with that of the packed weights.
        with torch.inference_mode(), torch.autocast(self._device.type, enabled=False):
            if self._cached is None or not fitting:
                self._cache = None
            elif parents is None:
                self._cache = self._cached.new_cache(rows=len(fitting), capacity=self._capacity)
                parts.append(self._cached.prefill([rows[i] for i in fitting], self._cache))
            else:
                self._cache.select([places[parents[i]] for i in fitting])
                new = torch.tensor([rows[i][-1] for i in fitting], device=self._device)
                parts.append(self._cached.step(new, self._cache))
            if others:
                parts.append(read_whole(self._model, [rows[i][-self._context :] for i in others])[:, 0])
            if len(parts) == 1:
                return parts[0]
            order = torch.tensor([*fitting, *others], device=self._device).argsort()
            return torch.cat(parts)[order]


def read_whole(model: nn.Module, rows: Sequence[list[int]], *, logits: int = 1) -> Tensor:
    """Logits (B, n, V) after the last n = `logits` tokens of each row, by forward passes over whole rows."""
    body, head = body_and_head(model)
    last = []
    back = torch.arange(-logits, 0)  # (n,)
    with eval_mode(model):
        for first in range(0, len(rows), LONG_ROWS_AT_A_TIME):
            read = rows[first : first + LONG_ROWS_AT_A_TIME]
            hidden = body(padded_rows(read, 0, device_of(model)))  # the padding behind is not attended to
            places = torch.tensor([len(row) for row in read])[:, None] + back  # (B, n)
            last.append(hidden[torch.arange(len(read))[:, None], places])
        found: Tensor = head(torch.cat(last))  # of these positions, not of all
    return found


def check_prompts(prompts: Sequence[Sequence[int]], *, vocab_size: int, max_new_tokens: int = 0) -> None:
    """Raise InputError for no prompts, an empty one, an unknown token id, and max_new_tokens below 0."""
    if max_new_tokens < 0:
        raise InputError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    if not prompts or not all(prompts):
        raise InputError("a prompt must have at least one token, such as end-of-text, and there must be one")
    for prompt in prompts:
        check_token_ids("prompt", [min(prompt), max(prompt)], vocab_size=vocab_size)


def token_details(log_p: Tensor, chosen: Tensor, alternatives: int) -> list[TokenDetails]:
    """The details of the tokens `chosen` (B,), by the log-probabilities (B, V) of all."""
    entropies = -(log_p.exp() * log_p).sum(dim=-1)  # (B,)
    best, ids = log_p.topk(alternatives, dim=-1)  # (B, alternatives)
    own = log_p.gather(-1, chosen[:, None]).squeeze(-1)  # (B,)
    rows = zip(own.tolist(), entropies.tolist(), ids.tolist(), best.tolist(), strict=True)
    return [
        TokenDetails(log_probability=p, entropy=entropy, alternatives=tuple(zip(tokens, ps, strict=True)))
        for p, entropy, tokens, ps in rows
    ]


# --- beam search ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Beam:
    """A continuation found by `beam_search`; its last token may be the end of text."""

    tokens: tuple[int, ...]
    log_probability: float

    @property
    def score(self) -> float:
        """Mean log-probability per token, in nats."""
        return self.log_probability / max(1, len(self.tokens))


def beam_search(
    model: nn.Module | Cached,
    prompt: Sequence[int],
    *,
    num_beams: int,
    max_new_tokens: int,
    eot_id: int | None = None,
    banned_tokens: Sequence[int] = (),
) -> list[Beam]:
    """The `num_beams` best continuations of `prompt` (token ids) that the search finds, by score.

    At each step the `num_beams` likeliest unfinished continuations continue. One is finished by `eot_id`, if
    it is among the `num_beams` likeliest at that step, or by `max_new_tokens`. The search ends when
    `num_beams` are finished and the best unfinished one, if finished at once, would not be among them. One
    beam is greedy decoding. Ids in `banned_tokens` are never written.

    Source: Lowerre 1976, "The Harpy Speech Recognition System"; scores: Wu et al. 2016, "Google's Neural
    Machine Translation System"; the end conditions are those of Hugging Face's `generate`.

    Raises InputError for numbers out of range, and as `Decoding` for the prompt.
    """
    V = vocab_size(model)
    check_prompts([prompt], vocab_size=V, max_new_tokens=max_new_tokens)
    if not 1 <= num_beams <= V:
        raise InputError(f"num_beams must be from 1 to {V}, got {num_beams}")
    running, finished = [Beam(tokens=(), log_probability=0.0)], list[Beam]()
    if max_new_tokens == 0:
        return running
    following = NextLogits(model, rows=num_beams, room=len(prompt) + max_new_tokens)
    logits = following.start([prompt])  # (1, V); later (N, V)
    for n in range(1, max_new_tokens + 1):
        log_p = ban_tokens(logits.float().log_softmax(dim=-1), banned_tokens)
        sums = torch.tensor([beam.log_probability for beam in running], device=log_p.device)
        # Each beam has one way to end: of twice as many candidates as beams, enough continue.
        totals, places = (log_p + sums[:, None]).flatten().topk(min(2 * num_beams, log_p.numel()))
        best, parents = [], []
        for rank, (total, place) in enumerate(zip(totals.tolist(), places.tolist(), strict=True)):
            parent, token = divmod(place, V)
            beam = Beam(tokens=(*running[parent].tokens, token), log_probability=total)
            if token != eot_id and n < max_new_tokens:
                best.append(beam)
                parents.append(parent)
            elif rank < num_beams:
                finished.append(beam)
        finished = sorted(finished, key=lambda beam: beam.score, reverse=True)[:num_beams]
        running, parents = best[:num_beams], parents[:num_beams]
        if not running or (len(finished) == num_beams and running[0].score <= finished[-1].score):
            break
        logits = following.advance(parents, [beam.tokens[-1] for beam in running])
    return finished
