"""Several texts in one row, each as if it stood alone: their positions, and who sees whom."""

# B batch, T time

import torch
from torch import Tensor


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
