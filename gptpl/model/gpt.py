"""All of GPT-2: configuration, attention, feed-forward network, block, model, initial weights.

It equals the GPTModel of "Build a Large Language Model (From Scratch)", number for number, and, with qkv_bias
and tie_weights, OpenAI's GPT-2 (Radford et al. 2019). Classes, sizes and most layers have the book's names
(`blocks` are its `trf_blocks`, `attn` its `att`, `qkv` its three projections in one). Four of the fields
(`position`, `norm`, `feed_forward`, `linear_bias`) turn it into a Llama-like model (Touvron et al. 2023).
"""

# B batch, T time, D model, H heads, K head width (D = H * K), W inner width of the feed-forward network,
# V vocabulary, S keys and values (T, or more with a cache)

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gptpl.errors import InputError
from gptpl.model.attention_kernels import Kernel, blocked_attention, chosen_kernel
from gptpl.settings import ABOVE_1, DROPOUT, NEXT_STEP, SIZE, check_limits

if TYPE_CHECKING:
    from gptpl.model.inference import CachedGPT

EXPANSION = 4  # inner width of GPT-2's feed-forward network, in model widths
NORM_EPS = 1e-5
_MOST_LAYERS = 10_000
_MOST_BYTES = 2**50  # of float32 weights: more than any memory, and few enough for torch's own counting

