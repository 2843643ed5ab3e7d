"""The batch that fits into memory, against memory that a training step really takes."""

import json
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from gptpl.errors import InputError
from gptpl.model import GPTConfig, GPTModel
from gptpl.model.loss import head_loss
from gptpl.training import costs as module
from gptpl.training.costs import StepMemory, accumulation, largest_batch_size, step_memory
from gptpl.training.performance import FastPath, choose_fast_path

CONFIG = GPTConfig(
    vocab_size=2000, context_length=256, emb_dim=256, n_heads=4, n_layers=6, drop_rate=0.0, qkv_bias=True
)


def path(**choices) -> FastPath:
    return choose_fast_path(
        device_type="cpu", precision="bf16-mixed", drop_rate=0.0, total_steps=1, **choices
    )


def live_peak(net: GPTModel, batch_size: int, trace: Path) -> int:
    """Bytes of tensors that a step holds at its peak, as torch's allocator counts them.

    Not the process's peak: that depends on what malloc keeps and on oneDNN's buffers, machine by machine.
    """
    tokens = torch.zeros(batch_size, 256, dtype=torch.int64)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with torch.autocast("cpu", torch.bfloat16):
            head_loss(net.hidden(tokens), net.out_head.weight, tokens).backward()
        net.zero_grad()
    profiler.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    return max(accumulate(event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])))


@pytest.mark.studies
def test_the_estimate_is_what_a_larger_batch_takes(tmp_path):
    """Of 9 more sequences, with the room for their logits."""
    took, estimated = {}, {}
    for recompute in (False, True):
        chosen, net = path(recompute=recompute), GPTModel(CONFIG)
        chosen.apply(net)
        small, large = (live_peak(net, size, tmp_path / f"{size}.json") for size in (3, 12))
        took[recompute] = large - small
        at_3, at_12 = (
            step_memory(CONFIG, chosen, batch_size=size, max_length=256, low=True).peak for size in (3, 12)
        )
        estimated[recompute] = at_12 - at_3
    assert estimated[False] == pytest.approx(took[False], rel=0.1)
    # Recomputed activations come and go block by block; the estimate leaves room for what malloc keeps.
    assert took[True] < estimated[True] < took[False]


def test_recomputing_and_bf16_need_less():
    def needed(low: bool, **choices) -> int:
        return step_memory(CONFIG, path(**choices), batch_size=8, max_length=256, low=low).peak

    assert needed(True, recompute=True) < needed(True) < needed(False) < needed(False, head="plain")


@pytest.mark.parametrize(
    ("free", "sequences", "size"),
    [
        (10**9, 12, 12),
        (100, 12, 6),
        (99, 12, 6),
        (50, 12, 4),
        (49, 12, 3),
        (30, 12, 2),
        (29, 7, 1),
        (20, 13, 1),
    ],
)
def test_the_largest_divisor_that_fits(monkeypatch, free, sequences, size):
    """A step of 10 bytes a window, on memory of which 80 % are used."""

    def of_ten(*args, batch_size: int, **kwargs) -> StepMemory:
        return StepMemory(weights=0, gradients=0, optimizer=0, activations=10 * batch_size, head=0)

    monkeypatch.setattr(module, "step_memory", of_ten)
    chosen = largest_batch_size(CONFIG, path(), max_length=256, sequences=sequences, low=True, free=free)
    assert chosen == size


def test_not_one_sequence_fits():
    with pytest.raises(InputError, match=r"of 256 tokens needs about 0\.\d GB, 0\.0 GB are free"):
        largest_batch_size(CONFIG, path(), max_length=256, sequences=4, low=True, free=1000)


@pytest.mark.parametrize(
    ("global_batch", "batch_size", "world_size", "times"), [(8, 8, 1, 1), (8, 2, 1, 4), (8, 2, 2, 2)]
)
def test_accumulation(global_batch, batch_size, world_size, times):
    assert accumulation(global_batch=global_batch, batch_size=batch_size, world_size=world_size) == times


@pytest.mark.parametrize(("global_batch", "batch_size", "world_size"), [(8, 3, 1), (6, 2, 2), (0, 1, 1)])
def test_what_does_not_make_up_the_whole_batch_is_refused(global_batch, batch_size, world_size):
    with pytest.raises(InputError, match=rf"global_batch_size={global_batch} must be a multiple"):
        accumulation(global_batch=global_batch, batch_size=batch_size, world_size=world_size)


def test_a_device_that_does_not_tell_is_refused():
    with pytest.raises(InputError, match="mps"):
        module.free_memory("mps")
    assert module.free_memory("cpu") > 0
