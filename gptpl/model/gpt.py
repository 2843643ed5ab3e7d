"""GPT-2 from top to bottom: configuration, attention, feed-forward network, block, model, first weights.

It equals the GPTModel of "Build a Large Language Model (From Scratch)", number for number, and, with qkv_bias
and tie_weights, OpenAI's GPT-2 (Radford et al. 2019). Fields and layers have the book's names.
"""

# B batch, T time, D model, H heads, K head width (D = H * K), V vocabulary, S positions looked at (T, or more
# with a cache)

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gptpl.errors import InputError
from gptpl.model.attention_kernels import Kernel, blocked_attention, chosen_kernel
from gptpl.resuming import NEXT_STEP

if TYPE_CHECKING:
    from gptpl.model.inference import CachedGPT, KVCache

EXPANSION = 4  # the feed-forward network's inner width, in widths of the model
LAYER_NORM_EPS = 1e-5
_MOST_LAYERS = 10_000
_MOST_BYTES = 2**50  # of the weights in float32: more than any memory, few enough for torch to count them

Extend = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Keeps new keys and values, each (B, H, T, K), and returns all to look at, (B, H, S, K): see `KVCache`."""

# ------------------------------------------------------------------------------------------- configuration


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """What a `GPTModel` is built from; checked when made, so that no model sees an impossible shape.

    Attributes:
        vocab_size: tokens the model knows; ids run from 0 to vocab_size - 1.
        context_length: most tokens the model can look at at once (rows of the position table).
        emb_dim: width of the residual stream; a multiple of n_heads.
        n_heads: attention heads per block.
        n_layers: transformer blocks.
        drop_rate: dropout probability of the embeddings, the attention weights and each shortcut.
        qkv_bias: whether the query-key-value projection has a bias (the book's: no; OpenAI's GPT-2: yes).
        tie_weights: whether the head uses the token embedding's matrix (the book's: no; OpenAI's GPT-2: yes).
        init: how the weights are drawn. "torch" is `keep_torch`, the book's numbers; "gpt2" is `draw_gpt2`,
            GPT-2's, and the one to choose with tied weights.

    Raises InputError for a value out of its range, and for more weights than any memory holds.
    """

    vocab_size: int
    context_length: int
    emb_dim: int
    n_heads: int
    n_layers: int
    drop_rate: Annotated[float, NEXT_STEP] = 0.1
    qkv_bias: bool
    tie_weights: bool = False
    init: str = "torch"

    def __post_init__(self) -> None:
        for field in ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers"):
            size = getattr(self, field)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise InputError(f"{field}={size!r} is not a size: give a whole number of at least 1")
        if self.emb_dim % self.n_heads:
            raise InputError(
                f"emb_dim={self.emb_dim} is not divisible by n_heads={self.n_heads}: "
                f"every head has the same width, so make emb_dim a multiple of n_heads"
            )
        if not 0 <= self.drop_rate < 1:
            raise InputError(f"drop_rate={self.drop_rate} is no dropout probability: give 0 <= drop_rate < 1")
        if self.init not in INITIALISATIONS:
            raise InputError(f"init={self.init!r} is unknown: choose one of {', '.join(INITIALISATIONS)}")
        if self.n_layers > _MOST_LAYERS:
            raise InputError(f"n_layers={self.n_layers} is too many: give {_MOST_LAYERS:,} or fewer")
        if 4 * self.n_parameters > _MOST_BYTES:
            largest = max(("emb_dim", "vocab_size", "context_length"), key=lambda field: getattr(self, field))
            raise InputError(
                f"{largest}={getattr(self, largest)} makes a model of {self.n_parameters:,} parameters,"
                f" {4 * self.n_parameters:,} bytes in float32, which no memory holds: give smaller sizes"
            )

    @property
    def n_parameters(self) -> int:
        """Parameters of a `GPTModel` of this shape; a tied head counts once."""
        D, tables = self.emb_dim, self.vocab_size + self.context_length
        head = 0 if self.tie_weights else self.vocab_size * D
        block = 12 * D * D + (13 if self.qkv_bias else 10) * D
        return tables * D + self.n_layers * block + 2 * D + head


# ------------------------------------------------------------------------------------------------- attention


def causal_attention(
    qkv: Tensor,
    n_heads: int,
    *,
    dropout_p: float,
    kernel: Kernel = "auto",
    mask: Tensor | None = None,
    extend: Extend | None = None,
) -> Tensor:
    """(B, T, 3 D), queries, keys and values side by side -> (B, T, D); position t looks at 0..t.

    `kernel` "blocked" is `blocked_attention`, "sdpa" torch's own, which uses flash attention where it can,
    "auto" what `chosen_kernel` says. A bool `mask` (B, 1, T, S), query by key, says where a position looks,
    never beyond itself; `extend` gives it the keys and values of earlier tokens. Both are for torch's kernel.
    """
    B, T, width = qkv.shape
    if mask is not None or extend is not None:
        kernel = "sdpa"
    elif kernel == "auto":
        kernel = chosen_kernel(qkv.device.type, qkv.dtype, dropout_p)
    if kernel == "blocked":
        seed = torch.randint(2**62, ()) if dropout_p else None
        return blocked_attention(qkv, n_heads, dropout_p, seed)
    heads = qkv.view(B, T, 3, n_heads, width // 3 // n_heads)  # (B, T, 3, H, K)
    q, k, v = heads.permute(2, 0, 3, 1, 4).unbind()  # each (B, H, T, K)
    if extend is not None:
        k, v = extend(k, v)  # each (B, H, S, K)
        q = q.to(k.dtype)
    is_causal = mask is None and k.shape[2] == T
    mixed = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=is_causal
    )  # (B, H, T, K)
    return mixed.transpose(1, 2).reshape(B, T, width // 3).to(qkv.dtype)  # (B, T, D)


class MultiHeadAttention(nn.Module):
    """Causal self-attention with one fused query-key-value projection and an output projection.

    The rows of `qkv.weight` are query, key, value, each (D, D). Without a bias, torch's own initialisation
    draws for it exactly the numbers that three separate layers would get: the book's numbers stay.

    Attention weights are dropped in training only. `kernel` may be set, see `causal_attention`.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.drop_rate = config.drop_rate
        self.qkv = nn.Linear(config.emb_dim, 3 * config.emb_dim, bias=config.qkv_bias)
        self.out_proj = nn.Linear(config.emb_dim, config.emb_dim)
        self.kernel: Kernel = "auto"

    def forward(self, x: Tensor, mask: Tensor | None = None, extend: Extend | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D); `mask` and `extend` as for `causal_attention`."""
        qkv = self.qkv(x)  # (B, T, 3 D)
        dropout_p = self.drop_rate if self.training else 0.0
        mixed = causal_attention(
            qkv, self.n_heads, dropout_p=dropout_p, kernel=self.kernel, mask=mask, extend=extend
        )
        return self.out_proj(mixed)


# ----------------------------------------------------------------------------------------------------- block


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


class TransformerBlock(nn.Module):
    """Attention, then feed-forward, each with a LayerNorm before it and a shortcut around both."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.emb_dim, eps=LAYER_NORM_EPS)
        self.attn = MultiHeadAttention(config)
        self.norm2 = nn.LayerNorm(config.emb_dim, eps=LAYER_NORM_EPS)
        self.ff = FeedForward(config)
        self.drop_shortcut = nn.Dropout(config.drop_rate)

    def forward(self, x: Tensor, mask: Tensor | None = None, extend: Extend | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D); `mask` and `extend` as for `causal_attention`."""
        x = x + self.drop_shortcut(self.attn(self.norm1(x), mask, extend))
        return x + self.drop_shortcut(self.ff(self.norm2(x)))


# ----------------------------------------------------------------------------------------------------- model


class GPTBackbone(nn.Module):
    """All below the head: token and position embeddings, dropout, pre-LayerNorm blocks and a final LayerNorm.

    The layers are built in the order of the data (token table, position table, blocks): the order of the
    random draws is part of what `init: torch` promises. A subclass adds its head as `out_head`.

    Where `recompute_blocks` is set, training keeps only each block's input and recomputes the rest in the
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

    @property
    def n_parameters(self) -> int:
        """By its configuration: a process may hold a part of them, and low-rank matrices are none of them."""
        return self.config.n_parameters

    def hidden(
        self, tokens: Tensor, segments: Tensor | None = None, cache: "KVCache | None" = None
    ) -> Tensor:
        """Everything but the head: tokens (B, T) int64 -> normalised hidden states (B, T, D).

        `segments` (B, T) int64 says which of the texts packed into a row a token belongs to, 0 is padding:
        each is read as if it stood alone. None: a row is one text. With a `cache` the tokens go on from those
        that it holds, and it takes up their keys and values.

        Raises InputError when T exceeds `config.context_length`. torch refuses unknown token ids.
        """
        T = tokens.shape[1]
        if self.config.context_length < T:
            raise InputError(
                f"a sequence of {T} tokens is longer than the model's context_length="
                f"{self.config.context_length}: shorten it, or build a model with a longer context"
            )
        mask: Tensor | None = None
        if segments is not None:
            positions, mask = segment_positions(segments), segment_mask(segments)  # (B, T), (B, 1, T, T)
        elif cache is not None:
            positions, mask = cache.positions(T), cache.mask()  # (B, T), (B, 1, 1, S) or None
        else:
            positions = torch.arange(T, device=tokens.device)  # (T,)
        x = self.drop_emb(self.tok_emb(tokens) + self.pos_emb(positions))  # (B, T, D)
        for layer, block in enumerate(self.blocks):
            if cache is not None:
                x = block(x, mask, partial(cache.extend, layer))
            elif self.recompute_blocks and torch.is_grad_enabled():
                x = checkpoint(block, x, mask, use_reentrant=False)
            else:
                x = block(x, mask)
        return self.final_norm(x)


