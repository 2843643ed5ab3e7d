"""Windows for evaluation, where every window counts and padding is masked instead of dropped."""

# B windows in a batch, T tokens in a window, R ranks

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from gptpl.data.token_file import Tokens, as_file_reference, from_file_reference

IGNORED = -100  # the target that torch's cross-entropy leaves out
PADDING = -1  # in place of a window's start: a row without any target

Indices = NDArray[np.int64]


class ScoredWindows(Dataset[tuple[Tensor, Tensor]]):
    """The windows of T = `max_length` tokens that begin at `starts`; what lies outside the text is masked.

    An item is (inputs, targets), int64 tensors (T,), or (B, T) from `__getitems__`. Past the end of `tokens`
    (1-D, not empty), and in the whole row of a start that is PADDING, inputs are 0 and targets IGNORED.
    """

    def __init__(self, tokens: Tokens, starts: Indices, *, max_length: int) -> None:
        self.max_length = max_length
        self._starts = starts
        self._tokens = tokens

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets, each (T,)."""
        inputs, targets = self.__getitems__([index])
        return inputs[0], targets[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of a batch, each (B, T)."""
        starts = self._starts[np.asarray(indices)]  # (B,)
        places = starts[:, None] + np.arange(self.max_length + 1)  # (B, T+1)
        known = (starts[:, None] != PADDING) & (places < len(self._tokens))
        tokens = np.asarray(self._tokens)[np.where(known, places, 0)].astype(np.int64)
        windows = np.where(known, tokens, IGNORED)
        inputs, targets = windows[:, :-1].clip(min=0), windows[:, 1:].copy()  # IGNORED is no token: 0 is
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def __getstate__(self) -> dict[str, Any]:
        """Send a worker the name of a memory-mapped token file, not its hundreds of megabytes."""
        return {**self.__dict__, "_tokens": as_file_reference(self._tokens)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the token file again, in the worker."""
        self.__dict__.update(state, _tokens=from_file_reference(state["_tokens"]))


def evenly_spaced(available: int, wanted: int) -> Indices:
    """Return `wanted` different numbers from 0 to `available` - 1, ascending; all if there are fewer."""
    wanted = min(wanted, available)
    return np.arange(wanted, dtype=np.int64) * available // max(1, wanted)


def rank_share(starts: Indices, *, batch_size: int, rank: int, world_size: int) -> Indices:
    """Return the part of `starts` that one of R = `world_size` ranks evaluates, in batches of `batch_size`.

    The global batches are those of one process with batches of R x `batch_size`, and each is dealt out among
    the ranks. Every rank gets equally many rows in every batch, so that none waits for another: the last,
    short global batch is filled up with PADDING (never with one process).
    """
    full = len(starts) // (batch_size * world_size) * (batch_size * world_size)
    mine = starts[:full].reshape(-1, world_size, batch_size)[:, rank].reshape(-1)
    rest = starts[full:]
    rows = -(-len(rest) // world_size)
    padded = np.full(rows * world_size, PADDING, dtype=np.int64)
    padded[: len(rest)] = rest
    return np.concatenate([mine, padded.reshape(world_size, rows)[rank]])
