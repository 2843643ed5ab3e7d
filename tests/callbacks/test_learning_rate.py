"""The logged rate is the one the update was made with."""

import math

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from gptpl.callbacks.metrics import LearningRate
from gptpl.training.optimizers import muon


def cosine(step: int, *, peak: float, floor: float, warmup: int, total: int) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    return floor + (peak - floor) * (1 + math.cos(math.pi * (step - warmup) / (total - 1 - warmup))) / 2


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_rate_of_every_update(pretraining, accumulate):
    """Step n was made with the schedule's factor after n - 1 steps; two groups share one column."""
    pretraining.fit(LearningRate(), accumulate_grad_batches=accumulate)
    expected = {
        step: cosine(step - 1, peak=pretraining.lr, floor=1e-4, warmup=3, total=20) for step in range(1, 21)
    }
    assert pretraining.column("lr") == pytest.approx(expected, rel=1e-5)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_a_named_group_has_a_column_of_its_own(pretraining):
    def make(net: nn.Module) -> Optimizer:
        return muon(
            net,
            lr=pretraining.lr,
            muon_lr=4e-3,
            momentum=0.9,
            weight_decay=0.1,
            betas=(0.9, 0.999),
            eps=1e-8,
            decay="matrices",
        )

    pretraining.fit(LearningRate(), module=pretraining.module(total_steps=6, make_optimizer=make))
    rates, muon_rates = pretraining.column("lr"), pretraining.column("lr/muon")
    assert list(muon_rates) == list(rates) == [1, 2, 3, 4, 5, 6]
    assert muon_rates[3] == pytest.approx(4e-3)
    ratio = 4e-3 / pretraining.lr
    assert muon_rates == pytest.approx({step: rate * ratio for step, rate in rates.items()}, rel=1e-5)
