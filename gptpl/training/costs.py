"""What a training step costs: memory, estimated part by part; what is free, and what fits; arithmetic."""

# B sequences in a batch, T time, D model, V vocabulary, N positions (B x T)

import bisect
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from gptpl.errors import InputError
from gptpl.files.plain import tensors_in
from gptpl.model import GPTBackbone, GPTClassifier, GPTConfig, GPTModel
from gptpl.model.gpt import EXPANSION
from gptpl.model.loss import MULTIPLE, PRODUCT_ROWS
from gptpl.training.lightning_internals import ShapesAlone
from gptpl.training.performance import FastPath

Prepare = Callable[[GPTModel], GPTBackbone]
"""Makes what trains from a language model: with another head, a frozen part, low-rank matrices."""
USABLE = 0.8
"""Fraction of the free memory that is planned for; allocators need the rest."""

_FP32_BYTES, _BF16_BYTES = 4, 2
_ADAMW_AVERAGES = 2
RECOMPUTED_BLOCKS = 4
"""Blocks whose activations need room where they are recomputed: one block, and what its backward pass needs
for a while (measured, tests/training). Where all are kept, those no longer needed make room."""

# --- what a step needs ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes that a training step keeps, by part."""

    weights: int
    gradients: int
    """Of all parameters that train, at the end of the backward pass."""
    optimizer: int
    """Its state between steps."""
    activations: int
    """Of the blocks, kept for the backward pass, at the end of the forward pass."""
    head: int
    """Logits with their gradient, and copies of the head's matrix."""
    gradients_stay: bool = False
    """Whether the forward pass finds gradients of earlier batches (accumulation)."""

    @property
    def peak(self) -> int:
        """The most at any time: gradients are made while activations and the head's part are freed."""
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

    Products are bf16 if `low`, weights too if `weight_bytes` is 2. `optimizer_bytes` is the optimizer's
    state, see `optimizer_state_bytes`; None: AdamW's two averages. A step that `accumulates` has several
    batches. `prepare` may treat the last block differently from the others.
    """
    eager = replace(path, recompute=False, compile=replace(path.compile, compiled=False))

    def kept(of_few: GPTConfig) -> int:
        """Bytes that autograd keeps for all but the head, with every block's activations, without weights."""
        storages: set[torch.UntypedStorage] = set()  # which several tensors may have in common

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storages.add(tensor.untyped_storage())
            return tensor

        with ShapesAlone():
            net = made_with(of_few, weight_bytes, prepare)
            eager.apply(net)
            tokens = torch.zeros(batch_size, max_length, dtype=torch.int64)
            hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
            with hooks, torch.autocast("cpu", torch.bfloat16, enabled=low):
                net.hidden(tokens)
            weights = {p.untyped_storage() for p in net.parameters()}
        return sum(storage.nbytes() for storage in storages - weights)

    def parameters(of_few: GPTConfig, *, trained: bool = False) -> int:
        with torch.device("meta"):
            net = prepare(GPTModel(of_few))
        return sum(p.numel() * weight_bytes for p in net.parameters() if p.requires_grad or not trained)

    activations = of_any_depth(
        replace(config, n_layers=RECOMPUTED_BLOCKS) if path.recompute else config, kept
    )
    rows, low_products = batch_size * max_length, low or weight_bytes == _BF16_BYTES
    if path.recompute:  # the inputs of all blocks are kept
        activations += config.n_layers * rows * config.emb_dim * weight_bytes
    trained = of_any_depth(config, partial(parameters, trained=True))
    return StepMemory(
        weights=of_any_depth(config, parameters),
        gradients=trained,
        optimizer=_ADAMW_AVERAGES * trained if optimizer_bytes is None else optimizer_bytes,
        activations=activations,
        head=_head_bytes(config, path, prepare, rows=rows, low=low_products),
        gradients_stay=accumulates,
    )


def of_any_depth(config: GPTConfig, counted: Callable[[GPTConfig], int]) -> int:
    """A count for a model of any depth, from those with one block and with two."""
    one, two = (counted(replace(config, n_layers=n)) for n in (1, 2))
    return one + (config.n_layers - 1) * (two - one)


