"""Next-token cross-entropy and perplexity."""

# B batch, T time, V vocabulary

import math

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED_TARGET = -100
"""Target id of a position that has no next token to predict (torch's default `ignore_index`)."""


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats per target token.

    Args:
        logits: (B, T, V), any floating dtype; the softmax is taken in float32.
        targets: (B, T) int64; positions holding `IGNORED_TARGET` count neither in the sum nor in the mean.

    Returns:
        A float32 scalar; nan when every target is ignored.
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED_TARGET)


def summed_next_token_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies in nats and the number of target tokens, for exact means over many batches.

    Args:
        logits: (B, T, V).
        targets: (B, T) int64, `IGNORED_TARGET` is left out.

    Returns:
        (sum, count), two float64 scalars (float32 on devices without float64).
    """
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    total = F.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED_TARGET, reduction="sum"
    )
    return total.to(wide), (targets != IGNORED_TARGET).sum().to(wide)


def perplexity(loss: float) -> float:
    """exp(loss): the number of equally likely tokens that would be as surprising; inf beyond float range."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
