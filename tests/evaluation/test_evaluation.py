"""The loss of a model on a whole text, against a loop over single tokens."""

# B batch, T time

import math

import pytest
import torch
from torch import Tensor

from gptpl.evaluation.likelihood import evaluate
from gptpl.model import GPTModel

Batch = tuple[Tensor, Tensor]


def one_by_one(net: GPTModel, batches: list[Batch]) -> list[float]:
    """-log p of every target, each from a forward pass over its own window alone."""
    net.eval()
    losses = []
    with torch.no_grad():
        for inputs, targets in batches:
            for row, wanted in zip(inputs, targets, strict=True):
                for t, target in enumerate(wanted.tolist()):
                    if target != -100:
                        probabilities = net(row[None, : t + 1])[0, -1].double().softmax(0)
                        losses.append(-math.log(probabilities[target].item()))
    return losses


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    made = []
    for B in (3, 1):
        tokens = torch.randint(0, 257, (B, 6), generator=generator)  # (B, T + 1)
        made.append((tokens[:, :-1], tokens[:, 1:].clone()))
    made[0][1][2, 2:] = -100
    return made


def test_every_target_counts_once(pretraining, batches):
    net = pretraining.net(drop_rate=0.5)
    losses = one_by_one(net, batches)
    result = evaluate(net, batches)
    assert result.tokens == len(losses) == 20 - 3
    assert result.loss == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.loss))


def test_the_model_gets_its_modes_back(pretraining, batches):
    net = pretraining.net(drop_rate=0.5)
    net.blocks[0].eval()
    modes = [module.training for module in net.modules()]
    first = evaluate(net, batches)
    assert [module.training for module in net.modules()] == modes
    assert evaluate(net, batches) == first  # no dropout
    assert all(p.grad is None for p in net.parameters())
