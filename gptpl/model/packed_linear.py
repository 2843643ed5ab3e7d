"""Linear layers in the layout that a CPU multiplies fastest, for models that only compute."""

# M rows, I inputs, O outputs, P parts

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gptpl.model.low_rank import LowRankLinear

Linear = Callable[[Tensor], Tensor]

_OPERATIONS = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
# Of torch's own compiler, and not promised: where one is missing, layers stay as they are.

PARTS = 8
"""Into which a layer is split: as many cores can share its product."""


def packed(layer: nn.Module, *, rows: int) -> Linear:
    """The layer, (..., I) -> (..., O), with its weights rearranged for about `rows` rows at a time.

    On a CPU with oneDNN the weights are copied into its blocked layout: torch's own product of one fp32 row
    uses one core and, of a few rows, rearranges the weights at each call. GPT-2 small, two cores: one row in
    17 ms instead of 36, eight in 21 instead of 56 (experiments/generation_speed). Anything else than a plain
    `nn.Linear` on such a CPU is returned as it is, and is as right, only slower.

    The copy does not follow later changes of the weights, and has no gradients. A low-rank layer is merged
    first, on any device, so that nothing is dropped.
    """
    if isinstance(layer, LowRankLinear):
        layer = layer.merged()
    if type(layer) is not nn.Linear or not can_pack(layer.weight):
        return layer
    if rows == 1 and _splits(layer.weight):
        return _split(layer)
    weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows)
    bias = None if layer.bias is None else layer.bias.detach()
    multiply = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: multiply(x, weight, bias, "none", [], "")


def can_pack(weight: Tensor) -> bool:
    """Whether `packed` rearranges such weights here: fp32 or bf16, on a CPU, in a torch built with oneDNN."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if not all(hasattr(torch.ops.mkldnn, name) for name in _OPERATIONS):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def _splits(weight: Tensor) -> bool:
    outputs, inputs = weight.shape
    return weight.dtype == torch.float32 and outputs <= inputs and outputs % PARTS == 0


def _split(layer: nn.Linear) -> Linear:
    """The layer as a batch of products, which several cores share; its own weights, not a copy.

    For one row this is as fast as oneDNN's layout or faster where there are no more outputs than inputs.
    """
    outputs, inputs = layer.weight.shape
    parts = layer.weight.detach().view(PARTS, outputs // PARTS, inputs).transpose(1, 2)  # (P, I, O / P)
    bias = None if layer.bias is None else layer.bias.detach()

    def multiply(x: Tensor) -> Tensor:
        rows = x.reshape(1, -1, inputs).expand(PARTS, -1, -1)  # (P, M, I)
        y = torch.bmm(rows, parts).transpose(0, 1)  # (M, P, O / P)
        y = y.reshape(*x.shape[:-1], outputs)
        return y if bias is None else y + bias

    return multiply
