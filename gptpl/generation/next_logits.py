"""Logits of the next token for rows that grow: from keys and values while they fit, then window by window."""

# B rows, C context length, V vocabulary

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gptpl.model import eval_mode
from gptpl.model.protocol import Cached, body_and_head, cached_form, context_length, device_of

WINDOWS_AT_A_TIME = 8  # whose activations exist together: 0.1 GB a layer of GPT-2 small


class NextLogits:
    """Rows of tokens, and after each change of them the logits of their next tokens.

    A row of up to `context_length` tokens goes on from its keys and values. A longer one is seen through its
    last `context_length` tokens; there every token has another learned position than before, nothing kept
    can be used, and each new token costs a whole forward pass of the window. So it does from the first token
    on with a model that has no form for decoding.

    Args:
        model: works as in evaluation mode and without gradients; its mode and weights stay as they are. Its
            form for decoding (see `gptpl.model.protocol`) may be given in its place.
        rows: the most rows there will be.
        room: the most tokens a row will have.
    """

    def __init__(self, model: nn.Module | Cached, *, rows: int, room: int) -> None:
        self._cached = cached_form(model, rows=rows)
        self._model = model if isinstance(model, nn.Module) else model.model
        self._device = device_of(model)
        self._context = context_length(self._model)
        self._capacity = min(room, self._context)
        self._cache: Any = None
        self._rows: list[list[int]] = []
        self._places: list[int | None] = []  # of each row in the cache

    def start(self, prompts: Sequence[Sequence[int]], *, copies: int) -> Tensor:
        """Begin with `copies` rows of each prompt (one after another), which is read once: (B, V)."""
        with self._computing():
            return self._start(prompts, copies)

    def advance(self, parents: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Go on with rows made of earlier ones: row i is row parents[i] and tokens[i] behind it: (B, V).

        A row that is nobody's parent is given up; one may be the parent of several.
        """
        with self._computing():
            return self._advance(parents, tokens)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        # Autocast would mix its data type with that of the packed weights.
        with torch.inference_mode(), torch.autocast(self._device.type, enabled=False):
            yield

    def _start(self, prompts: Sequence[Sequence[int]], copies: int) -> Tensor:
        short = [i for i, prompt in enumerate(prompts) if self._fits(prompt)]
        long = [i for i in range(len(prompts)) if i not in short]
        logits: dict[int, Tensor] = {}
        if short and self._cached is not None:
            self._cache = self._cached.new_cache(rows=len(short), capacity=self._capacity)
            read = self._cached.prefill([prompts[i] for i in short], self._cache)
            logits |= zip(short, read, strict=True)
            self._cache.select([place for place in range(len(short)) for _ in range(copies)])
        if long:
            logits |= zip(long, self._windows([list(prompts[i]) for i in long]), strict=True)
        origins = [i for i in range(len(prompts)) for _ in range(copies)]
        self._rows = [list(prompts[i]) for i in origins]
        places = itertools.count()
        self._places = [next(places) if i in short else None for i in origins]
        return torch.stack([logits[i] for i in origins])

    def _advance(self, parents: Sequence[int], tokens: Sequence[int]) -> Tensor:
        self._rows = [[*self._rows[parent], token] for parent, token in zip(parents, tokens, strict=True)]
        fits = [self._fits(row) for row in self._rows]
        places = [self._places[parent] for parent in parents]
        kept = [place for place, fit in zip(places, fits, strict=True) if fit and place is not None]
        numbers = itertools.count()
        self._places = [next(numbers) if fit else None for fit in fits]
        if all(fits):
            return self._step(kept, tokens)
        windows = self._windows([row for row, fit in zip(self._rows, fits, strict=True) if not fit])
        if not any(fits):
            self._cache = None
            return windows
        stepped = self._step(kept, [token for token, fit in zip(tokens, fits, strict=True) if fit])
        parts = iter(stepped), iter(windows)
        return torch.stack([next(parts[0] if fit else parts[1]) for fit in fits])

    def _fits(self, row: Sequence[int]) -> bool:
        """Whether the row goes on from what is kept of it."""
        return self._cached is not None and len(row) <= self._context

    def _step(self, places: list[int], tokens: Sequence[int]) -> Tensor:
        assert self._cached is not None
        self._cache.select(places)
        return self._cached.step(torch.tensor(tokens, device=self._device), self._cache)

    def _windows(self, rows: list[list[int]]) -> Tensor:
        """Logits (n, V) after the last C tokens of each of n rows, by forward passes over them."""
        seen = [row[-self._context :] for row in rows]
        T = max(map(len, seen))
        # What fills up a shorter row lies behind it: no position looks there.
        filled = torch.tensor([[*row, *[0] * (T - len(row))] for row in seen], device=self._device)  # (n, T)
        ends = torch.tensor([len(row) - 1 for row in seen], device=self._device)
        body, head = body_and_head(self._model)
        parts = (torch.split(each, WINDOWS_AT_A_TIME) for each in (filled, ends))
        last = []
        with eval_mode(self._model):
            for part, end in zip(*parts, strict=True):
                last.append(body(part)[torch.arange(len(part), device=self._device), end])
            # The head on one position, not on all.
            logits: Tensor = head(torch.cat(last))
        return logits
