"""What a task adds to the training that all tasks share: its batches, its loss, its metrics."""

# B batch, T time

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor

from gptpl.data.training_data import TrainingData
from gptpl.errors import InputError
from gptpl.text import nearest

Sums = dict[str, Tensor]
"""Totals of evaluation batches by name, of any shapes: they are added up over batches and ranks."""
Better = Literal["min", "max"]
"""Whether lower or higher values of a metric are better."""
EVALUATED = ("train", "val")
"""The splits of the evaluation loaders, in order, of data without `TrainingData.evaluated`."""


class Task(ABC):
    """What `gptpl.training.module.TrainingModule` needs from the class of a task."""

    task: ClassVar[str]
    """Its name in conf/task."""
    data_class: ClassVar[type[TrainingData]]
    """The kind of data it trains on."""

    padded: bool = False
    """Whether its batches are padded, so that the ranks' batches hold different numbers of tokens."""
    loss_unit: ClassVar[str] = "nats per token"
    """The unit of its losses."""
    metrics: ClassVar[Mapping[str, "Better"]] = {"val/loss": "min", "eval/train_loss": "min"}
    """The metrics of an evaluation that may be monitored, with the better direction."""
    use: ClassVar[tuple[str, str]]
    """The command that uses its models, with an example argument."""

    @classmethod
    def default_tune(cls, *, pretrained: bool) -> str:
        """The choice of conf/tune where the user made none; `pretrained`: the weights are not random."""
        return "all"

    @abstractmethod
    def batch_loss(self, batch: Any) -> Tensor:
        """Mean loss of one micro-batch, a differentiable float32 scalar."""

    def loss_weight(self, batch: Any) -> Tensor | None:
        """The number of things that `batch_loss` is the mean of, such as targets, as an integer scalar.

        It weights the micro-batches and ranks of a step; None: they count alike.
        """
        return None

    @abstractmethod
    def inputs_of(self, batch: Any) -> Tensor:
        """The tokens (B, T) that the model reads."""

    def tokens_in(self, batch: Any) -> int:
        """Tokens of a batch, without padding."""
        return self.inputs_of(batch).numel()

    def step_metrics(self, loss: Tensor) -> dict[str, Tensor]:
        """Further metrics of a step, given its mean loss over micro-batches and ranks."""
        return {}

    @abstractmethod
    def evaluation_sums(self, batch: Any) -> Sums:
        """Totals of one evaluation batch, in float64 where the device has it."""

    @abstractmethod
    def evaluation_metrics(self, sums: Mapping[str, Sums]) -> dict[str, float]:
        """The metrics of an evaluation from the totals of each split: `eval/train_loss`, `val/loss`, ...

        Of data with loaders `val/NAME`, "val" has the totals of all of them.
        """

    @property
    @abstractmethod
    def guessing_loss(self) -> float:
        """Loss of a model that finds all answers equally likely, in nats."""

    def flops_per_token(self, T: int) -> int | None:
        """FLOPs of training on one token in a sequence of T; None: not known for this training."""
        return None

    def task_state(self) -> dict[str, Any]:
        """Plain data for checkpoints: the task's name, and what using the model needs."""
        return {"name": self.task}


def known_metrics(module: object, callbacks: Iterable[object] = ()) -> dict[str, Better]:
    """The metrics that may be monitored, with their direction: `metrics` of the module and the callbacks."""
    return {name: way for part in (module, *callbacks) for name, way in getattr(part, "metrics", {}).items()}


def better(monitor: str, known: Mapping[str, Better]) -> Better:
    """The better direction of a metric. Raises InputError, naming the most similar, for an unknown one."""
    if monitor in known:
        return known[monitor]
    meant = nearest(monitor, known, likeness=0.7) or ":"
    offer = f"choose one of {', '.join(known)}, or set" if known else "set"
    raise InputError(
        f"monitor={monitor} is not a metric that the task or a callback declares{meant} {offer} mode for a"
        " metric of your own"
    )
