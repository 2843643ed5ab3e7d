"""How large a model is, known before any memory is spent on it."""

from dataclasses import dataclass

import torch

from gptpl.model.config import GPTConfig
from gptpl.model.gpt import GPTModel

_FP32_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Parameters of a model.

    Attributes:
        total: as configured; a tied head counts once.
        tied: with the head tied to the token embedding.
        untied: with a head of its own.
        fp32_bytes: bytes of the `total` weights in fp32 (gradients and optimizer state come on top).
    """

    total: int
    tied: int
    untied: int
    fp32_bytes: int


def count_parameters(config: GPTConfig) -> ParameterCount:
    """Count the parameters of `GPTModel(config)` without allocating them or drawing a random number."""
    with torch.device("meta"):
        model = GPTModel(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    head = model.out_head.weight.numel()
    tied = total if config.tie_weights else total - head
    return ParameterCount(total=total, tied=tied, untied=tied + head, fp32_bytes=total * _FP32_BYTES)