def _head_bytes(config: GPTConfig, path: FastPath, prepare: Prepare, *, rows: int, low: bool) -> int:
    """Bytes of the logits, their gradient, and copies of the head's matrix; `rows` are N.

    "fused" works on some rows at a time, and keeps the gradients of both factors for the backward pass; with
    a frozen head only that of the hidden states. A classifier's logits are too few to count.
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
    """Bytes that the optimizer keeps between steps, counted after one, on tensors without memory."""

    def counted(of_few: GPTConfig) -> int:
        with ShapesAlone():
            net = made_with(of_few, weight_bytes, prepare)
            optimizer = make_optimizer(net)
            for parameter in net.parameters():
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
            optimizer.step()
            return sum(tensor.nbytes for tensor in tensors_in(optimizer.state_dict()))

    return of_any_depth(config, counted)


def made_with(config: GPTConfig, weight_bytes: int, prepare: Prepare) -> GPTBackbone:
    """A model made with weights of this size: tensors without memory cannot be converted."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if weight_bytes == _BF16_BYTES else torch.float32)
    try:
        return prepare(GPTModel(config))
    finally:
        torch.set_default_dtype(before)


# --- what fits ------------------------------------------------------------------------------------------


def largest_batch_size(
    config: GPTConfig, path: FastPath, *, max_length: int, sequences: int, free: int, **memory: Any
) -> int:
    """The largest divisor of `sequences`, those of a step on one device, that fits into `free` bytes.

    `memory` are further arguments of `step_memory`. Raises InputError when not even one sequence fits.
    """
    sizes = [size for size in range(1, sequences + 1) if sequences % size == 0]

    def needed(size: int) -> int:
        return step_memory(config, path, batch_size=size, max_length=max_length, **memory).peak

    fitting = bisect.bisect_right(sizes, USABLE * free, key=needed)
    if fitting:
        return sizes[fitting - 1]
    raise InputError(
        f"one sequence of {max_length} tokens needs about {needed(1) / 1e9:.1f} GB,"
        f" {free / 1e9:.1f} GB are free: take a smaller model, a shorter data.max_length, or"
        " trainer.recompute_activations=true"
    )


def accumulation(*, global_batch: int, batch_size: int, world_size: int) -> int:
    """Batches of each device in an optimizer step. Raises InputError where they do not add up exactly."""
    at_once = batch_size * world_size
    if global_batch < 1 or global_batch % at_once:
        devices = f" on {world_size} devices" if world_size > 1 else ""
        raise InputError(
            f"data.global_batch_size={global_batch} must be a multiple of data.batch_size={batch_size}"
            f"{devices} ({at_once} sequences at a time): change one of them, or give data.batch_size=auto"
        )
    return global_batch // at_once


# --- what is free, and what was used --------------------------------------------------------------------


def free_memory(device_type: str) -> int:
    """Free bytes on the device, or for this container. Raises InputError for a device that does not tell."""
    if device_type == "cuda":
        return torch.cuda.mem_get_info()[0]
    if device_type == "cpu":
        available, allowed = psutil.virtual_memory().available, container_free_bytes()
        return available if allowed is None else min(available, allowed)
    raise InputError(f"data.batch_size=auto: {device_type} does not tell its free memory, give a number")


def whole_memory(device_type: str) -> int | None:
    """Bytes of the smallest device that is visible; None: not a GPU with a memory of its own."""
    if device_type != "cuda" or not torch.cuda.is_available():
        return None
    count = torch.cuda.device_count()
    return min(torch.cuda.get_device_properties(number).total_memory for number in range(count))


