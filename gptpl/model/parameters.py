"""The parameters of a model: how many there are, before any memory is spent, and which of them train."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import nn

from gptpl.errors import InputError
from gptpl.model.classifier import ClassifierConfig, GPTClassifier
from gptpl.model.gpt import GPTBackbone, GPTConfig, GPTModel
from gptpl.model.lora import add_low_rank, is_low_rank, is_tied
from gptpl.model.protocol import class_path
from gptpl.settings import NEXT_STEP

_PARTS = {
    "tok_emb": "token embedding",
    "pos_emb": "position embedding",
    "attn": "attention",
    "ff": "feed-forward",
    "norm1": "norms",
    "norm2": "norms",
    "final_norm": "norms",
    "out_head": "head",
}
"""The part of the model that a module belongs to, by its name."""


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Parameters of a model: the total, with the head tied to the embedding, and with a head of its own.

    `fp32_bytes` are those of the total; gradients and optimizer state come on top. `parts` is the total by
    part of the model, in the order of the data; a tied head has none.
    """

    total: int
    tied: int
    untied: int
    fp32_bytes: int
    parts: Mapping[str, int]


def parameters_of(net: nn.Module) -> int:
    """The number of a model's parameters, in all its shards together, without low-rank matrices."""
    return sum(parameter.numel() for name, parameter in net.named_parameters() if not is_low_rank(name))


def count_parameters(config: GPTConfig, classifier: ClassifierConfig | None = None) -> ParameterCount:
    """Count the parameters of `GPTModel(config)`, or of a classifier, without allocating them.

    A classifier's head is its own: it counts in `total`, `tied` and `untied`.
    """
    with torch.device("meta"):
        model = GPTModel(config) if classifier is None else GPTClassifier(config, classifier)
    parts = dict.fromkeys(_PARTS.values(), 0)
    for name, parameter in model.named_parameters():  # lists a tied weight once, as the embedding's
        module = name.split(".")[2] if name.startswith("blocks.") else name.split(".")[0]
        parts[_PARTS[module]] += parameter.numel()
    total, head = sum(parts.values()), model.out_head.weight.numel()
    if classifier is not None:
        return ParameterCount(total=total, tied=total, untied=total, fp32_bytes=4 * total, parts=parts)
    tied = total - parts["head"]
    return ParameterCount(total=total, tied=tied, untied=tied + head, fp32_bytes=4 * total, parts=parts)


