"""Causal multi-head self-attention."""

# B batch, T time, D model, H heads, K head width (D = H * K)

from torch import Tensor, nn
from torch.nn import functional as F

from gptpl.model.config import GPTConfig


class MultiHeadAttention(nn.Module):
    """Causal self-attention with one fused query-key-value projection and an output projection.

    The rows of `qkv.weight` are query, key, value, each (D, D). Without a bias, torch's own initialisation
    draws for it exactly the numbers that three separate layers would get: the book's numbers stay.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.drop_rate = config.drop_rate
        self.qkv = nn.Linear(config.emb_dim, 3 * config.emb_dim, bias=config.qkv_bias)
        self.out_proj = nn.Linear(config.emb_dim, config.emb_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D); position t sees 0..t. Attention weights are dropped in training only."""
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_heads, D // self.n_heads)  # (B, T, 3, H, K)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # each (B, H, T, K)
        mixed = F.scaled_dot_product_attention(
            q, k, v, dropout_p=self.drop_rate if self.training else 0.0, is_causal=True
        )
        mixed = mixed.transpose(1, 2).reshape(B, T, D)  # (B, H, T, K) -> (B, T, D)
        return self.out_proj(mixed)
