"""LoRA: linear layers that learn by adding a product of two small matrices to their own, which is frozen.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
"""

# I inputs, O outputs, R rank

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptpl.errors import InputError
from gptpl.model.gpt import GPTBackbone


class LowRankLinear(nn.Linear):
    """A linear layer W x + b that learns as W x + b + (alpha / R) B A dropout(x).

    It takes over a layer's `weight` (O, I) and `bias`, under the same names, whether they train or not.
    `lora_A` (R, I) is drawn as torch draws a linear layer's weight, `lora_B` (O, R) is zero: at first the
    layer computes what it did before. A good learning rate hardly depends on R, the `rank`. `dropout` is the
    probability of dropping an input of A in training.
    """

    def __init__(self, layer: nn.Linear, *, rank: int, alpha: float, dropout: float) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.scale = alpha / rank
        self.drop_inputs = nn.Dropout(dropout)
        self.lora_A = nn.Parameter(layer.weight.new_empty(rank, layer.in_features))
        self.lora_B = nn.Parameter(layer.weight.new_zeros(layer.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        return super().forward(x) + F.linear(self._narrow(x), self.lora_B)

    def one_product(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs (..., I + R) and a weight (O, I + R) whose product is `forward(x)`, without the bias."""
        return torch.cat([x, self._narrow(x)], dim=-1), torch.cat([self.weight, self.lora_B], dim=1)

    def merged(self) -> nn.Linear:
        """A plain layer that computes the same without dropout, with a new weight and this layer's bias."""
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        weight = _sum(self.weight.detach(), self.lora_A.detach(), self.lora_B.detach(), self.scale)
        layer.weight = nn.Parameter(weight.to(self.weight.dtype), requires_grad=self.weight.requires_grad)
        layer.bias = self.bias
        return layer.train(self.training)

    def _narrow(self, x: Tensor) -> Tensor:
        return self.scale * F.linear(self.drop_inputs(x), self.lora_A)  # (..., R)

    def extra_repr(self) -> str:
        """What torch prints, and the rank."""
        return f"{super().extra_repr()}, rank={self.lora_A.shape[0]}, scale={self.scale:g}"


def is_tied(net: GPTBackbone) -> bool:
    """Whether the head is the token embedding's matrix."""
    return net.out_head.weight is net.tok_emb.weight


def add_low_rank(
    net: GPTBackbone, *, rank: int, alpha: float, dropout: float, targets: Sequence[str]
) -> None:
    """Turn the named layers of every block (and the head, if named) into `LowRankLinear`, in place.

    Each A is drawn from torch's global generator in the order of the model. Existing parameters keep their
    names and still train. Raises InputError for a setting out of its range and an unknown target.
    """
    layers = {name: layer for name, layer in net.named_modules() if isinstance(layer, nn.Linear)}
    names = dict.fromkeys(name.rpartition(".")[2] for name in layers)
    if not targets or (unknown := set(targets) - set(names)):
        got = f"got {', '.join(sorted(unknown))}" if targets else "got none"
        raise InputError(f"tune.targets must name some of the layers {', '.join(names)}, {got}")
    if "out_head" in targets and is_tied(net):
        raise InputError(
            "tune.targets has out_head, which is tied to the token embedding: omit it, or set"
            " model.tie_weights=false"
        )
    most = min(net.config.emb_dim, net.out_head.out_features if "out_head" in targets else net.config.emb_dim)
    if not 1 <= rank <= most:
        raise InputError(f"tune.rank must be from 1 to {most}, got {rank}")
    if not (alpha > 0 and math.isfinite(alpha)):
        raise InputError(f"tune.alpha must be positive, such as twice tune.rank, got {alpha}")
    if not 0 <= dropout < 1:
        raise InputError(f"tune.dropout must be at least 0 and below 1, got {dropout}")
    for name, layer in layers.items():
        if name.rpartition(".")[2] in targets:
            assert not isinstance(layer, LowRankLinear), f"{name} has low-rank matrices already"
            net.set_submodule(name, LowRankLinear(layer, rank=rank, alpha=alpha, dropout=dropout))


def merged_weights(weights: Mapping[str, Tensor], *, scale: float) -> dict[str, Tensor]:
    """The state dict of a model without low-rank layers that computes the same as that of `weights`.

    `scale` is alpha / R. The merged weights are in fp32, whatever type they had: nothing is rounded.
    """
    merged = {name: tensor for name, tensor in weights.items() if not is_low_rank(name)}
    for layer in low_rank_layers(weights):
        A, B = weights[f"{layer}.lora_A"], weights[f"{layer}.lora_B"]
        merged[f"{layer}.weight"] = _sum(weights[f"{layer}.weight"], A, B, scale)
    return merged


def low_rank_layers(weights: Mapping[str, Tensor]) -> Iterator[str]:
    """The names of the layers in a state dict that have low-rank matrices, in its order."""
    return (name.removesuffix(".lora_A") for name in weights if name.endswith(".lora_A"))


def is_low_rank(name: str) -> bool:
    """Whether a parameter of this name is one of a layer's two small matrices."""
    return name.endswith((".lora_A", ".lora_B"))


def _sum(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """W + scale B A in fp32."""
    product = B.float() @ A.float()  # (O, I)
    return product.mul_(scale).add_(weight.float())
