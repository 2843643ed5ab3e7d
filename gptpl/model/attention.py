"""Causal multi-head self-attention."""

# B batch, T time, D model

from torch import Tensor, nn

from gptpl.model.causal_attention import Kernel, causal_attention
from gptpl.model.config import GPTConfig


class MultiHeadAttention(nn.Module):
    """Causal self-attention with one fused query-key-value projection and an output projection.

    The rows of `qkv.weight` are query, key, value, each (D, D). Without a bias, torch's own initialisation
    draws for it exactly the numbers that three separate layers would get: the book's numbers stay.

    `kernel` may be set to another one, see `causal_attention`.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.drop_rate = config.drop_rate
        self.qkv = nn.Linear(config.emb_dim, 3 * config.emb_dim, bias=config.qkv_bias)
        self.out_proj = nn.Linear(config.emb_dim, config.emb_dim)
        self.kernel: Kernel = "auto"

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D); position t sees those of 0..t that `mask` (B, 1, T, T) shows it; None: all.

        Attention weights are dropped in training only.
        """
        qkv = self.qkv(x)  # (B, T, 3 D)
        dropout_p = self.drop_rate if self.training else 0.0
        mixed = causal_attention(qkv, self.n_heads, dropout_p=dropout_p, kernel=self.kernel, mask=mask)
        return self.out_proj(mixed)
