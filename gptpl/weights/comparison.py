"""Whether a model says the same after its weights went through another format."""

# T time, V vocabulary

import torch
from torch import Tensor, nn

from gptpl.errors import InputError
from gptpl.model import GPTClassifier, eval_mode
from gptpl.model.protocol import context_length, device_of, vocab_size

_PROMPT_TOKENS = 64
TOLERANCE = 1e-5
"""Largest difference of two logits, relative to the largest logit: the weights must be the same bits."""


def prompt_logits(net: nn.Module) -> Tensor:
    """Logits (1, T, V) in fp32 of a fixed prompt: tokens spread over the vocabulary, T at most 64."""
    T = min(_PROMPT_TOKENS, context_length(net))
    tokens = (torch.arange(T, device=device_of(net)) * 7919 + 1) % vocab_size(net)  # 7919: a prime
    with torch.inference_mode(), eval_mode(net):
        logits: Tensor = net(tokens[None])
    return logits.float().cpu()


def prompt_class_logits(net: GPTClassifier, *, pad_id: int) -> Tensor:
    """Logits (B, C) in fp32 of fixed prompts of 1 to T tokens, padded, T at most 64."""
    config = net.config
    T = min(_PROMPT_TOKENS, config.context_length)
    lengths = torch.tensor(sorted({1, max(1, T // 2), T}), device=net.device)  # (B,)
    tokens = (torch.arange(T, device=net.device) * 7919 + 1) % config.vocab_size
    rows = torch.where(torch.arange(T, device=net.device) < lengths[:, None], tokens, pad_id)  # (B, T)
    with torch.inference_mode(), eval_mode(net):
        return net(rows, lengths).float().cpu()


def compare_logits(before: Tensor, after: Tensor, *, name: str) -> float:
    """Their largest absolute difference. Raises InputError where the two models are not the same."""
    if before.shape != after.shape:
        raise InputError(
            f"format={name} came back with another shape ({tuple(after.shape)}, not {tuple(before.shape)}):"
            " nothing was written; this is a mistake in gptpl"
        )
    difference = (before - after).abs().max().item()
    allowed = TOLERANCE * max(1.0, before.abs().max().item())
    if not difference <= allowed:
        raise InputError(
            f"format={name} came back with logits that differ by {difference:.3g} (allowed {allowed:.3g}):"
            " nothing was written; this is a mistake in gptpl"
        )
    return difference
