"""Causal attention on a CPU by blocks of ordinary matrix products, and when it is faster than torch's.

torch's fused attention is slow there in bf16, where its products run at a third of the speed of oneDNN's, and
is not used with dropout. Here oneDNN multiplies one block of the score matrix at a time, small enough for the
cache; as in FlashAttention (Dao et al. 2022) the backward pass recomputes the scores (measured in
experiments/benchmarks).

Scores and weights have the type of the input, as in attention written out by hand; the softmax of bf16 scores
is computed in fp32.
"""

# B batch, T time, D model, H heads, K head width, N rows x heads taken together, Q queries

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

Kernel = Literal["auto", "blocked", "sdpa", "explicit"]
FAST_KERNELS: tuple[Kernel, ...] = ("blocked", "sdpa")

BLOCK_QUERIES = 256
BLOCK_SCORES = 2**21  # computed at a time, about: 4 MB in bf16
_LEVELS = 2**16  # dropout compares 16-bit numbers, four from each 64-bit number of torch's generator


def chosen_kernel(device_type: str, dtype: torch.dtype, dropout_p: float) -> Literal["blocked", "sdpa"]:
    """The kernel of "auto": "blocked" on a CPU in bf16 and with dropout, else torch's own.

    On a CPU torch has no flash attention with dropout: it keeps all weights, twice, for the backward pass,
    and takes up to 2.7 times as long as "blocked"; in fp32 without dropout it is faster.
    """
    return "blocked" if device_type == "cpu" and (dtype == torch.bfloat16 or dropout_p) else "sdpa"