GROUPS, OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def control_group_limits(name: str, root: Path = GROUPS, own: Path = OWN_GROUP) -> dict[Path, str]:
    """The folders of the process's Linux control groups that limit it by a file `name`, with its text.

    Version 2, cgroups(7). `root` is where the groups are mounted, `own` names the process's group below it.
    """
    lines = own.read_text().splitlines() if own.exists() else []
    names = [line.removeprefix("0::/") for line in lines if line.startswith("0::/")]
    if not names:
        return {}
    group = root / names[0]
    folders = (group, *(above for above in group.parents if above.is_relative_to(root)))
    # The outermost group has no such file.
    found = {folder: (folder / name).read_text().strip() for folder in folders if (folder / name).exists()}
    return {folder: text for folder, text in found.items() if not text.startswith("max")}


def container_free_bytes(root: Path = GROUPS, own: Path = OWN_GROUP) -> int | None:
    """Bytes left by the tightest limit of the process's control groups; see `control_group_limits`.

    Files that the kernel caches, and would drop, count as free. None: there is no limit, or no version 2.
    """
    limits = []
    for folder, limit in control_group_limits("memory.max", root, own).items():
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        used = int((folder / "memory.current").read_text()) - int(statistics.get("inactive_file", 0))
        limits.append(max(0, int(limit) - used))
    return min(limits, default=None)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak bytes: of a CUDA device those allocated since `forget_peak`, else those of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():
        # The peak of `getrusage` begins with the size of the process that started this one.
        return int(status.read_text(encoding="utf-8").split("VmHWM:")[1].split()[0]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak(device: torch.device) -> None:
    """Reset the peak, which is possible on CUDA devices."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


# --- arithmetic: for model FLOPs utilisation (MFU) ------------------------------------------------------

PEAKS = {
    # Dense bf16 (fp16 where there is no bf16) tensor FLOP/s from NVIDIA's data sheets, without sparsity. The
    # first name that is part of torch's name of the device counts. (Lightning's table lacks half of these.)
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}


def training_flops_per_token(config: GPTConfig, max_length: int) -> int:
    """Floating-point operations of forward and backward pass for one token in a sequence of `max_length`.

    6 N + 12 L T D: two for each multiplication and addition, once forward and twice backward, for the N
    weights of all matrices that multiply (the head counts, tied or not, the embedding tables do not) and for
    attention's two products (Chowdhery et al. 2022, "PaLM", appendix B). As there, attention counts in full,
    although half of its scores are masked.
    """
    D = config.emb_dim
    weights = config.n_layers * config.block_matrices + config.vocab_size * D
    return 6 * weights + 12 * config.n_layers * max_length * D


def counted_flops_per_token(config: GPTConfig, max_length: int, prepare: Prepare) -> int:
    """`training_flops_per_token` where only a part is trained: counted by torch for one block and for two."""

    def counted(of_few: GPTConfig) -> int:
        with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            net = prepare(GPTModel(of_few))
            tokens = torch.zeros(1, max_length, dtype=torch.int64)
            lengths = (torch.full((1,), max_length),) if isinstance(net, GPTClassifier) else ()
            net(tokens, *lengths).sum().backward()
        return counter.get_total_flops()

    return of_any_depth(config, counted) // max_length


def peak_flops(device: torch.device, dtype: torch.dtype, config: object) -> float | None:
    """The most FLOP/s that the device can do; None where it is not known.

    For a CUDA device by its name. For a CPU it is measured, in 0.1 s, on the product of a feed-forward
    network as wide as the `config`'s `emb_dim`, or as GPT-2 small's.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((peak for part, peak in PEAKS.items() if part in name), None)
    if device.type == "cpu":
        D = getattr(config, "emb_dim", 768)
        return matrix_product_flops(2048, EXPANSION * D, D, dtype)
    return None


def matrix_product_flops(rows: int, outputs: int, inputs: int, dtype: torch.dtype, repeats: int = 5) -> float:
    """Measured FLOP/s of (rows, inputs) @ (inputs, outputs) on the CPU: the median, after a warm-up."""
    x, weight = torch.ones(rows, inputs, dtype=dtype), torch.ones(outputs, inputs, dtype=dtype)
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        torch.mm(x, weight.t())
        seconds.append(time.perf_counter() - started)
    return 2 * rows * outputs * inputs / statistics.median(seconds[1:])