def empty_model(
    config: GPTConfig, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> GPTModel:
    """A `GPTModel` with uninitialised parameters, to be filled: nothing is drawn. Tied as configured."""
    with torch.device("meta"):
        net = GPTModel(config)
    net = net.to(dtype).to_empty(device=device)
    assert not list(net.buffers()), "a buffer that no state dict holds would stay uninitialised"
    if config.tie_weights:  # `to_empty` makes two tensors of the shared one
        net.out_head.weight = net.tok_emb.weight
    return net


# --- which of them train --------------------------------------------------------------------------------

ALL: Mapping[str, Any] = {"name": "all"}
"""The `state()` of a training of all parameters, and of checkpoints without one."""


class Tuning(ABC):
    """Freezes or adds parameters before the optimizer is built, which gets only those that train.

    A frozen parameter has `requires_grad` False: no gradient, no update, no weight decay.
    """

    name: ClassVar[str]
    """The choice of conf/tune."""

    @abstractmethod
    def apply(self, net: nn.Module) -> None:
        """Prepare the model, in place. Raises InputError for a model that cannot be trained this way."""

    @abstractmethod
    def parts(self, net: nn.Module) -> str:
        """What trains, in words."""

    def state(self) -> dict[str, Any]:
        """Plain data for checkpoints, needed to interpret their weights."""
        return {"name": self.name}

    def report(self, net: nn.Module) -> str:
        """A line that says what trains and how much that is; after `apply`."""
        trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
        total = sum(p.numel() for p in net.parameters())
        how_many = f"{trained:,} of {total:,} parameters train ({trained / total:.1%})"
        return f"tune: {self.name} ({self.parts(net)}), {how_many}"


@dataclass(frozen=True, kw_only=True)
class TuneAll(Tuning):
    """Every parameter trains."""

    name = "all"

    def apply(self, net: nn.Module) -> None:
        """Leave the model as it is."""

    def parts(self, net: nn.Module) -> str:
        """See `Tuning`."""
        return "every parameter"


@dataclass(frozen=True, kw_only=True)
class TuneHead(Tuning):
    """The head alone trains: the fastest, as only the last product is differentiated."""

    name = "head"

    def apply(self, net: nn.Module) -> None:
        """Refuse a head that is tied to the token embedding."""
        net = _gpt2(net, self.name)
        if is_tied(net):
            raise InputError(
                "tune=head would train the token embedding, which the head is tied to: give tune=last_block"
                " or tune=lora, or a model with model.tie_weights=false"
            )
        net.requires_grad_(False)
        net.out_head.requires_grad_(True)

    def parts(self, net: nn.Module) -> str:
        """See `Tuning`."""
        return "the head"


@dataclass(frozen=True, kw_only=True)
class TuneLastBlock(Tuning):
    """The head, the last block and the final norm train, as in the book's classifier."""

    name = "last_block"

    def apply(self, net: nn.Module) -> None:
        """Freeze a head that is tied to the token embedding with it."""
        net = _gpt2(net, self.name)
        net.requires_grad_(False)
        for layer in (net.blocks[-1], net.final_norm, *([] if is_tied(net) else [net.out_head])):
            layer.requires_grad_(True)

    def parts(self, net: nn.Module) -> str:
        """See `Tuning`."""
        if is_tied(_gpt2(net, self.name)):
            return "the last block and the final norm; not the head, which is tied to the token embedding"
        return "the head, the last block and the final norm"


@dataclass(frozen=True, kw_only=True)
class TuneLowRank(Tuning):
    """Low-rank matrices next to frozen layers train (LoRA, see `gptpl.model.lora`), and a classifier's head.

    Their product is scaled by alpha / rank; a rank of 4 to 64 is usual. `dropout` is the probability of
    dropping the matrices' inputs in training.
    """

    name = "lora"
    rank: int = 8
    alpha: float = 16.0
    dropout: Annotated[float, NEXT_STEP] = 0.0
    targets: Sequence[str] = ("qkv", "out_proj", "up_proj", "down_proj")

    def apply(self, net: nn.Module) -> None:
        """Add the matrices to the layers of the target names."""
        net, classifier = _gpt2(net, self.name), isinstance(net, GPTClassifier)
        if classifier and "out_head" in self.targets:
            raise InputError("tune.targets has out_head, a classifier's head, which trains whole: omit it")
        before = list(net.parameters())
        add_low_rank(net, rank=self.rank, alpha=self.alpha, dropout=self.dropout, targets=self.targets)
        for parameter in before:
            parameter.requires_grad_(False)
        if classifier:
            net.out_head.requires_grad_(True)

    def parts(self, net: nn.Module) -> str:
        """See `Tuning`."""
        head = " and the new head" if isinstance(net, GPTClassifier) else ""
        return f"matrices of rank {self.rank} next to {', '.join(self.targets)}{head}"

    def state(self) -> dict[str, Any]:
        """The name and the settings."""
        return {"name": self.name} | asdict(self) | {"targets": list(self.targets)}


def low_rank_scale(state: Mapping[str, Any]) -> float | None:
    """The factor of a checkpoint's low-rank matrices, from its `state()`; None: it has none."""
    return float(state["alpha"]) / int(state["rank"]) if state["name"] == TuneLowRank.name else None


def _gpt2(net: nn.Module, name: str) -> GPTBackbone:
    if isinstance(net, GPTBackbone):
        return net
    raise InputError(f"tune={name} needs gptpl's GPTModel, this model is a {class_path(net)}: use tune=all")