Extend = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Stores new keys and values, each (B, H, T, K), and returns all so far, (B, H, S, K): see `KVCache`."""
Observe = Callable[[Tensor], object]
"""Is given the attention weights (B, H, T, S) of "explicit", as they are before dropout."""
Rope = tuple[Tensor, Tensor]
"""Cosines and sines of rotary positions, each (B, T, 1, 1, K / 2) or (T, 1, 1, K / 2): see `rope_angles`."""

# ------------------------------------------------------------------------------------------- configuration


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The shape of a `GPTModel`, validated on construction. From `position` on, the defaults make a GPT-2.

    Attributes:
        vocab_size: number of tokens; ids run from 0 to vocab_size - 1.
        context_length: most tokens the model reads at once (rows of a learned position table).
        emb_dim: width of the residual stream; a multiple of n_heads.
        n_heads: attention heads per block.
        n_layers: transformer blocks.
        drop_rate: dropout probability of the embeddings, the attention weights and each shortcut.
        qkv_bias: whether the query-key-value projection has a bias (the book's: no; OpenAI's GPT-2: yes).
        tie_weights: whether the head shares the token embedding's matrix (the book's: no; GPT-2: yes).
        init: "gpt2" is `draw_gpt2`. "torch" keeps what torch's layers draw, the book's numbers: embeddings
            N(0, 1), other matrices U(-1/sqrt(in), 1/sqrt(in)). Tied, the first loss of the 124M model is then
            in the hundreds, not near ln(vocab_size) = 10.8.
        position: "learned" adds a learned vector per position; "rope" rotates queries and keys, see `rotate`.
        norm: "layernorm" or "rmsnorm", which does not subtract the mean and has no bias.
        feed_forward: "gelu" is `FeedForward`, "swiglu" is `SwiGLU`.
        linear_bias: whether a block's linear layers after that projection have biases (GPT-2; Llama: no).
        hidden_dim: inner width of the feed-forward network; None means 4 * emb_dim, or, with
            SwiGLU's third matrix, 8/3 * emb_dim rounded up to a multiple of 64.
        rope_base: base of the rotation angles of "rope", see `rope_angles`.

    Raises InputError for a value out of its range, and for more weights than any memory holds.
    """

    vocab_size: Annotated[int, SIZE]
    context_length: Annotated[int, SIZE]
    emb_dim: Annotated[int, SIZE]
    n_heads: Annotated[int, SIZE]
    n_layers: Annotated[int, SIZE]
    drop_rate: Annotated[float, NEXT_STEP, DROPOUT] = 0.1
    qkv_bias: bool
    tie_weights: bool = False
    init: Literal["torch", "gpt2"] = "torch"
    position: Literal["learned", "rope"] = "learned"
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    feed_forward: Literal["gelu", "swiglu"] = "gelu"
    linear_bias: bool = True
    hidden_dim: Annotated[int | None, SIZE] = None
    rope_base: Annotated[float, ABOVE_1] = 10_000.0

    def __post_init__(self) -> None:
        check_limits(GPTConfig, **vars(self))
        for field in ("init", "position", "norm", "feed_forward"):
            choice, choices = getattr(self, field), get_args(GPTConfig.__annotations__[field])
            if choice not in choices:
                raise InputError(f"{field}={choice!r} is unknown: choose one of {', '.join(choices)}")
        if self.emb_dim % self.n_heads:
            raise InputError(
                f"emb_dim must be a multiple of n_heads, got emb_dim={self.emb_dim}, n_heads={self.n_heads}"
            )
        if self.position == "rope" and (width := self.emb_dim // self.n_heads) % 2:
            raise InputError(f"position=rope needs an even head width, got emb_dim / n_heads = {width}")
        if self.n_layers > _MOST_LAYERS:
            raise InputError(f"n_layers must be at most {_MOST_LAYERS:,}, got {self.n_layers}")
        if 4 * self.n_parameters > _MOST_BYTES:
            sizes = ("emb_dim", "vocab_size", "context_length", "hidden_dim")
            largest = max(sizes, key=lambda field: getattr(self, field) or 0)
            raise InputError(
                f"{largest}={getattr(self, largest)} makes a model of {self.n_parameters:,} parameters,"
                f" {4 * self.n_parameters:,} bytes in float32, which no memory holds: give smaller sizes"
            )

    @property
    def ff_width(self) -> int:
        """W, the inner width of the feed-forward network."""
        if self.hidden_dim is not None:
            return self.hidden_dim
        if self.feed_forward == "gelu":
            return EXPANSION * self.emb_dim
        return 64 * math.ceil(2 * EXPANSION * self.emb_dim / (3 * 64))

    @property
    def block_matrices(self) -> int:
        """The number of weights in one block's matrices, each of which multiplies every token once."""
        D, W = self.emb_dim, self.ff_width
        return 4 * D * D + (3 if self.feed_forward == "swiglu" else 2) * D * W

    @property
    def n_parameters(self) -> int:
        """Parameters of a `GPTModel` of this shape; a tied head counts once."""
        D, W, V = self.emb_dim, self.ff_width, self.vocab_size
        rows = V + self.context_length * (self.position == "learned") + V * (not self.tie_weights)  # of D
        norm = (2 if self.norm == "layernorm" else 1) * D
        up_width = (2 if self.feed_forward == "swiglu" else 1) * W
        biases = 3 * D * self.qkv_bias + (2 * D + up_width) * self.linear_bias
        return rows * D + self.n_layers * (self.block_matrices + biases + 2 * norm) + norm


# ------------------------------------------------------------------------------------------------- attention


def causal_attention(
    qkv: Tensor,
    n_heads: int,
    *,
    dropout_p: float,
    kernel: Kernel = "auto",
    mask: Tensor | None = None,
    extend: Extend | None = None,
    observe: Observe | None = None,
) -> Tensor:
    """(B, T, 3 D), queries, keys and values side by side -> (B, T, D); position t attends to 0..t.

    `kernel` "explicit" is `explicit_attention`, "blocked" `blocked_attention`, "sdpa" torch's own, which uses
    flash attention where it can, "auto" what `chosen_kernel` says. A bool `mask` (B or 1, 1, T or 1, S),
    query by key, is True where a position attends; it must be causal itself. `extend` puts the cached keys
    and values of earlier tokens before the new ones; without a mask, T must then be 1, or S (an empty cache).
    With `mask` or `extend`, "blocked" is "sdpa".
    """
    B, T, width = qkv.shape
    if kernel == "auto":
        kernel = chosen_kernel(qkv.device.type, qkv.dtype, dropout_p)
    if kernel == "blocked" and mask is None and extend is None:
        seed = torch.randint(2**62, ()) if dropout_p else None  # of the dropout mask, drawn again in backward
        return blocked_attention(qkv, n_heads, dropout_p, seed)
    heads = qkv.view(B, T, 3, n_heads, width // 3 // n_heads)  # (B, T, 3, H, K)
    q, k, v = heads.permute(2, 0, 3, 1, 4).unbind()  # each (B, H, T, K)
    if extend is not None:
        k, v = extend(k, v)  # each (B, H, S, K)
        q = q.to(k.dtype)  # that of the cache
    if kernel == "explicit":
        mixed = explicit_attention(q, k, v, dropout_p=dropout_p, mask=mask, observe=observe)  # (B, H, T, K)
    else:
        is_causal = mask is None and k.shape[2] == T
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=is_causal
        )  # (B, H, T, K)
    return mixed.transpose(1, 2).reshape(B, T, width // 3).to(qkv.dtype)  # (B, T, D)


def explicit_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dropout_p: float = 0.0,
    mask: Tensor | None = None,
    observe: Observe | None = None,
) -> Tensor:
    """Attention written out: queries (B, H, T, K), keys and values (B, H, S, K) -> (B, H, T, K).

    Every step is there to be looked at, and the attention weights take B * H * T * S numbers; `observe` is
    given them. The other kernels compute the same. Without a `mask` the last query attends to all keys, the
    one before it to all but the last, and so on.
    """
    weights = attention_weights(q, k, mask)
    if observe is not None:
        observe(weights)
    weights = F.dropout(weights, dropout_p)
    return weights.to(v.dtype) @ v


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """How much each query takes of each value, as for `explicit_attention`: (B, H, T, S), rows sum to 1."""
    scores = q @ k.transpose(2, 3)  # (B, H, T, S)
    if mask is None:
        T, S = scores.shape[2:]
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    scores = scores.masked_fill(~mask, -math.inf)
    return torch.softmax(scores / k.shape[-1] ** 0.5, dim=-1)


def rope_angles(positions: Tensor, head_width: int, base: float) -> Rope:
    """Cosines and sines of positions p, (B, T) or (T,): pair i of a head is rotated by p / base^(2 i / K)."""
    pairs = torch.arange(0, head_width, 2, device=positions.device).float() / head_width  # (K / 2,)
    angles = positions[..., None, None, None].float() * (1.0 / base**pairs)  # (B, T, 1, 1, K / 2), or no B
    return angles.cos(), angles.sin()


def rotate(qkv: Tensor, rope: Rope, n_heads: int) -> Tensor:
    """Rotate queries and keys by their positions, (B, T, 3 D) -> (B, T, 3 D), and leave the values.

    Their product then depends on the distance of two positions only (Su et al. 2021, "RoFormer"). Dimensions
    i and i + K / 2 of a head are a pair, as in transformers' Llama.
    """
    B, T, width = qkv.shape
    heads = qkv.view(B, T, 3, n_heads, width // 3 // n_heads)  # (B, T, 3, H, K)
    cos, sin = rope
    x, y = heads[:, :, :2].chunk(2, dim=-1)  # each (B, T, 2, H, K / 2)
    rotated = torch.cat([x * cos - y * sin, x * sin + y * cos], dim=-1)  # (B, T, 2, H, K)
    return torch.cat([rotated.to(qkv.dtype), heads[:, :, 2:]], dim=2).view(B, T, width)


class MultiHeadAttention(nn.Module):
    """Causal self-attention with one fused query-key-value projection and an output projection.

    `qkv.weight` is the matrices of queries, keys and values below each other, each (D, D). Without a bias,
    torch's own initialisation draws exactly the numbers for it that three separate layers would get, which
    are the book's.

    Attention weights are dropped in training only. The attribute `kernel` may be set to one of those of
    `causal_attention`; with "explicit", `observe` is called with the weights.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.drop_rate = config.drop_rate
        self.qkv = nn.Linear(config.emb_dim, 3 * config.emb_dim, bias=config.qkv_bias)
        self.out_proj = nn.Linear(config.emb_dim, config.emb_dim, bias=config.linear_bias)
        self.kernel: Kernel = "auto"
        self.observe: Observe | None = None

    def forward(
        self, x: Tensor, mask: Tensor | None = None, extend: Extend | None = None, rope: Rope | None = None
    ) -> Tensor:
        """(B, T, D) -> (B, T, D); `mask` and `extend` as for `causal_attention`."""
        qkv = self.qkv(x)  # (B, T, 3 D)
        if rope is not None:
            qkv = rotate(qkv, rope, self.n_heads)
        dropout_p = self.drop_rate if self.training else 0.0
        mixed = causal_attention(
            qkv,
            self.n_heads,
            dropout_p=dropout_p,
            kernel=self.kernel,
            mask=mask,
            extend=extend,
            observe=self.observe,
        )
        return self.out_proj(mixed)


class Cache(Protocol):
    """Keys and values of earlier tokens in every layer, such as a `KVCache`."""

    def positions(self, T: int) -> Tensor:
        """Positions of each row's next T tokens: (B, T) int64."""

    def mask(self, T: int) -> Tensor | None:
        """The `mask` of `causal_attention` over the keys that `extend` will return; None: it needs none."""

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take keys and values, each (B, H, T, K); returns those they attend to, each (B, H, S, K)."""


# ----------------------------------------------------------------------------------------------------- block


class FeedForward(nn.Module):
    """Two linear layers, D -> W -> D, with a GELU between them (the tanh approximation, as in GPT-2)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.emb_dim, config.ff_width, bias=config.linear_bias)
        self.gelu = nn.GELU(approximate="tanh")
        self.down_proj = nn.Linear(config.ff_width, config.emb_dim, bias=config.linear_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D), each position by itself."""
        return self.down_proj(self.gelu(self.up_proj(x)))


class SwiGLU(nn.Module):
    """Two projections D -> W, one of which gates the other through a SiLU, then W -> D (Shazeer 2020)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.emb_dim, config.ff_width, bias=config.linear_bias)
        self.up_proj = nn.Linear(config.emb_dim, config.ff_width, bias=config.linear_bias)
        self.down_proj = nn.Linear(config.ff_width, config.emb_dim, bias=config.linear_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D), each position by itself."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


