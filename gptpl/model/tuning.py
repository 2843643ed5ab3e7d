"""What of a model trains: all of it, its head, its last block, or low-rank matrices beside frozen ones."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar

from torch import nn

from gptpl.errors import InputError
from gptpl.model import GPTBackbone, GPTClassifier
from gptpl.model.lora import add_low_rank
from gptpl.model.protocol import class_path
from gptpl.resuming import NEXT_STEP

ALL: Mapping[str, Any] = {"name": "all"}
"""The `state()` of a training of all weights, and of checkpoints that say nothing of it."""


class Tuning(ABC):
    """Freezes parameters, or adds some, before the optimizer is made: it gets only those that train.

    A parameter that is frozen has `requires_grad` False: it gets no gradient and no update, and weight decay
    does not reach it.
    """

    name: ClassVar[str]
    """The choice of conf/tune."""

    @abstractmethod
    def apply(self, net: nn.Module) -> None:
        """Sets the model up, in place. Raises InputError for a model that cannot be trained so."""

    @abstractmethod
    def parts(self, net: nn.Module) -> str:
        """What of the model trains, in words."""

    def state(self) -> dict[str, Any]:
        """Plain data for checkpoints, from which their weights are understood."""
        return {"name": self.name}

    def report(self, net: nn.Module) -> str:
        """A line that says what trains, and how much that is; after `apply`."""
        trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
        total = sum(p.numel() for p in net.parameters())
        return (
            f"tune: {self.name} ({self.parts(net)}), {trained:,} of {total:,} parameters train"
            f" ({trained / total:.1%})"
        )


@dataclass(frozen=True, kw_only=True)
class TuneAll(Tuning):
    """Every parameter trains."""

    name = "all"

    def apply(self, net: nn.Module) -> None:
        """Leaves the model as it is."""

    def parts(self, net: nn.Module) -> str:
        """See `Tuning`."""
        return "every parameter"


@dataclass(frozen=True, kw_only=True)
class TuneHead(Tuning):
    """The head alone: the fastest, as nothing is differentiated but the last product."""

    name = "head"

    def apply(self, net: nn.Module) -> None:
        """Refuses a head that is tied to the token embedding."""
        net = _gpt2(net, self.name)
        if _is_tied(net):
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
    """The head, the last block and the final LayerNorm, as the book's classifier."""

    name = "last_block"

    def apply(self, net: nn.Module) -> None:
        """Leaves a head that is tied to the token embedding frozen with it."""
        net = _gpt2(net, self.name)
        net.requires_grad_(False)
        for layer in (net.blocks[-1], net.final_norm, *([] if _is_tied(net) else [net.out_head])):
            layer.requires_grad_(True)

    def parts(self, net: nn.Module) -> str:
        """See `Tuning`."""
        if _is_tied(_gpt2(net, self.name)):
            return (
                "the last block and the final LayerNorm; not the head, which is tied to the token embedding"
            )
        return "the head, the last block and the final LayerNorm"


@dataclass(frozen=True, kw_only=True)
class TuneLowRank(Tuning):
    """Low-rank matrices beside frozen layers (LoRA, see `gptpl.model.lora`), and a classifier's new head.

    Their product is scaled by alpha / rank; a rank of 4 to 64 is usual. `dropout` is the share of the layers'
    inputs that the matrices do not see in training.
    """

    name = "lora"
    rank: int = 8
    alpha: float = 16.0
    dropout: Annotated[float, NEXT_STEP] = 0.0
    targets: Sequence[str] = ("qkv", "out_proj", "up_proj", "down_proj")

    def apply(self, net: nn.Module) -> None:
        """Adds the matrices to the layers of the target names."""
        net, classifier = _gpt2(net, self.name), isinstance(net, GPTClassifier)
        if classifier and "out_head" in self.targets:
            raise InputError(
                "tune.targets has out_head, a classifier's new head, all of which trains: leave it out"
            )
        before = list(net.parameters())
        add_low_rank(net, rank=self.rank, alpha=self.alpha, dropout=self.dropout, targets=self.targets)
        for parameter in before:
            parameter.requires_grad_(False)
        if classifier:
            net.out_head.requires_grad_(True)

    def parts(self, net: nn.Module) -> str:
        """See `Tuning`."""
        head = " and the whole head, which is new" if isinstance(net, GPTClassifier) else ""
        return f"matrices of rank {self.rank} beside {', '.join(self.targets)}{head}"

    def state(self) -> dict[str, Any]:
        """The settings, too."""
        return {"name": self.name} | asdict(self) | {"targets": list(self.targets)}


def low_rank_scale(state: Mapping[str, Any]) -> float | None:
    """By what the low-rank matrices of a checkpoint are scaled, from its `state()`; None: it has none."""
    return float(state["alpha"]) / int(state["rank"]) if state["name"] == TuneLowRank.name else None


def _gpt2(net: nn.Module, name: str) -> GPTBackbone:
    """The model, whose parts are known by their names. Raises InputError for one of another kind."""
    if isinstance(net, GPTBackbone):
        return net
    raise InputError(
        f"tune={name} needs the layers of gptpl's GPT-2, this model is a {class_path(net)}: use tune=all"
    )


def _is_tied(net: GPTBackbone) -> bool:
    return net.out_head.weight is net.tok_emb.weight
