"""Continuous batching: requests join and leave the rows that are decoded together at any token."""

# B rows that are decoded, C context length, n samples, T time, V vocabulary

from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gptpl.errors import InputError
from gptpl.generation.decoding import TokenDetails, check_prompts, read_whole, token_details
from gptpl.generation.sampling import (
    NO_TOKEN,
    SamplingRules,
    check_seed,
    check_token_ids,
    is_greedy,
    next_token,
    row_generators,
    seeded_generator,
)
from gptpl.model.inference import CachedGPT, KVCache, padded_rows
from gptpl.model.protocol import Cached, cached_form, context_length, device_of, module_of, vocab_size

MIN_SHARED = 16  # tokens of a prompt: reading fewer again costs less than copying them
MOST_PADDING = 32  # tokens of a prompt beside a longer one: reading it by itself costs more than so many
MOST_KEPT = 128  # beginnings: every prompt is compared with each


@dataclass(eq=False)
class Request(ABC):
    """A prompt to continue, and what becomes of its tokens: see `ContinuousBatch`.

    Attributes:
        prompt: token ids, at least one.
        rules: how tokens are chosen.
        max_new_tokens: of each continuation; prompt and continuation must fit into the model's context.
        num_samples: continuations of the prompt.
        seed: the same one gives the same texts as `Decoding`; None: another text each time.
        alternatives: number of them in the details of each token; None: no details.
        prompt_details: whether `on_prompt` is given details, those of every token but the first.
        logit_bias: added to the logits of these token ids, before any rule.
        cancelled: set it, in any thread, to end all continuations at the next step.
    """

    prompt: list[int]
    _: KW_ONLY
    rules: SamplingRules
    max_new_tokens: int
    num_samples: int = 1
    seed: int | None = None
    alternatives: int | None = None
    prompt_details: bool = False
    logit_bias: Mapping[int, float] | None = None
    cancelled: bool = field(default=False, init=False)

    def on_prompt(self, *, shared: int, details: list[TokenDetails] | None) -> None:  # noqa: B027
        """The prompt has been read; `shared` of its tokens were known from earlier ones."""

    @abstractmethod
    def on_token(self, sample: int, token: int, details: TokenDetails | None) -> bool:
        """Take the next token of a continuation; returns whether to continue it."""

    @abstractmethod
    def on_error(self, message: str) -> None:
        """All continuations have ended by an error."""


@dataclass(kw_only=True, eq=False)
class _Row:
    """A continuation that is being written."""

    request: Request
    sample: int
    generator: torch.Generator | None
    written: list[int] = field(default_factory=list)


@dataclass(kw_only=True, eq=False)
class _Reading:
    """A prompt that is being read, piece by piece."""

    request: Request
    cache: Any
    read: int  # tokens
    shared: int
    piece: list[int] = field(default_factory=list)  # that is read next
    details: list[TokenDetails] = field(default_factory=list)


