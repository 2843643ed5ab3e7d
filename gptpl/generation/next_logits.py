"""Logits of the next token for rows that grow: from keys and values while they fit, then window by window."""

# B rows, C context length, V vocabulary

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from gptpl.model import CachedGPT, GPTModel, KVCache, eval_mode

WINDOWS_AT_A_TIME = 8  # whose activations exist together: 0.1 GB a layer of GPT-2 small


class NextLogits:
    """Rows of tokens, and after each change of them the logits of their next tokens.

    A row of up to `context_length` tokens goes on from its keys and values. A longer one is seen through its
    last `context_length` tokens; there every token has another learned position than before, nothing kept
    can be used, and each new token costs a whole forward pass of the window.

    Args:
        model: works as in evaluation mode and without gradients; its mode and weights stay as they are. A
            `CachedGPT` is used as it is.
        rows: the most rows there will be.
        room: the most tokens a row will have.
    """

    def __init__(self, model: GPTModel | CachedGPT, *, rows: int, room: int) -> None:
        self._cached = CachedGPT.of(model, rows=rows)
        self._model = self._cached.model
        self._context = self._model.config.context_length
        self._capacity = min(room, self._context)
        self._cache: KVCache | None = None
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
        with torch.inference_mode(), torch.autocast(self._model.device.type, enabled=False):
            yield

    def _start(self, prompts: Sequence[Sequence[int]], copies: int) -> Tensor:
        short = [i for i, prompt in enumerate(prompts) if len(prompt) <= self._context]
        long = [i for i in range(len(prompts)) if i not in short]
        logits: dict[int, Tensor] = {}
        if short:
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
        fits = [len(row) <= self._context for row in self._rows]
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

    def _step(self, places: list[int], tokens: Sequence[int]) -> Tensor:
        assert self._cache is not None
        self._cache.select(places)
        return self._cached.step(torch.tensor(tokens, device=self._model.device), self._cache)

    def _windows(self, rows: list[list[int]]) -> Tensor:
        """Logits (n, V) after the last C tokens of each of n rows that are longer than C."""
        windows = torch.tensor([row[-self._context :] for row in rows], device=self._model.device)  # (n, C)
        with eval_mode(self._model):
            # The head on one position, not on all.
            last = [self._model.hidden(part)[:, -1] for part in torch.split(windows, WINDOWS_AT_A_TIME)]
            return self._model.out_head(torch.cat(last))
