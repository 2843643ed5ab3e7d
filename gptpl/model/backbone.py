"""What every GPT-2-style model has below its head: from tokens to hidden states."""

# B batch, T time, D model

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gptpl.errors import InputError
from gptpl.model.block import LAYER_NORM_EPS, TransformerBlock
from gptpl.model.config import GPTConfig
from gptpl.model.segments import segment_mask, segment_positions


class GPTBackbone(nn.Module):
    """Token and position embeddings, dropout, pre-LayerNorm blocks and a final LayerNorm.

    The layers are built in the order of the data (token table, position table, blocks): the order of the
    random draws is part of what `init: torch` promises. What makes something of the hidden states is a
    subclass, which adds its head as `out_head`.

    Where `recompute_blocks` is set, training keeps only each block's input and makes the rest anew in the
    backward pass (Chen et al. 2016): a third more work for the blocks, far less memory, the same numbers.
    """

    out_head: nn.Linear

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute_blocks = False
        self.tok_emb = nn.Embedding(config.vocab_size, config.emb_dim)
        self.pos_emb = nn.Embedding(config.context_length, config.emb_dim)
        self.drop_emb = nn.Dropout(config.drop_rate)
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layers))
        self.final_norm = nn.LayerNorm(config.emb_dim, eps=LAYER_NORM_EPS)

    @property
    def context_length(self) -> int:
        """The most tokens that it looks at at once."""
        return self.config.context_length

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.tok_emb.weight.device

    def hidden(self, tokens: Tensor, segments: Tensor | None = None) -> Tensor:
        """Everything but the head: tokens (B, T) int64 -> normalised hidden states (B, T, D).

        `segments` (B, T) int64 says which of the texts packed into a row a token belongs to, 0 is padding:
        each is read as if it stood alone. None: a row is one text.

        Raises InputError when T exceeds `config.context_length`. torch refuses unknown token ids.
        """
        T = tokens.shape[1]
        if self.config.context_length < T:
            raise InputError(
                f"a sequence of {T} tokens is longer than the model's context_length="
                f"{self.config.context_length}: shorten it, or build a model with a longer context"
            )
        if segments is None:
            positions, mask = torch.arange(T, device=tokens.device), None  # (T,)
        else:
            positions, mask = segment_positions(segments), segment_mask(segments)  # (B, T), (B, 1, T, T)
        x = self.drop_emb(self.tok_emb(tokens) + self.pos_emb(positions))  # (B, T, D)
        for block in self.blocks:
            recompute = self.recompute_blocks and torch.is_grad_enabled()
            x = checkpoint(block, x, mask, use_reentrant=False) if recompute else block(x, mask)
        return self.final_norm(x)