class ContinuousBatch:
    """Continues prompts that come and go; each call of `step` gives every row that is written one more token.

    A step reads at most `piece` tokens of prompts, of several in turn, so that a long prompt delays
    neither the rows that are written nor short prompts for long. A request starts when it has
    place for all of its samples, in the order of arrival. Its texts are those that it would get alone, up to
    rounding, whatever is decoded beside it.

    Not for several threads at once, but for `Request.cancelled`.

    Args:
        model: as for `Decoding`. One that is no `GPTModel` has no cache for rows that come and go: each of
            its tokens costs a forward pass over the whole row.
        max_rows: most continuations at a time. Their cache is allocated at once, for whole contexts; on a
            CPU memory is used as rows grow.
        piece: most tokens of prompts that a step reads.
        kept_bytes: of keys and values of earlier prompts and texts, so that one that begins like them, such
            as the next turn of a conversation, need not be read from its start. 0: none.
    """

    def __init__(
        self, model: nn.Module | Cached, *, max_rows: int = 8, piece: int = 64, kept_bytes: int = 0
    ) -> None:
        for name, value in {"max_rows": max_rows, "piece": piece}.items():
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        self.context_length, self.vocab_size = context_length(model), vocab_size(model)
        self.max_rows = max_rows
        self._device, self._piece = device_of(model), piece
        cached = cached_form(model, rows=max_rows)
        self._slots: _CachedSlots | _WholeSlots = (
            _CachedSlots(cached, rows=max_rows, kept_bytes=kept_bytes)
            if isinstance(cached, CachedGPT)
            else _WholeSlots(module_of(model))
        )
        self.waiting: deque[Request] = deque()
        """Requests that have no place yet."""
        self._reading: deque[_Reading] = deque()
        self._rows: list[_Row] = []
        self.load = (0, 0)
        """`rows` and `tokens` after the last step, for other threads."""

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.waiting or self._reading or self._rows)

    @property
    def rows(self) -> int:
        """Continuations that are written, or whose prompt is being read."""
        return len(self._rows) + sum(each.request.num_samples for each in self._reading)

    @property
    def tokens(self) -> int:
        """Tokens of all rows, of `max_rows * context_length`."""
        written = sum(len(row.request.prompt) + len(row.written) for row in self._rows)
        return written + sum(each.read for each in self._reading)

    def add(self, request: Request) -> None:
        """Have a request wait for its place. Raises InputError as `check`."""
        self.check(request)
        self.waiting.append(request)

    def check(self, request: Request) -> None:
        """Raise InputError for what `Decoding` refuses, too many samples, and more than the context holds."""
        V, C = self.vocab_size, self.context_length
        check_prompts([request.prompt], vocab_size=V, max_new_tokens=request.max_new_tokens)
        request.rules.check_vocabulary(V)
        check_token_ids("logit_bias", list(request.logit_bias or ()), vocab_size=V)
        if request.seed is not None:
            check_seed(request.seed)
        if not 1 <= request.num_samples <= self.max_rows:
            raise InputError(f"num_samples must be from 1 to {self.max_rows}, got {request.num_samples}")
        if request.alternatives is not None and not 0 <= request.alternatives <= V:
            raise InputError(f"alternatives must be from 0 to {V}, got {request.alternatives}")
        if (needed := len(request.prompt) + request.max_new_tokens) > C:
            raise InputError(
                f"the model's context holds {C} tokens, the request needs {needed}: {len(request.prompt)} of"
                f" the prompt and {request.max_new_tokens} to be written"
            )

    def requests(self) -> list[Request]:
        """All that have not ended, each once."""
        found = [
            *self.waiting,
            *(each.request for each in self._reading),
            *(row.request for row in self._rows),
        ]
        return list(dict.fromkeys(found))

    def clear(self) -> None:
        """Forget all requests and everything that has been read."""
        self.waiting.clear()
        self._reading.clear()
        self._rows.clear()
        self.load = (0, 0)
        self._slots.clear()

    def step(self) -> None:
        """Read a piece of the prompts and write a token of each row, as far as there are any."""
        self.waiting = deque(each for each in self.waiting if not each.cancelled)
        self._reading = deque(each for each in self._reading if not each.request.cancelled)
        self._end([row for row in self._rows if row.request.cancelled])
        # Autocast would mix its data type with that of the packed weights.
        with torch.inference_mode(), torch.autocast(self._device.type, enabled=False):
            # A request stays where `requests` finds it until the next stage has it, should a step fail.
            while self.waiting and self.rows + self.waiting[0].num_samples <= self.max_rows:
                request = self.waiting[0]
                # Details of a prompt need the logits of all its positions.
                cache, shared = self._slots.begin(request.prompt, shared=not request.prompt_details)
                self._reading.append(_Reading(request=request, cache=cache, read=shared, shared=shared))
                self.waiting.popleft()
            for group in self._next_pieces():
                self._read(group)
            if self._rows:
                self._take(self._rows, self._slots.step([row.written[-1] for row in self._rows]))
        self.load = (self.rows, self.tokens)

    def _next_pieces(self) -> list[list[_Reading]]:
        """The prompts of which this step reads a `piece`, those of similar lengths in a group."""
        left = self._piece
        chosen: list[_Reading] = []
        for reading in self._reading:
            if left <= 0:
                break
            rest = reading.request.prompt[reading.read :]
            reading.piece = rest if reading.cache is None else rest[:left]
            chosen.append(reading)
            left -= len(reading.piece)
        groups: list[list[_Reading]] = []
        for reading in sorted(chosen, key=lambda each: -len(each.piece)):
            if groups and len(groups[-1][0].piece) - len(reading.piece) <= MOST_PADDING:
                groups[-1].append(reading)
            else:
                groups.append([reading])
        return groups

    def _read(self, group: Sequence[_Reading]) -> None:
        """Read these pieces; where one is the last of its prompt the continuations begin."""
        pieces, caches = [each.piece for each in group], [each.cache for each in group]
        wanted = [len(each.piece) if each.request.prompt_details else 1 for each in group]
        for reading, logits in zip(group, self._slots.read(pieces, caches, logits=wanted), strict=True):
            request, end = reading.request, reading.read + len(reading.piece)
            following = request.prompt[reading.read + 1 : end + 1]
            reading.read = end
            if request.prompt_details and following:
                log_p = logits[: len(following)].float().log_softmax(dim=-1)
                targets = torch.tensor(following, device=self._device)
                reading.details += token_details(log_p, targets, request.alternatives or 0)
            if ended := reading.read == len(request.prompt):
                self._begin(reading, logits[-1:])
            self._reading.remove(reading)
            if not ended:
                self._reading.append(reading)

    def _begin(self, reading: _Reading, logits: Tensor) -> None:
        """Begin the continuations of a prompt that has been read: logits (1, V) after its last token."""
        request, n = reading.request, reading.request.num_samples
        if bool(logits.isfinite().all()):
            self._slots.keep(request.prompt, reading.cache)
        request.on_prompt(shared=reading.shared, details=reading.details if request.prompt_details else None)
        if not request.max_new_tokens:
            return
        generators: Sequence[torch.Generator | None] = [None] * n
        if not is_greedy(request.rules):
            seeded = seeded_generator(request.seed, self._device)
            generators = row_generators(seeded, prompts=1, samples=n, device=self._device)
        rows = [_Row(request=request, sample=i, generator=each) for i, each in enumerate(generators)]
        for row in rows:
            self._slots.add(request.prompt, reading.cache)
            self._rows.append(row)
        self._take(rows, logits.expand(n, -1))

    def _take(self, rows: Sequence[_Row], logits: Tensor) -> None:
        """Choose the next token of each of these rows, by its logits (B, V), and hand it over."""
        groups: dict[object, list[int]] = defaultdict(list)
        finite = logits.float().sum(dim=-1).isfinite().tolist()  # the sum is, if all are
        for place, row in enumerate(rows):
            request = row.request
            if finite[place]:
                position = len(row.written) if request.rules.forced_tokens else None
                groups[request.rules, request.alternatives, position].append(place)
        ended: list[_Row] = []
        damaged = [row for row, each in zip(rows, finite, strict=True) if not each]
        _fail(damaged, "the model's logits are not finite: its weights are damaged, or overflow")
        for places in groups.values():
            chosen = [rows[place] for place in places]
            try:
                tokens, details = self._chosen(chosen, logits[places])
            except RuntimeError as error:  # rules so extreme that nothing can be drawn
                _fail(chosen, f"no token can be chosen by {chosen[0].request.rules.name}: {error}")
                continue
            for row, token, each in zip(chosen, tokens, details, strict=True):
                row.written.append(token)
                goes_on = row.request.on_token(row.sample, token, each)
                if not goes_on or len(row.written) == row.request.max_new_tokens:
                    ended.append(row)
        self._end([*ended, *(row for row in rows if row.request.cancelled and row not in ended)])

    def _chosen(
        self, rows: Sequence[_Row], logits: Tensor
    ) -> tuple[list[int], Sequence[TokenDetails | None]]:
        """The tokens of rows with the same rules, and their details: logits (B, V)."""
        rules, alternatives = rows[0].request.rules, rows[0].request.alternatives
        biased = logits
        if any(row.request.logit_bias for row in rows):
            biased = logits.float().clone()
            for place, row in enumerate(rows):
                if bias := row.request.logit_bias:
                    ids = torch.tensor(list(bias), device=self._device)
                    biased[place, ids] += torch.tensor(list(bias.values()), device=self._device)
        tokens = written = None
        if rules.look_back:
            read = [[*row.request.prompt, *row.written] for row in rows]
            new = [row.written for row in rows]
            tokens, written = (padded_rows(each, NO_TOKEN, self._device) for each in (read, new))
        generators = [row.generator for row in rows if row.generator is not None]
        chosen = next_token(biased, rules, tokens=tokens, written=written, generators=generators or None)
        details: Sequence[TokenDetails | None] = [None] * len(rows)
        if alternatives is not None:
            details = token_details(logits.float().log_softmax(dim=-1), chosen, alternatives)
        return chosen.tolist(), details

    def _end(self, rows: Sequence[_Row]) -> None:
        for row in rows:
            place = self._rows.index(row)
            # One that was cancelled may have keys that are not finite.
            tokens = [] if row.request.cancelled else [*row.request.prompt, *row.written]
            self._slots.remove(place, tokens)
            self._rows[place] = self._rows[-1]  # as in the cache
            self._rows.pop()


