"""Loss of a model on a whole text."""

# B batch, T time

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from gptpl.model import GPTModel, eval_mode
from gptpl.training.head_loss import head_factors, summed_head_loss
from gptpl.training.loss import perplexity


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a text costs a model: mean nats per token, its exponential, and the number of tokens scored."""

    loss: float
    perplexity: float
    tokens: int


def evaluate(net: GPTModel, batches: Iterable[tuple[Tensor, Tensor]]) -> Evaluation:
    """Mean next-token loss over all targets of all batches of (inputs, targets), each (B, T).

    Targets of -100 are not counted. The model is put into evaluation mode for it and gets its mode back.
    """
    device = next(net.parameters()).device
    total = count = 0.0
    with torch.inference_mode(), eval_mode(net):
        for inputs, targets in batches:
            factors = head_factors(net.out_head, net.hidden(inputs.to(device)))
            sums = summed_head_loss(*factors, targets.to(device))
            total, count = total + sums[0].item(), count + sums[1].item()
    loss = total / count
    return Evaluation(loss=loss, perplexity=perplexity(loss), tokens=int(count))
