"""Accumulated gradients are summed over the processes once an optimizer step, not once a batch."""

from datetime import timedelta

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from gptpl.runs.trainer import build_strategy


@pytest.mark.usefixtures("own_process_group")
def test_only_the_last_batch_of_a_step_is_summed_over_the_processes(pretraining, monkeypatch):
    summed: list[bool] = []
    forward = DistributedDataParallel.forward

    def noting(self, *args, **kwargs):
        if torch.is_grad_enabled():
            summed.append(self.require_backward_grad_sync)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(DistributedDataParallel, "forward", noting)
    strategy = build_strategy("ddp", timedelta(minutes=1), sharded_checkpoints=False)
    pretraining.fit(module=pretraining.module(total_steps=4), strategy=strategy, accumulate_grad_batches=3)
    assert summed == [False, False, True] * 4
