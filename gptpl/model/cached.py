"""A GPT model that goes on from where it was: one new token a row costs one token, not the whole window."""

# B rows of the batch, T time, D model, H heads, K head width, S tokens seen, V vocabulary

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from gptpl.errors import InputError
from gptpl.model.block import TransformerBlock
from gptpl.model.config import GPTConfig
from gptpl.model.gpt import GPTModel
from gptpl.model.kv_cache import KVCache
from gptpl.model.packed_linear import packed


class CachedGPT:
    """Next-token logits of `model` by a `KVCache`, equal to `GPTModel.forward` up to rounding.

    As in evaluation mode nothing is dropped, whatever mode the model is in. The linear layers are packed (see
    `packed`), which takes memory for their weights once more and 0.1 s for GPT-2 small: whoever decodes many
    texts makes one and gives it in the model's place. A new one is needed when the weights have changed. Call
    it without gradients.

    Args:
        model: the model; its weights stay as they are.
        rows: how many rows will usually be decoded at a time, for the packing.
    """

    def __init__(self, model: GPTModel, *, rows: int) -> None:
        self.config: GPTConfig = model.config
        self.model = model
        self._head = packed(model.out_head, rows=rows)
        self._blocks = [
            _Block(block, rows=rows) for block in model.blocks if isinstance(block, TransformerBlock)
        ]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.tok_emb.weight.device

    def new_cache(self, *, rows: int, capacity: int) -> KVCache:
        """An empty cache on the model's device, in its weights' data type; on a CPU always in fp32.

        A CPU's attention of one token over bf16 keys takes eight times as long as over fp32 ones.
        """
        weight = self.model.tok_emb.weight
        dtype = torch.float32 if weight.device.type == "cpu" else weight.dtype
        return KVCache(self.config, rows=rows, capacity=capacity, device=weight.device, dtype=dtype)

    def prefill(self, prompts: Sequence[Sequence[int]], cache: KVCache) -> Tensor:
        """Read the prompts (B of them, of any lengths from 1 to context_length) into the empty cache.

        Returns the logits (B, V) of the token after each prompt.

        Raises InputError for an empty prompt and for one longer than the context.
        """
        lengths = [len(prompt) for prompt in prompts]
        if not min(lengths) or max(lengths) > self.config.context_length:
            raise InputError(
                f"prompts of {min(lengths)} to {max(lengths)} tokens: give 1 to {self.config.context_length}"
                " (the model's context_length)"
            )
        device = self.device
        # What fills up a shorter row lies behind it: causal attention never looks there.
        T = max(lengths)
        filled = [[*prompt, *[0] * (T - len(prompt))] for prompt in prompts]
        tokens = torch.tensor(filled, dtype=torch.int64, device=device)  # (B, T)
        x = self._embedded(tokens, torch.arange(T, device=device))
        for layer, block in enumerate(self._blocks):
            x = block.read(x, layer, cache)
        cache.lengths = lengths
        last = torch.tensor(lengths, device=device) - 1
        return self._logits(x[torch.arange(len(lengths), device=device), last])

    def step(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Append one token to each row, (B,) int64; returns the logits (B, V) of the token after it.

        Every row must have room: at most context_length - 1 tokens, and a place in the cache.
        """
        x = self._embedded(tokens[:, None], cache.positions())  # (B, 1, D)
        seen = cache.seen()
        for layer, block in enumerate(self._blocks):
            x = block.step(x, layer, cache, seen)
        cache.grow()
        return self._logits(x[:, 0])

    def _embedded(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.model.tok_emb(tokens) + self.model.pos_emb(positions)  # (B, T, D)

    def _logits(self, x: Tensor) -> Tensor:
        return self._head(self.model.final_norm(x))  # (B, D) -> (B, V)


class _Block:
    """A transformer block's own layers, the linear ones packed, around attention over the cache."""

    def __init__(self, block: TransformerBlock, *, rows: int) -> None:
        self.n_heads = block.attn.n_heads
        self.norm1, self.norm2, self.gelu = block.norm1, block.norm2, block.ff.gelu
        self.qkv, self.out_proj = packed(block.attn.qkv, rows=rows), packed(block.attn.out_proj, rows=rows)
        self.up_proj, self.down_proj = (
            packed(block.ff.up_proj, rows=rows),
            packed(block.ff.down_proj, rows=rows),
        )

    def read(self, x: Tensor, layer: int, cache: KVCache) -> Tensor:
        """(B, T, D) -> (B, T, D), the first T tokens of every row, which the cache takes up."""
        q, k, v = self._heads(x)  # each (B, H, T, K)
        cache.fill(layer, k, v)
        return self._rest(x, F.scaled_dot_product_attention(q, k, v, is_causal=True))

    def step(self, x: Tensor, layer: int, cache: KVCache, seen: Tensor | None) -> Tensor:
        """(B, 1, D) -> (B, 1, D), one token at every row's end."""
        q, k, v = self._heads(x)  # each (B, H, 1, K)
        keys, values = cache.append(layer, k[:, :, 0], v[:, :, 0])  # (B, H, S, K)
        mixed = F.scaled_dot_product_attention(q.to(keys.dtype), keys, values, attn_mask=seen)
        return self._rest(x, mixed.to(x.dtype))

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, T, D = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, T, 3, self.n_heads, D // self.n_heads)  # (B, T, 3, H, K)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        return q, k, v

    def _rest(self, x: Tensor, mixed: Tensor) -> Tensor:
        """What follows attention; mixed (B, H, T, K)."""
        x = x + self.out_proj(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.down_proj(self.gelu(self.up_proj(self.norm2(x))))
