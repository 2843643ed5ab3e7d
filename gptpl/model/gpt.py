"""The GPT-2-style language model."""

# B batch, T time, D model, V vocabulary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gptpl.errors import InputError
from gptpl.model.block import LAYER_NORM_EPS, TransformerBlock
from gptpl.model.config import GPTConfig
from gptpl.model.initialisation import INITIALISATIONS


class GPTModel(nn.Module):
    """Token and position embeddings, dropout, pre-LayerNorm blocks, a final LayerNorm, a head without bias.

    Equals the book's GPTModel and, with qkv_bias and tie_weights, OpenAI's GPT-2 (Radford et al. 2019).

    The layers are built in the order of the data (token table, position table, blocks, head): the order of
    the random draws is part of what `init: torch` promises.

    With `tie_weights`, `out_head.weight` IS `tok_emb.weight`: one parameter, two names in the state dict.

    Where `recompute_blocks` is set, training keeps only each block's input and makes the rest anew in the
    backward pass (Chen et al. 2016): a third more work for the blocks, far less memory, the same numbers.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute_blocks = False
        self.tok_emb = nn.Embedding(config.vocab_size, config.emb_dim)
        self.pos_emb = nn.Embedding(config.context_length, config.emb_dim)
        self.drop_emb = nn.Dropout(config.drop_rate)
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layers))
        self.final_norm = nn.LayerNorm(config.emb_dim, eps=LAYER_NORM_EPS)
        # A tied head owns no numbers: the meta device spares drawing a matrix only to drop it.
        head_device = "meta" if config.tie_weights else None
        self.out_head = nn.Linear(config.emb_dim, config.vocab_size, bias=False, device=head_device)
        if config.tie_weights:
            self.out_head.weight = self.tok_emb.weight
        INITIALISATIONS[config.init](self, config.n_layers)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.tok_emb.weight.device

    def hidden(self, tokens: Tensor) -> Tensor:
        """Everything but the head: tokens (B, T) int64 -> normalised hidden states (B, T, D).

        Raises InputError when T exceeds `config.context_length`. torch refuses unknown token ids.
        """
        T = tokens.shape[1]
        if self.config.context_length < T:
            raise InputError(
                f"a sequence of {T} tokens is longer than the model's context_length="
                f"{self.config.context_length}: shorten it, or build a model with a longer context"
            )
        positions = torch.arange(T, device=tokens.device)  # (T,)
        x = self.drop_emb(self.tok_emb(tokens) + self.pos_emb(positions))  # (B, T, D)
        for block in self.blocks:
            recompute = self.recompute_blocks and torch.is_grad_enabled()
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return self.final_norm(x)

    def forward(self, tokens: Tensor) -> Tensor:
        """Next-token logits: tokens (B, T) int64 -> (B, T, V). Position t predicts token t + 1 from 0..t."""
        return self.out_head(self.hidden(tokens))
