"""What a training step keeps in memory, part by part, without taking that memory; what is free; what fits."""

# B sequences in a batch, T time, D model, V vocabulary, N positions (B x T)

import bisect
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from gptpl.errors import InputError
from gptpl.files.plain import tensors_in
from gptpl.model import GPTBackbone, GPTClassifier, GPTConfig, GPTModel
from gptpl.model.loss import MULTIPLE, PRODUCT_ROWS
from gptpl.training.performance import FastPath

Prepare = Callable[[GPTModel], GPTBackbone]
"""Makes what trains of a language model: gives it another head, freezes a part, adds low-rank matrices."""
ShapesAlone = FakeTensorMode
"""Within it tensors have shapes and no memory. Private to torch, read in 2.13: it stands here alone."""
USABLE = 0.8
"""Share of the free memory that is planned for: the rest is for what is freed and asked for in between."""

_FP32_BYTES, _BF16_BYTES = 4, 2
_ADAMW_AVERAGES = 2
_RECOMPUTED_BLOCKS = 4
"""Blocks' activations that there is room for where they are recomputed: one block's, and what its backward
pass needs for a while (measured, tests/training). Where all are kept, those no longer needed make room."""

# --- what a step needs ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes of a training step by part."""

    weights: int
    gradients: int
    """Of all parameters that train, at the end of the backward pass."""
    optimizer: int
    """What it keeps from step to step."""
    activations: int
    """What the blocks keep for the backward pass, at the end of the forward pass."""
    head: int
    """Logits with their gradient, and copies of the head's matrix."""
    gradients_stay: bool = False
    """Whether gradients of earlier batches are there in the forward pass (accumulation)."""

    @property
    def peak(self) -> int:
        """The most that is there at a time: gradients come while activations and the head's share go."""
        forward = self.activations + self.head
        passing = forward + self.gradients if self.gradients_stay else max(forward, self.gradients)
        return self.weights + self.optimizer + passing


def step_memory(
    config: GPTConfig,
    path: FastPath,
    *,
    batch_size: int,
    max_length: int,
    low: bool,
    optimizer_bytes: int | None = None,
    weight_bytes: int = _FP32_BYTES,
    accumulates: bool = False,
    prepare: Prepare = lambda net: net,
) -> StepMemory:
    """Estimated bytes of a training step, counted on tensors without memory, for one block and for two.

    Products are bf16 if `low`, weights too if `weight_bytes` is 2. The optimizer keeps `optimizer_bytes`, see
    `optimizer_state_bytes`; None: AdamW's two averages. An optimizer step that `accumulates` has several
    batches. `prepare` may treat the last block differently from the others.
    """

    def kept(of_few: GPTConfig) -> int:
        return kept_bytes(
            of_few, path, batch_size=batch_size, max_length=max_length, low=low,
            weight_bytes=weight_bytes, prepare=prepare,
        )  # fmt: skip

    def parameters(of_few: GPTConfig, *, trained: bool = False) -> int:
        with torch.device("meta"):
            net = prepare(GPTModel(of_few))
        return sum(p.numel() * weight_bytes for p in net.parameters() if p.requires_grad or not trained)

    there = replace(config, n_layers=_RECOMPUTED_BLOCKS) if path.recompute else config
    activations = of_any_depth(there, kept)
    if path.recompute:  # the inputs of all blocks are kept
        activations += config.n_layers * batch_size * max_length * config.emb_dim * weight_bytes
    trained = of_any_depth(config, partial(parameters, trained=True))
    rows, low_products = batch_size * max_length, low or weight_bytes == _BF16_BYTES
    return StepMemory(
        weights=of_any_depth(config, parameters),
        gradients=trained,
        optimizer=_ADAMW_AVERAGES * trained if optimizer_bytes is None else optimizer_bytes,
        activations=activations,
        head=_head_bytes(config, path, prepare, rows=rows, low=low_products),
        gradients_stay=accumulates,
    )


def of_any_depth(config: GPTConfig, counted: Callable[[GPTConfig], int]) -> int:
    """What is counted of a model with one block and of one with two, for as many as there are."""
    one, two = (counted(replace(config, n_layers=n)) for n in (1, 2))
    return one + (config.n_layers - 1) * (two - one)


def kept_bytes(
    config: GPTConfig,
    path: FastPath,
    *,
    batch_size: int,
    max_length: int,
    low: bool,
    weight_bytes: int = _FP32_BYTES,
    prepare: Prepare = lambda net: net,
) -> int:
    """Bytes that autograd keeps of all but the head, with every block's activations, without weights."""
    storages: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
        return tensor

    with ShapesAlone():
        net = _model(config, weight_bytes, prepare)
        replace(path, recompute=False, compile=replace(path.compile, compiled=False)).apply(net)
        tokens = torch.zeros(batch_size, max_length, dtype=torch.int64)
        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=low):
            hidden = net.hidden(tokens)
        weights = {p.untyped_storage()._cdata for p in net.parameters()}
        del hidden
    return sum(size for key, size in storages.items() if key not in weights)


