"""How many windows fit into memory at a time, and how many batches make up a whole one."""

# B windows in a batch, T time, D model, V vocabulary

from dataclasses import replace

import psutil
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gptpl.errors import InputError
from gptpl.model import GPTConfig, GPTModel, count_parameters
from gptpl.training import control_group
from gptpl.training.fast_path import FastPath
from gptpl.training.head_loss import PRODUCT_ROWS, training_loss

BYTES_A_PARAMETER = 16
"""The weight, its gradient and AdamW's two averages, in fp32."""
USABLE = 0.8
"""Share of the free memory that is planned for: the rest is for what is freed and asked for in between."""

_RECOMPUTED_BLOCKS = 4
"""Blocks' activations that there is room for where they are made anew: one block's, and what its backward
pass needs for a while (measured, tests/training). Where all are kept, those no longer needed make room."""


def free_memory(device_type: str) -> int:
    """Bytes that are free on the device, or for this container; raises InputError where none can be asked."""
    if device_type == "cuda":
        return torch.cuda.mem_get_info()[0]
    if device_type == "cpu":
        available, allowed = psutil.virtual_memory().available, control_group.free_bytes()
        return available if allowed is None else min(available, allowed)
    raise InputError(f"data.batch_size=auto cannot ask {device_type} for its free memory: give a number")


def largest_batch_size(
    config: GPTConfig, path: FastPath, *, max_length: int, windows: int, low: bool, free: int
) -> int:
    """The largest divisor of `windows` whose training step fits into memory.

    Args:
        config: the model's.
        path: its attention, head and recomputation decide what a step keeps.
        max_length: T.
        windows: what one device has to see in an optimizer step.
        low: whether products are bf16.
        free: bytes of free memory; `USABLE` of them are used.

    Raises InputError when not even one window fits.
    """
    sizes = [size for size in range(windows, 0, -1) if windows % size == 0]
    for size in sizes:
        needed = step_bytes(config, path, batch_size=size, max_length=max_length, low=low)
        if needed <= USABLE * free:
            return size
    raise InputError(
        f"one window of {max_length} tokens needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free:"
        " take a smaller model, a shorter data.max_length, or trainer.recompute_activations=true"
    )


def step_bytes(config: GPTConfig, path: FastPath, *, batch_size: int, max_length: int, low: bool) -> int:
    """Estimated bytes of a training step at its peak: weights, optimizer, activations, logits.

    What autograd keeps is counted on tensors that have shapes and no memory, for one block and for two; the
    others are like them.
    """
    one, two = (
        kept_bytes(replace(config, n_layers=n), path, batch_size=batch_size, max_length=max_length, low=low)
        for n in (1, 2)
    )
    block, rest = two - one, 2 * one - two
    kept = config.n_layers * block
    if path.recompute:
        inputs_of_blocks = config.n_layers * batch_size * max_length * config.emb_dim * 4
        kept = inputs_of_blocks + _RECOMPUTED_BLOCKS * block
    rows = batch_size * max_length
    if path.head == "fused":  # which keeps nothing but its gradients, and needs room for some rows' logits
        logits = min(rows, PRODUCT_ROWS) * config.vocab_size * (2 if low else 4)
    else:  # the gradient of the logits, beside the logits
        logits = rows * config.vocab_size * 4
    return count_parameters(config).total * BYTES_A_PARAMETER + kept + rest + logits


def kept_bytes(config: GPTConfig, path: FastPath, *, batch_size: int, max_length: int, low: bool) -> int:
    """Bytes that autograd keeps for the backward pass, with every block's activations, without weights."""
    storages: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
        return tensor

    with FakeTensorMode():
        net = GPTModel(config)
        replace(path, recompute=False, compile=replace(path.compile, compiled=False)).apply(net)
        tokens = torch.zeros(batch_size, max_length, dtype=torch.int64)
        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = training_loss(net, tokens, tokens, head=path.head)
        weights = {p.untyped_storage()._cdata for p in net.parameters()}
        del loss
    return sum(size for key, size in storages.items() if key not in weights)


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
