"""Fixed-length windows over one token array: inputs, and targets shifted by one."""

# B windows in a batch, T tokens in a window

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gptpl.data.token_file import Tokens, as_file_reference, from_file_reference
from gptpl.errors import InputError


class TokenWindows(Dataset[tuple[Tensor, Tensor]]):
    """The windows tokens[s : s+T] for s in range(0, len(tokens) - T, stride), with no copy of the tokens.

    `windows[i]` is (inputs, targets), two int64 tensors (T,), targets one token later. `__getitems__` makes a
    whole batch in one go; torch's DataLoader finds it by its name.

    Args:
        tokens: 1-D token array.
        max_length: T.
        stride: tokens from the start of one window to the start of the next.
        split: what an error message calls these tokens.

    Raises InputError when `max_length` or `stride` is below 1 or no window fits.
    """

    def __init__(self, tokens: Tokens, *, max_length: int, stride: int, split: str = "text") -> None:
        check_window_sizes(max_length=max_length, stride=stride)
        if len(tokens) <= max_length:
            raise InputError(
                f"the {split} split has {len(tokens):,} tokens, too short for one window of "
                f"data.max_length={max_length} ({max_length + 1:,} tokens are needed): "
                "lower data.max_length, give more text, or change data.train_ratio"
            )
        self.max_length = max_length
        self.stride = stride
        self.tokens = tokens
        self._starts = range(0, len(tokens) - max_length, stride)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets, each (T,)."""
        start = self._starts[index]
        window = self.tokens[start : start + self.max_length + 1].astype(np.int64)
        return torch.from_numpy(window[:-1]), torch.from_numpy(window[1:])

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of a batch, each (B, T) and contiguous."""
        starts = np.array([self._starts[index] for index in indices], dtype=np.int64)
        windows = np.asarray(self.tokens)[starts[:, None] + np.arange(self.max_length + 1)]  # (B, T+1)
        inputs, targets = windows[:, :-1].astype(np.int64), windows[:, 1:].astype(np.int64)
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def __getstate__(self) -> dict[str, Any]:
        """Send a worker the name of a memory-mapped token file, not its hundreds of megabytes."""
        return {**self.__dict__, "tokens": as_file_reference(self.tokens)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the token file again, in the worker."""
        self.__dict__.update(state, tokens=from_file_reference(state["tokens"]))


def check_window_sizes(*, max_length: int, stride: int) -> None:
    """Raise InputError unless both are at least 1."""
    for name, value in (("max_length", max_length), ("stride", stride)):
        if value < 1:
            raise InputError(f"data.{name}={value} is not a length in tokens: give 1 or more")


def identity(batch: Any) -> Any:
    """Collate nothing: `__getitems__` made a batch already. A named function, for workers to unpickle."""
    return batch