def _head_bytes(config: GPTConfig, path: FastPath, prepare: Prepare, *, rows: int, low: bool) -> int:
    """Of logits, their gradient, and the head's matrix beside its weight; `rows` are N.

    "fused" works on some rows at a time, and keeps the gradients of both factors for the backward pass, of a
    frozen head's of the hidden states alone. A classifier's logits are too few to count.
    """
    V, D = config.vocab_size, config.emb_dim
    product = _BF16_BYTES if low else _FP32_BYTES
    with torch.device("meta"):
        net = prepare(GPTModel(replace(config, n_layers=1)))
    if isinstance(net, GPTClassifier):
        return 0
    trains = any(parameter.requires_grad for parameter in net.out_head.parameters())
    if path.head != "fused":  # the logarithms of all probabilities, their gradient, and the logits'
        return 3 * rows * V * _FP32_BYTES
    filled = -(-V // MULTIPLE) * MULTIPLE
    several = rows > PRODUCT_ROWS
    d_weight = (_FP32_BYTES + product if several and low else product) * filled * D if trains else 0
    logits = min(rows, PRODUCT_ROWS) * filled * product
    return logits + product * filled * D + d_weight + rows * D * _FP32_BYTES


def optimizer_state_bytes(
    config: GPTConfig,
    make_optimizer: Callable[[nn.Module], Optimizer],
    *,
    weight_bytes: int = _FP32_BYTES,
    prepare: Prepare = lambda net: net,
) -> int:
    """Bytes that the optimizer keeps between steps: counted after a step, as those of `step_memory`."""

    def counted(of_few: GPTConfig) -> int:
        with ShapesAlone():
            net = _model(of_few, weight_bytes, prepare)
            optimizer = make_optimizer(net)
            for parameter in net.parameters():
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
            optimizer.step()
            return sum(
                tensor.numel() * tensor.element_size() for tensor in tensors_in(optimizer.state_dict())
            )

    return of_any_depth(config, counted)


def _model(config: GPTConfig, weight_bytes: int, prepare: Prepare) -> GPTBackbone:
    """A model whose weights are made with so many bytes each: tensors without memory cannot be converted."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if weight_bytes == _BF16_BYTES else torch.float32)
    try:
        return prepare(GPTModel(config))
    finally:
        torch.set_default_dtype(before)


# --- what fits ------------------------------------------------------------------------------------------


def largest_batch_size(
    config: GPTConfig, path: FastPath, *, max_length: int, windows: int, free: int, **memory: Any
) -> int:
    """The largest divisor of `windows`, a device's share of a step, that fits into `USABLE` of `free` bytes.

    `memory` is what else `step_memory` should know. Raises InputError when not even one sequence fits.
    """
    sizes = [size for size in range(1, windows + 1) if windows % size == 0]

    def needed(size: int) -> int:
        return step_memory(config, path, batch_size=size, max_length=max_length, **memory).peak

    fitting = bisect.bisect_right(sizes, USABLE * free, key=needed)
    if fitting:
        return sizes[fitting - 1]
    raise InputError(
        f"one window of {max_length} tokens needs about {needed(1) / 1e9:.1f} GB,"
        f" {free / 1e9:.1f} GB are free: take a smaller model, a shorter data.max_length, or"
        " trainer.recompute_activations=true"
    )


def accumulation(*, global_batch: int, batch_size: int, world_size: int) -> int:
    """Batches of every device in an optimizer step; InputError where they do not make it up exactly."""
    at_once = batch_size * world_size
    if global_batch < 1 or global_batch % at_once:
        devices = f" on {world_size} devices" if world_size > 1 else ""
        raise InputError(
            f"data.global_batch_size={global_batch} is no multiple of data.batch_size={batch_size}{devices}"
            f" ({at_once} windows at a time): change one of them, or give data.batch_size=auto"
        )
    return global_batch // at_once


# --- what is free, and what was used --------------------------------------------------------------------


def free_memory(device_type: str) -> int:
    """Bytes that are free on the device, or for this container; raises InputError where none can be asked."""
    if device_type == "cuda":
        return torch.cuda.mem_get_info()[0]
    if device_type == "cpu":
        available, allowed = psutil.virtual_memory().available, container_free_bytes()
        return available if allowed is None else min(available, allowed)
    raise InputError(f"data.batch_size=auto cannot ask {device_type} for its free memory: give a number")


def container_free_bytes(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> int | None:
    """Bytes left by the tightest limit of the process's Linux control groups (version 2, cgroups(7)).

    Files that the kernel keeps in memory, and would drop, count as free. None: there is no limit, or no
    version 2. `root` is where the groups are mounted, in a container its own; `own` names the process's.
    """
    lines = own.read_text().splitlines() if own.exists() else []
    names = [line.removeprefix("0::/") for line in lines if line.startswith("0::/")]
    if not names:
        return None
    group = root / names[0]
    above = [folder for folder in group.parents if folder == root or root in folder.parents]
    limits = [_free_in(folder) for folder in (group, *above)]
    return min((free for free in limits if free is not None), default=None)


def _free_in(group: Path) -> int | None:
    maximum, current = group / "memory.max", group / "memory.current"
    if not maximum.exists() or not current.exists():  # the group above all has no limit
        return None
    limit = maximum.read_text().strip()
    if limit == "max":
        return None
    statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    used = int(current.read_text()) - int(statistics.get("inactive_file", 0))
    return max(0, int(limit) - used)


def peak_memory_bytes(device: torch.device) -> int:
    """Bytes: of a CUDA device what torch had allocated since `forget_peak`, else all that is resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():
        # What `getrusage` says of a process begins with the size of the one that started it.
        return int(status.read_text(encoding="utf-8").split("VmHWM:")[1].split()[0]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak(device: torch.device) -> None:
    """Starts the peak anew where that is possible, on CUDA devices."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