def _fail(rows: Sequence[_Row], message: str) -> None:
    """End the requests of these rows by an error, each once."""
    for row in rows:
        if not row.request.cancelled:
            row.request.cancelled = True
            row.request.on_error(message)


# --- where rows are kept --------------------------------------------------------------------------------


class _CachedSlots:
    """Rows of a `SlotCache`, and the caches of earlier prompts and texts, the most recently used ones."""

    def __init__(self, cached: CachedGPT, *, rows: int, kept_bytes: int) -> None:
        self._cached, self._kept_bytes = cached, kept_bytes
        self._new_slots = partial(cached.slots, rows=rows, capacity=cached.config.context_length)
        self._kept: list[tuple[NDArray[np.int64], KVCache]] = []  # the last one was used last
        self._all = self._new_slots()

    def clear(self) -> None:
        """Forget everything."""
        self._kept = []
        del self._all  # before another one takes memory
        self._all = self._new_slots()

    def begin(self, prompt: Sequence[int], *, shared: bool) -> tuple[KVCache, int]:
        """A cache to read the prompt into, and how many of its tokens it has, if it may share any."""
        common = [_common(tokens, np.array(prompt)) for tokens, _ in self._kept] if shared else []
        best = max(range(len(common)), key=common.__getitem__, default=0)
        most = min(common[best], len(prompt) - 1) if common else 0  # the last one is read for its logits
        if most < MIN_SHARED:
            return self._cached.new_cache(rows=1, capacity=len(prompt)), 0
        kept = self._kept.pop(best)
        self._kept.append(kept)
        return kept[1].branch(0, length=most, capacity=len(prompt)), most

    def read(
        self, pieces: Sequence[Sequence[int]], caches: Sequence[KVCache], *, logits: Sequence[int]
    ) -> list[Tensor]:
        """Read the next tokens of prompts; returns for each the logits (n, V) after its last n = `logits`."""
        return self._cached.read(pieces, caches, logits=logits)

    def keep(self, tokens: Sequence[int], cache: KVCache) -> None:
        """Remember what has been read, for prompts that begin with it."""
        if not len(tokens) >= MIN_SHARED or cache.nbytes > self._kept_bytes:
            return
        new = np.array(tokens)
        self._kept = [each for each in self._kept if _common(each[0], new) < len(each[0])]
        self._kept = [*self._kept, (new, cache)][-MOST_KEPT:]
        surplus = sum(each.nbytes for _, each in self._kept) - self._kept_bytes
        while surplus > 0:
            surplus -= self._kept.pop(0)[1].nbytes

    def add(self, prompt: Sequence[int], cache: KVCache) -> None:
        """Add a row behind the others, of a prompt that has been read."""
        self._all.add(cache)

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append a token to each row; returns the logits (B, V) after it."""
        return self._cached.step(torch.tensor(tokens, device=self._cached.model.device), self._all)

    def remove(self, row: int, tokens: Sequence[int]) -> None:
        """Remove a row, and remember it by its tokens, if given; the last row takes its number."""
        length = self._all.lengths[row]  # the last token has not been read
        if self._kept_bytes and tokens and length >= MIN_SHARED:
            self.keep(tokens[:length], self._all.branch(row, length=length, capacity=length))
        self._all.remove(row)


def _common(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    """The number of tokens with which both begin."""
    n = min(len(one), len(other))
    different = np.flatnonzero(one[:n] != other[:n])
    return int(different[0]) if len(different) else n


class _WholeSlots:
    """The same of a model without such a cache: prompts and rows are read as a whole for every token."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.clear()

    def clear(self) -> None:
        self._tokens: list[list[int]] = []

    def begin(self, prompt: Sequence[int], *, shared: bool) -> tuple[None, int]:
        return None, 0

    def read(
        self, pieces: Sequence[Sequence[int]], caches: Sequence[None], *, logits: Sequence[int]
    ) -> list[Tensor]:
        wanted = zip(pieces, logits, strict=True)
        return [read_whole(self._model, [list(piece)], logits=n)[0] for piece, n in wanted]

    def keep(self, tokens: Sequence[int], cache: None) -> None:
        pass

    def add(self, prompt: Sequence[int], cache: None) -> None:
        self._tokens.append(list(prompt))

    def step(self, tokens: Sequence[int]) -> Tensor:
        for row, token in zip(self._tokens, tokens, strict=True):
            row.append(token)
        return read_whole(self._model, self._tokens)[:, 0]

    def remove(self, row: int, tokens: Sequence[int]) -> None:
        self._tokens[row] = self._tokens[-1]
        self._tokens.pop()
