"""The keys and values that a model has computed, kept so that the next token needs only its own."""

# B rows of the batch, T time, C capacity, H heads, K head width

import torch
from torch import Tensor

from gptpl.model.config import GPTConfig


class KVCache:
    """Room, allocated once, for the keys and values of up to `capacity` tokens a row in every layer.

    Rows may differ in length: each is written at its own end, and `seen` hides what lies beyond.

    Attributes:
        keys: one tensor (B, H, C, K) a layer.
        values: likewise.
        lengths: tokens in each row, B integers on the host.

    Bytes: 2 * n_layers * B * C * emb_dim * (4 in fp32, 2 in bf16); 75 MB a row for GPT-2 small in fp32.
    """

    def __init__(
        self, config: GPTConfig, *, rows: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        H, K = config.n_heads, config.emb_dim // config.n_heads
        # Zeros, not uninitialised memory: a masked weight of 0 times NaN would be NaN.
        shape = (rows, H, capacity, K)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layers)]
        self.lengths = [0] * rows

    def fill(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Write the first T tokens of every row: keys and values (B, H, T, K)."""
        T = keys.shape[2]
        self.keys[layer][:, :, :T] = keys
        self.values[layer][:, :, :T] = values

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write one token at every row's end: keys and values (B, H, K).

        Returns all keys and values (B, H, S, K) up to and with it, S - 1 being the longest row's length. The
        lengths themselves grow by `grow`, once a token, not once a layer.
        """
        at = self.lengths
        if self._even:
            self.keys[layer][:, :, at[0]] = keys
            self.values[layer][:, :, at[0]] = values
        else:
            rows = torch.arange(len(at), device=keys.device)
            ends = torch.tensor(at, device=keys.device)
            self.keys[layer][rows, :, ends] = keys.to(self.keys[layer].dtype)
            self.values[layer][rows, :, ends] = values.to(self.values[layer].dtype)
        S = max(at) + 1
        return self.keys[layer][:, :, :S], self.values[layer][:, :, :S]

    def seen(self) -> Tensor | None:
        """Which of what `append` will return belongs to each row: (B, 1, 1, S); None where all does."""
        if self._even:
            return None
        device = self.keys[0].device
        ends = torch.tensor(self.lengths, device=device)[:, None, None, None]  # (B, 1, 1, 1)
        return torch.arange(max(self.lengths) + 1, device=device) <= ends

    def positions(self) -> Tensor:
        """Position of each row's next token: (B, 1) int64."""
        return torch.tensor(self.lengths, device=self.keys[0].device)[:, None]

    def grow(self) -> None:
        """Count the token that every layer has appended."""
        self.lengths = [length + 1 for length in self.lengths]

    def select(self, rows: list[int]) -> None:
        """Keep these rows, in this order; a row may be named several times, as when beams branch."""
        if rows == list(range(len(self.lengths))):
            return
        index = torch.tensor(rows, dtype=torch.int64, device=self.keys[0].device)
        self.keys = [keys.index_select(0, index) for keys in self.keys]
        self.values = [values.index_select(0, index) for values in self.values]
        self.lengths = [self.lengths[row] for row in rows]

    @property
    def _even(self) -> bool:
        return len(set(self.lengths)) <= 1
