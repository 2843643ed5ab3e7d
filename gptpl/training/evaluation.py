"""Loss of a model on a whole text."""

# B batch, T time

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gptpl.model import eval_mode
from gptpl.training.head_loss import evaluation_loss
from gptpl.training.loss import perplexity


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a text costs a model: mean nats per token, its exponential, and the number of tokens scored.

    `data` is what was scored, and `context` from what each token was predicted, in words where that is known.
    """

    loss: float
    perplexity: float
    tokens: int
    data: str = ""
    context: str = ""


def evaluate(net: nn.Module, batches: Iterable[Sequence[Any]]) -> Evaluation:
    """Mean next-token loss over all targets of all batches: inputs and targets, each (B, T), come first.

    A row is one text. Targets of -100 are not counted. The model is put into evaluation mode for it
    and gets its mode back.
    """
    device = next(net.parameters()).device
    total = count = 0.0
    with torch.inference_mode(), eval_mode(net):
        for inputs, targets, *_ in batches:
            sums = evaluation_loss(net, inputs.to(device), targets.to(device))
            total, count = total + sums[0].item(), count + sums[1].item()
    loss = total / count
    return Evaluation(loss=loss, perplexity=perplexity(loss), tokens=int(count))
