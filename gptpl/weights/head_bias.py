"""The bias of a classifier's head, for transformers, whose heads have none."""

# C classes, D model

import torch
from torch import Tensor

_ALLOWED = 1e-6
"""What may be left of the bias, beside its largest number: rounding in fp32."""


def bias_as_shift(weight: Tensor, bias: Tensor) -> Tensor | None:
    """The smallest shift d (D,) float64 of the hidden states with W d = b, for W (C, D) and b (C,).

    A shift of the final LayerNorm's bias, which nothing but the head reads, does what the head's bias did.
    None where there is none: rows of W that depend on one another, more classes than D.
    """
    W, b = weight.detach().cpu().double(), bias.detach().cpu().double()
    shift = torch.linalg.pinv(W) @ b
    left = (W @ shift - b).abs().max()
    return shift if left <= _ALLOWED * b.abs().max().clamp(min=1.0) else None
