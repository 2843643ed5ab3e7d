"""The GPT-2-style language model."""

# B batch, T time, V vocabulary

from typing import TYPE_CHECKING

from torch import Tensor, nn

from gptpl.model.backbone import GPTBackbone
from gptpl.model.config import GPTConfig
from gptpl.model.initialisation import INITIALISATIONS

if TYPE_CHECKING:
    from gptpl.model.cached import CachedGPT


class GPTModel(GPTBackbone):
    """The backbone, and a head without bias that gives the next token's logits.

    Equals the book's GPTModel and, with qkv_bias and tie_weights, OpenAI's GPT-2 (Radford et al. 2019).

    With `tie_weights`, `out_head.weight` IS `tok_emb.weight`: one parameter, two names in the state dict.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        # A tied head owns no numbers: the meta device spares drawing a matrix only to drop it.
        head_device = "meta" if config.tie_weights else None
        self.out_head = nn.Linear(config.emb_dim, config.vocab_size, bias=False, device=head_device)
        if config.tie_weights:
            self.out_head.weight = self.tok_emb.weight
        INITIALISATIONS[config.init](self, config.n_layers)

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.config.vocab_size

    def forward(self, tokens: Tensor, segments: Tensor | None = None) -> Tensor:
        """Next-token logits: tokens (B, T) int64 -> (B, T, V). Position t predicts token t + 1 from 0..t.

        `segments` as for `hidden`.
        """
        return self.out_head(self.hidden(tokens, segments))

    def cached(self, *, rows: int) -> "CachedGPT":
        """The form for decoding about so many rows at a time: it keeps keys and values."""
        from gptpl.model.cached import CachedGPT

        return CachedGPT(self, rows=rows)
