"""How many windows fit into memory at a time, and how many batches make up a whole one."""

# T time

import bisect
from typing import Any

import psutil
import torch

from gptpl.errors import InputError
from gptpl.model import GPTConfig
from gptpl.training import control_group
from gptpl.training.fast_path import FastPath
from gptpl.training.step_memory import step_memory

USABLE = 0.8
"""Share of the free memory that is planned for: the rest is for what is freed and asked for in between."""


def free_memory(device_type: str) -> int:
    """Bytes that are free on the device, or for this container; raises InputError where none can be asked."""
    if device_type == "cuda":
        return torch.cuda.mem_get_info()[0]
    if device_type == "cpu":
        available, allowed = psutil.virtual_memory().available, control_group.free_bytes()
        return available if allowed is None else min(available, allowed)
    raise InputError(f"data.batch_size=auto cannot ask {device_type} for its free memory: give a number")


def largest_batch_size(
    config: GPTConfig,
    path: FastPath,
    *,
    max_length: int,
    windows: int,
    low: bool,
    free: int,
    **memory: Any,
) -> int:
    """The largest divisor of `windows` whose training step fits into memory.

    Args:
        config: the model's.
        path: its attention, head and recomputation decide what a step keeps.
        max_length: T.
        windows: what one device has to see in an optimizer step.
        low: whether products are bf16.
        free: bytes of free memory; `USABLE` of them are used.
        memory: what else `step_memory` should know.

    Raises InputError when not even one window fits.
    """
    sizes = [size for size in range(1, windows + 1) if windows % size == 0]

    def needed(size: int) -> int:
        return step_bytes(config, path, batch_size=size, max_length=max_length, low=low, **memory)

    fitting = bisect.bisect_right(sizes, USABLE * free, key=needed)
    if fitting:
        return sizes[fitting - 1]
    raise InputError(
        f"one window of {max_length} tokens needs about {needed(1) / 1e9:.1f} GB,"
        f" {free / 1e9:.1f} GB are free: take a smaller model, a shorter data.max_length, or"
        " trainer.recompute_activations=true"
    )


def step_bytes(
    config: GPTConfig, path: FastPath, *, batch_size: int, max_length: int, low: bool, **memory: Any
) -> int:
    """Estimated bytes of a training step at its peak; arguments as for `step_memory`."""
    parts = step_memory(config, path, batch_size=batch_size, max_length=max_length, low=low, **memory)
    return parts.peak


def accumulation(*, global_batch: int, batch_size: int, world_size: int) -> int:
    """Batches of every device in an optimizer step of `global_batch` windows.

    Raises InputError where they do not make it up exactly.
    """
    at_once = batch_size * world_size
    if global_batch < 1 or global_batch % at_once:
        devices = f" on {world_size} devices" if world_size > 1 else ""
        raise InputError(
            f"data.global_batch_size={global_batch} is no multiple of data.batch_size={batch_size}{devices}"
            f" ({at_once} windows at a time): change one of them, or give data.batch_size=auto"
        )
    return global_batch // at_once
