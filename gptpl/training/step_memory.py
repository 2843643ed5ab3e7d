"""What a training step keeps in memory, part by part, without taking that memory."""

# B windows in a batch, T time, D model, V vocabulary, N positions (B x T)

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from gptpl.model import GPTBackbone, GPTClassifier, GPTConfig, GPTModel
from gptpl.training.fast_path import FastPath
from gptpl.training.head_loss import MULTIPLE, PRODUCT_ROWS

Prepare = Callable[[GPTModel], GPTBackbone]
"""Makes what trains of a language model: gives it another head, freezes a part, adds low-rank matrices."""

_FP32_BYTES, _BF16_BYTES = 4, 2
_ADAMW_AVERAGES = 2
_RECOMPUTED_BLOCKS = 4
"""Blocks' activations that there is room for where they are made anew: one block's, and what its backward
pass needs for a while (measured, tests/training). Where all are kept, those no longer needed make room."""


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes of a training step by part.

    Attributes:
        weights: the parameters.
        gradients: of all parameters that train, at the end of the backward pass.
        optimizer: what it keeps from step to step.
        activations: what the blocks keep for the backward pass, at the end of the forward pass.
        head: logits with their gradient, and copies of the head's matrix.
        gradients_stay: whether gradients of earlier batches are there in the forward pass (accumulation).
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    gradients_stay: bool = False

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
    """Estimated bytes of a training step.

    What autograd keeps is counted on tensors that have shapes and no memory, for one block and for two; the
    others are like them.

    Args:
        config: the model's.
        path: its attention, head and recomputation decide what a step keeps.
        batch_size: B.
        max_length: T.
        low: whether products are bf16.
        optimizer_bytes: what the optimizer keeps, see `optimizer_state_bytes`; None: AdamW's two averages.
        weight_bytes: of one weight: 4, or 2 where the weights themselves are bf16.
        accumulates: whether an optimizer step has several batches.
        prepare: see `Prepare`; of the blocks it may treat the last one differently.
    """
    small = [replace(config, n_layers=n) for n in (1, 2)]
    one, two = (
        kept_bytes(
            of_few, path, batch_size=batch_size, max_length=max_length, low=low,
            weight_bytes=weight_bytes, prepare=prepare,
        )
        for of_few in small
    )  # fmt: skip
    block, rest = two - one, 2 * one - two
    kept = config.n_layers * block
    if path.recompute:
        inputs_of_blocks = config.n_layers * batch_size * max_length * config.emb_dim * weight_bytes
        kept = inputs_of_blocks + _RECOMPUTED_BLOCKS * block
    of_one, of_two = (_parameter_bytes(of_few, weight_bytes, prepare) for of_few in small)
    weights, trained = (a + (config.n_layers - 1) * (b - a) for a, b in zip(of_one, of_two, strict=True))
    rows, low_products = batch_size * max_length, low or weight_bytes == _BF16_BYTES
    return StepMemory(
        weights=weights,
        gradients=trained,
        optimizer=_ADAMW_AVERAGES * trained if optimizer_bytes is None else optimizer_bytes,
        activations=kept + rest,
        head=_head_bytes(config, path, prepare, rows=rows, low=low_products),
        gradients_stay=accumulates,
    )


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

    with FakeTensorMode():
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
    """Bytes that the optimizer keeps between steps: counted after a step on tensors without memory.

    Of a model with one block and of one with two; the other blocks are like them.
    """
    one, two = (
        _state_bytes(replace(config, n_layers=n), make_optimizer, weight_bytes, prepare) for n in (1, 2)
    )
    return one + (config.n_layers - 1) * (two - one)


def _state_bytes(
    config: GPTConfig,
    make_optimizer: Callable[[nn.Module], Optimizer],
    weight_bytes: int,
    prepare: Prepare,
) -> int:
    with FakeTensorMode():
        net = _model(config, weight_bytes, prepare)
        optimizer = make_optimizer(net)
        for parameter in net.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        optimizer.step()
        return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(optimizer.state_dict()))


def _parameter_bytes(config: GPTConfig, weight_bytes: int, prepare: Prepare) -> tuple[int, int]:
    """Of all parameters, and of those that train."""
    with torch.device("meta"):
        sizes = [(p.numel(), p.requires_grad) for p in prepare(GPTModel(config)).parameters()]
    trained = sum(size for size, trains in sizes if trains)
    return sum(size for size, _ in sizes) * weight_bytes, trained * weight_bytes


def _model(config: GPTConfig, weight_bytes: int, prepare: Prepare) -> GPTBackbone:
    """A model whose weights are made with so many bytes each: tensors without memory cannot be converted."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if weight_bytes == _BF16_BYTES else torch.float32)
    try:
        return prepare(GPTModel(config))
    finally:
        torch.set_default_dtype(before)


def _tensors(state: Any) -> Iterator[torch.Tensor]:
    """All tensors of nested dictionaries."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _tensors(value)