NORMS: Mapping[str, type[nn.LayerNorm | nn.RMSNorm]] = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}


class TransformerBlock(nn.Module):
    """Attention, then feed-forward: each after a norm, and added to its input (the book's shortcut)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm1 = NORMS[config.norm](config.emb_dim, eps=NORM_EPS)
        self.attn = MultiHeadAttention(config)
        self.norm2 = NORMS[config.norm](config.emb_dim, eps=NORM_EPS)
        self.ff = FeedForward(config) if config.feed_forward == "gelu" else SwiGLU(config)
        self.drop_shortcut = nn.Dropout(config.drop_rate)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, extend: Extend | None = None, rope: Rope | None = None
    ) -> Tensor:
        """(B, T, D) -> (B, T, D); the other arguments as for `MultiHeadAttention`."""
        x = x + self.drop_shortcut(self.attn(self.norm1(x), mask, extend, rope))
        return x + self.drop_shortcut(self.ff(self.norm2(x)))


# ----------------------------------------------------------------------------------------------------- model


class GPTBackbone(nn.Module):
    """Everything but the head: token and position embeddings, dropout, pre-norm blocks and a final norm.

    The layers are made in the book's order (token table, position table, blocks), so that the same seed draws
    the same weights. A subclass adds its head as `out_head`.

    With `recompute_blocks`, training keeps only each block's input and recomputes the rest in the backward
    pass (activation checkpointing, Chen et al. 2016): a third more work for the blocks, far less memory, the
    same numbers.
    """

    out_head: nn.Linear

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute_blocks = False
        self.tok_emb = nn.Embedding(config.vocab_size, config.emb_dim)
        if config.position == "learned":
            self.pos_emb = nn.Embedding(config.context_length, config.emb_dim)
        self.drop_emb = nn.Dropout(config.drop_rate)
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layers))
        self.final_norm = NORMS[config.norm](config.emb_dim, eps=NORM_EPS)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.tok_emb.weight.device

    def rope(self, positions: Tensor) -> Rope | None:
        """The rotation of queries and keys at positions (B, T) or (T,); None with learned positions."""
        if self.config.position == "learned":
            return None
        return rope_angles(positions, self.config.emb_dim // self.config.n_heads, self.config.rope_base)

    def hidden(self, tokens: Tensor, segments: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Everything but the head: tokens (B, T) int64 -> normalised hidden states (B, T, D).

        `segments` (B, T) int64 gives the number of the text that a token belongs to, where several are packed
        into a row one after the other (0: padding): each is read as if it stood alone. None: a row is one
        text. With a `cache`, which takes no segments, the tokens continue those that it holds, and their keys
        and values are added to it.

        Raises InputError when T exceeds `config.context_length`. torch refuses unknown token ids.
        """
        T = tokens.shape[1]
        if (longest := self.config.context_length) < T:
            raise InputError(f"the model reads context_length={longest} tokens at once, got {T}: give fewer")
        mask: Tensor | None = None
        if segments is not None:
            positions, mask = segment_positions(segments), segment_mask(segments)  # (B, T), (B, 1, T, T)
        elif cache is not None:
            positions, mask = cache.positions(T), cache.mask(T)  # (B, T), (B or 1, 1, T, S) or None
        else:
            positions = torch.arange(T, device=tokens.device)  # (T,)
        x, rope = self.tok_emb(tokens), self.rope(positions)  # (B, T, D)
        if rope is None:
            x = x + self.pos_emb(positions)
        x = self.drop_emb(x)
        for layer, block in enumerate(self.blocks):
            extend = None if cache is None else partial(cache.extend, layer)
            if self.recompute_blocks and torch.is_grad_enabled():
                x = checkpoint(block, x, mask, extend, rope, use_reentrant=False)
            else:
                x = block(x, mask, extend, rope)
        return self.final_norm(x)