class GPTModel(GPTBackbone):
    """The backbone, and a head without bias that gives the next token's logits.

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
        from gptpl.model.inference import CachedGPT

        return CachedGPT(self, rows=rows)


def segment_positions(segments: Tensor) -> Tensor:
    """Each token's place in its own text: segments (B, T) int64, the text's number -> (B, T) int64.

    A text is a run of equal numbers. Padding, 0, counts as one.
    """
    places = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)  # (B, T)
    first = torch.ones_like(segments, dtype=torch.bool)
    first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return places - places.where(first, 0).cummax(1).values


def segment_mask(segments: Tensor) -> Tensor:
    """Where attention looks: (B, T) -> (B, 1, T, T) bool, query by key, for every head the same.

    A token sees those of its own text up to itself. Padding sees padding: a row of scores that are all hidden
    would be nan.
    """
    T = segments.shape[1]
    earlier = torch.ones(T, T, dtype=torch.bool, device=segments.device).tril()
    same = segments[:, :, None] == segments[:, None, :]  # (B, T, T)
    return (same & earlier)[:, None]


# --------------------------------------------------------------------------------------------- first weights


def keep_torch(model: nn.Module, n_layers: int) -> None:
    """Leave every weight as torch's layers drew it: embeddings N(0, 1), layers U(-1/sqrt(in), 1/sqrt(in)).

    With tied weights the head takes over the embedding's N(0, 1): the first logits then have a standard
    deviation of about sqrt(emb_dim), and the first loss of the 124M model is in the hundreds, not near
    ln(vocab_size) = 10.8.
    """


def draw_gpt2(model: nn.Module, n_layers: int) -> None:
    """Redraw the weights in place as GPT-2 does: matrices N(0, 0.02), biases 0, LayerNorm scales 1.

    The first loss is close to ln(vocab_size), tied or not. The last matrix of each shortcut gets
    0.02 / sqrt(2 n_layers): every block adds two of them to the residual stream, whose variance would
    otherwise grow with depth (Radford et al. 2019, 2.3).
    """
    for name, parameter in model.named_parameters():  # a tied head comes once, as the token embedding
        if name.endswith(".bias"):
            nn.init.zeros_(parameter)
        elif name.endswith(("attn.out_proj.weight", "ff.down_proj.weight")):
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * n_layers))
        elif parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.02)
        else:
            nn.init.ones_(parameter)


INITIALISATIONS: Mapping[str, Callable[[nn.Module, int], None]] = {"torch": keep_torch, "gpt2": draw_gpt2}


def empty_model(
    config: GPTConfig, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> GPTModel:
    """A `GPTModel` of arbitrary numbers, to be filled: nothing is drawn. Its head is tied as configured."""
    with torch.device("meta"):
        net = GPTModel(config)
    net = net.to(dtype).to_empty(device=device)
    if config.tie_weights:  # `to_empty` makes two tensors of the shared one
        net.out_head.weight = net.tok_emb.weight
    return net
