"""Causal attention over several heads, by the kernel that is fastest where the tensors are."""

# B batch, T time, D model, H heads, K head width (D = H * K)

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from gptpl.model.blocked_attention import blocked_attention

Kernel = Literal["auto", "blocked", "sdpa"]


def causal_attention(
    qkv: Tensor,
    n_heads: int,
    *,
    dropout_p: float,
    kernel: Kernel = "auto",
    mask: Tensor | None = None,
) -> Tensor:
    """(B, T, 3 D), query, key and value side by side -> (B, T, D); position t sees 0..t.

    Args:
        qkv: what is projected from the hidden states.
        n_heads: H.
        dropout_p: share of the attention weights to drop.
        kernel: "blocked" is `blocked_attention`, "sdpa" torch's own, which uses flash attention where it can;
            "auto" see `chosen_kernel`.
        mask: (B, 1, T, T) bool, query by key: where a position looks, never beyond itself; it is for torch's
            own kernel, whichever is set. None: everywhere up to itself.
    """
    if mask is not None:
        kernel = "sdpa"
    elif kernel == "auto":
        kernel = chosen_kernel(qkv.device.type, qkv.dtype, dropout_p)
    if kernel == "blocked":
        seed = torch.randint(2**62, ()) if dropout_p else None
        return blocked_attention(qkv, n_heads, dropout_p, seed)
    B, T, width = qkv.shape
    heads = qkv.view(B, T, 3, n_heads, width // 3 // n_heads)  # (B, T, 3, H, K)
    q, k, v = heads.permute(2, 0, 3, 1, 4).unbind()  # each (B, H, T, K)
    mixed = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=mask is None
    )
    return mixed.transpose(1, 2).reshape(B, T, width // 3)  # (B, H, T, K) -> (B, T, D)


def chosen_kernel(device_type: str, dtype: torch.dtype, dropout_p: float) -> Literal["blocked", "sdpa"]:
    """What "auto" means: "blocked" on a CPU in bf16 and wherever weights are dropped, else torch's own.

    On a CPU torch's own has no flash attention with dropout: it keeps all weights, twice, for the backward
    pass, and takes up to 2.7 times as long as "blocked"; in fp32 without dropout it is the faster one.
    """
    return "blocked" if device_type == "cpu" and (dtype == torch.bfloat16 or dropout_p) else "sdpa"
