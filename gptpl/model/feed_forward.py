"""The position-wise feed-forward network of a block."""

# B batch, T time, D model

from torch import Tensor, nn

from gptpl.model.config import GPTConfig

EXPANSION = 4  # GPT-2's inner width is four times the model's


class FeedForward(nn.Module):
    """Two linear layers, D -> 4 D -> D, with a GELU between them (the tanh approximation, as in GPT-2)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.emb_dim, EXPANSION * config.emb_dim)
        self.gelu = nn.GELU(approximate="tanh")
        self.down_proj = nn.Linear(EXPANSION * config.emb_dim, config.emb_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D), each position by itself."""
        return self.down_proj(self.gelu(self.up_proj(x)))