@torch.library.custom_op("gptpl::blocked_attention", mutates_args=())
def blocked_attention(qkv: Tensor, n_heads: int, dropout_p: float, seed: Tensor | None) -> Tensor:
    """(B, T, 3 D) on a CPU, query, key and value side by side -> (B, T, D); position t attends to 0..t.

    `dropout_p`, the probability of dropping an attention weight, is rounded to a multiple of 2**-16; the rest
    is scaled up to match. What is dropped depends on `seed` alone, an int64 scalar; None: nothing.
    """
    B, T, width = qkv.shape
    out = qkv.new_empty(B, T, width // 3)
    dropout = _Dropout(dropout_p, seed)
    hidden = _hidden_corner(qkv)
    for rows, q, k, v in _groups(qkv, n_heads):
        mixed = torch.empty_like(q)
        for first, last in _query_blocks(T):
            weights = _weights(q, k, first, last, hidden)  # (N, Q, last)
            weights = dropout(weights, dropout.mask_like(weights))
            mixed[:, first:last] = torch.bmm(weights, v[:, :last])
        heads = mixed.view(-1, n_heads, *q.shape[1:])  # (rows, H, T, K)
        out[rows].view(-1, T, n_heads, q.shape[2]).copy_(heads.transpose(1, 2))
    return out


@blocked_attention.register_fake
def _(qkv: Tensor, n_heads: int, dropout_p: float, seed: Tensor | None) -> Tensor:
    B, T, width = qkv.shape
    return qkv.new_empty(B, T, width // 3)


@torch.library.custom_op("gptpl::blocked_attention_backward", mutates_args=())
def _backward(grad: Tensor, qkv: Tensor, n_heads: int, dropout_p: float, seed: Tensor | None) -> Tensor:
    """The gradient of qkv (B, T, 3 D) from that of `blocked_attention`'s output, (B, T, D)."""
    T, K = qkv.shape[1], qkv.shape[2] // 3 // n_heads
    out = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    dropout = _Dropout(dropout_p, seed)
    hidden = _hidden_corner(qkv)
    for rows, q, k, v in _groups(qkv, n_heads):
        d_mixed = grad[rows].reshape(-1, T, n_heads, K).transpose(1, 2).reshape(-1, T, K)
        d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for first, last in _query_blocks(T):
            block = d_mixed[:, first:last]
            weights = _weights(q, k, first, last, hidden)  # (N, Q, last)
            mask = dropout.mask_like(weights)
            d_v[:, :last] += torch.bmm(dropout(weights, mask).transpose(1, 2), block)
            d_weights = dropout(torch.bmm(block, v[:, :last].transpose(1, 2)), mask)
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            d_q[:, first:last] = torch.bmm(d_scores, k[:, :last])
            d_k[:, :last] += torch.bmm(d_scores.transpose(1, 2), q[:, first:last])
        d_q *= K**-0.5
        packed = out[rows].view(-1, T, 3, n_heads, K).permute(2, 0, 3, 1, 4)  # (3, B, H, T, K)
        for part, gradient in zip(packed, (d_q, d_k, d_v), strict=True):
            part.copy_(gradient.view(-1, n_heads, T, K))
    return out


@_backward.register_fake
def _(grad: Tensor, qkv: Tensor, n_heads: int, dropout_p: float, seed: Tensor | None) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    qkv, ctx.n_heads, ctx.dropout_p, seed = inputs
    ctx.save_for_backward(qkv, seed)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    qkv, seed = ctx.saved_tensors
    return _backward(grad, qkv, ctx.n_heads, ctx.dropout_p, seed), None, None, None


blocked_attention.register_autograd(_differentiate, setup_context=_keep)


class _Dropout:
    """Drops the same weights in the backward pass as in the forward pass without storing a mask."""

    def __init__(self, p: float, seed: Tensor | None) -> None:
        levels = round(p * _LEVELS)
        self.threshold = levels - _LEVELS // 2  # int16 numbers below are dropped
        self.scale = _LEVELS / (_LEVELS - levels)
        self.generator = None if seed is None else torch.Generator().manual_seed(int(seed))

    def mask_like(self, weights: Tensor) -> Tensor | None:
        """The next mask of the sequence; None: nothing is dropped."""
        if self.generator is None:
            return None
        numbers = torch.empty(-(-weights.numel() // 4), dtype=torch.int64)
        numbers.random_(-(2**63), None, generator=self.generator)
        return numbers.view(torch.int16)[: weights.numel()].view(weights.shape) >= self.threshold

    def __call__(self, weights: Tensor, mask: Tensor | None) -> Tensor:
        return weights if mask is None else (weights * mask).mul_(self.scale)


def _groups(qkv: Tensor, n_heads: int) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Rows of the batch whose scores are computed together: queries, scaled, keys and values, (N, T, K)."""
    B, T, width = qkv.shape
    K = width // 3 // n_heads
    size = max(1, BLOCK_SCORES // (n_heads * min(T, BLOCK_QUERIES) * T))
    for first in range(0, B, size):
        rows = slice(first, first + size)
        heads = qkv[rows].view(-1, T, 3, n_heads, K).permute(2, 0, 3, 1, 4)  # (3, B, H, T, K)
        q, k, v = heads.reshape(3, -1, T, K).unbind()  # contiguous
        yield rows, q * K**-0.5, k, v


def _query_blocks(T: int) -> Iterator[tuple[int, int]]:
    """Queries whose scores are computed together: from `first` to before `last`, where their keys end."""
    return ((first, min(first + BLOCK_QUERIES, T)) for first in range(0, T, BLOCK_QUERIES))


def _hidden_corner(qkv: Tensor) -> Tensor:
    """The mask of later positions where a block of queries meets its own keys: (Q, Q), 0 and -inf."""
    Q = min(qkv.shape[1], BLOCK_QUERIES)
    return qkv.new_full((Q, Q), float("-inf")).triu(1)


def _weights(q: Tensor, k: Tensor, first: int, last: int, hidden: Tensor) -> Tensor:
    """Attention weights (N, Q, last) of the queries from `first` to before `last`."""
    scores = torch.bmm(q[:, first:last], k[:, :last].transpose(1, 2))
    scores[:, :, first:] += hidden[: last - first, : last - first]
    return scores.softmax(-1)
