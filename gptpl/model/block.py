"""One transformer block."""

# B batch, T time, D model

from torch import Tensor, nn

from gptpl.model.attention import MultiHeadAttention
from gptpl.model.config import GPTConfig
from gptpl.model.feed_forward import FeedForward

LAYER_NORM_EPS = 1e-5


class TransformerBlock(nn.Module):
    """Attention, then feed-forward, each with a LayerNorm before it and a shortcut around both."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.emb_dim, eps=LAYER_NORM_EPS)
        self.attn = MultiHeadAttention(config)
        self.norm2 = nn.LayerNorm(config.emb_dim, eps=LAYER_NORM_EPS)
        self.ff = FeedForward(config)
        self.drop_shortcut = nn.Dropout(config.drop_rate)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D); `mask` as for the attention."""
        x = x + self.drop_shortcut(self.attn(self.norm1(x), mask))
        return x + self.drop_shortcut(self.ff(self.norm2(x)))
