"""What a task is to the training that all tasks share: its batches, its loss, its metrics."""

# B batch, T time

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor

from gptpl.data.training_data import TrainingData
from gptpl.errors import InputError
from gptpl.text import nearest

Sums = dict[str, Tensor]
"""Totals of evaluation batches, by name: to be added up over batches and ranks, any shapes."""
Better = Literal["min", "max"]
"""Whether a metric is better low or high."""
EVALUATED = ("train", "val")
"""The splits of the two evaluation loaders, in the order in which the data give them."""


class Task(ABC):
    """What `gptpl.training.module.TrainingModule` asks of the class of a task."""

    task: ClassVar[str]
    """The choice of conf/task."""
    data_class: ClassVar[type[TrainingData]]
    """The kind of data it trains on."""

    padded: ClassVar[bool] = False
    """Whether its batches are padded: those of the ranks then hold different numbers of tokens."""
    loss_unit: ClassVar[str] = "nats per token"
    """What its losses are in."""
    metrics: ClassVar[Mapping[str, "Better"]] = {"val/loss": "min", "eval/train_loss": "min"}
    """What an evaluation logs that may be monitored, and which way is better."""
    use: ClassVar[tuple[str, str]]
    """The command that uses its models, and an argument as an example."""

    @classmethod
    def default_tune(cls, *, pretrained: bool) -> str:
        """The choice of conf/tune where none was made; `pretrained`: the weights are not random."""
        del pretrained
        return "all"

    @abstractmethod
    def batch_loss(self, batch: Any) -> Tensor:
        """Mean loss of one micro-batch, a float32 scalar that can be differentiated."""

    def loss_weight(self, batch: Any) -> Tensor | None:
        """What `batch_loss` is the mean over, such as the number of targets, as an integer scalar.

        The micro-batches and ranks of a step count by it; None: they count alike.
        """
        return None

    @abstractmethod
    def inputs_of(self, batch: Any) -> Tensor:
        """The tokens (B, T) that the model is given."""

    def tokens_in(self, batch: Any) -> int:
        """Tokens of a batch, without padding."""
        return self.inputs_of(batch).numel()

    def step_metrics(self, loss: Tensor) -> dict[str, Tensor]:
        """What is logged of a step beside its loss; `loss` is its mean over micro-batches and ranks."""
        return {}

    @abstractmethod
    def evaluation_sums(self, batch: Any) -> Sums:
        """Totals of one evaluation batch, in float64 where the device has it."""

    @abstractmethod
    def evaluation_metrics(self, sums: Mapping[str, Sums]) -> dict[str, float]:
        """The metrics of an evaluation from the totals of each split: `eval/train_loss`, `val/loss`, ..."""

    @property
    @abstractmethod
    def guessing_loss(self) -> float:
        """Loss of a model that finds every answer equally likely, in nats."""

    def flops_per_token(self, T: int) -> int | None:
        """Arithmetic of training on a token of a row of T; None: it is not known for this training."""
        return None

    def task_state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the task, as plain data: its name, and what using the model needs."""
        return {"name": self.task}


def known_metrics(module: object, callbacks: Iterable[object] = ()) -> dict[str, Better]:
    """The metrics that may be monitored, with their direction: `metrics` of the module and the callbacks."""
    known: dict[str, Better] = {}
    for part in (module, *callbacks):
        known |= getattr(part, "metrics", {})
    return known


def better(monitor: str, known: Mapping[str, Better]) -> Better:
    """Which way a metric is better. Raises InputError, naming those most like it, for one that is unknown."""
    if monitor in known:
        return known[monitor]
    meant = nearest(monitor, known, likeness=0.7) or ":"
    offer = f"choose one of {', '.join(known)}, or set" if known else "set"
    raise InputError(
        f"monitor={monitor} is no metric that the task or a callback declares{meant} {offer} mode for one"
        " of your own"
    )
