"""The loss of a language model on texts."""

# B batch, T time

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gptpl.model import eval_mode
from gptpl.model.loss import evaluation_loss, perplexity
from gptpl.model.protocol import device_of


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Mean nats per token, its exponential, and the number of tokens scored.

    `data` says what was scored, and `context` from what each token was predicted, where that is known.
    """

    loss: float
    perplexity: float
    tokens: int
    data: str = ""
    context: str = ""


def evaluate(net: nn.Module, batches: Iterable[Sequence[Any]]) -> Evaluation:
    """Mean next-token loss over all targets of all batches, in evaluation mode.

    A batch begins with inputs and targets, each (B, T), a text in each row; targets of -100 are not counted.
    """
    device = device_of(net)
    total = count = 0.0
    with torch.inference_mode(), eval_mode(net):
        for inputs, targets, *_ in batches:
            loss, tokens = evaluation_loss(net, inputs.to(device), targets.to(device)).tolist()
            total, count = total + loss, count + tokens
    mean = total / count
    return Evaluation(loss=mean, perplexity=perplexity(mean), tokens=int(count))