class GPTModel(GPTBackbone):
    """The backbone and a head without bias that gives the next token's logits.

    With `tie_weights`, `out_head.weight` IS `tok_emb.weight`: one parameter, two names in the state dict.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        # A tied head draws no numbers, and on the meta device takes no memory until it is replaced.
        head_device = "meta" if config.tie_weights else None
        self.out_head = nn.Linear(config.emb_dim, config.vocab_size, bias=False, device=head_device)
        if config.tie_weights:
            self.out_head.weight = self.tok_emb.weight
        if config.init == "gpt2":
            draw_gpt2(self, config.n_layers)

    def forward(self, tokens: Tensor, segments: Tensor | None = None) -> Tensor:
        """Next-token logits: tokens (B, T) int64 -> (B, T, V). Position t predicts token t + 1 from 0..t.

        `segments` as for `hidden`.
        """
        return self.out_head(self.hidden(tokens, segments))

    def cached(self, *, rows: int) -> "CachedGPT":
        """The form for decoding, which keeps keys and values, made for about `rows` texts at a time."""
        from gptpl.model.inference import CachedGPT

        return CachedGPT(self, rows=rows)


def segment_positions(segments: Tensor) -> Tensor:
    """Each token's position in its own text: segments (B, T) int64, the text's number -> (B, T) int64.

    A text is a run of equal numbers, which no other in its row has; padding, 0, counts as one.
    """
    places = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)  # (B, T)
    first = torch.ones_like(segments, dtype=torch.bool)
    first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return places - places.where(first, 0).cummax(1).values


def segment_mask(segments: Tensor) -> Tensor:
    """Where attention looks: (B, T) -> (B, 1, T, T) bool, query by key, the same for every head.

    A token attends to those of its own text up to itself, and padding to padding: a softmax over masked
    scores alone would be nan.
    """
    T = segments.shape[1]
    earlier = torch.ones(T, T, dtype=torch.bool, device=segments.device).tril()
    same = segments[:, :, None] == segments[:, None, :]  # (B, T, T)
    return (same & earlier)[:, None]


# ------------------------------------------------------------------------------------------- initial weights


def draw_gpt2(model: nn.Module, n_layers: int) -> None:
    """Redraw the weights in place as GPT-2 does: matrices N(0, 0.02^2), biases 0, norm scales 1.

    The first loss is close to ln(vocab_size), tied or not. The last matrix of each residual branch gets
    0.02 / sqrt(2 n_layers): every block adds two branches to the residual stream, whose variance would
    otherwise grow with depth (Radford et al. 2019, 2.3). The position table has 0.02 too, as in transformers;
    OpenAI's code drew it with 0.01.
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
