"""What a task is to the training that all tasks share: its batches, its loss, its metrics."""

# B batch, T time

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from gptpl.data.training_data import TrainingData

Sums = dict[str, Tensor]
"""Totals of evaluation batches, by name: to be added up over batches and ranks, any shapes."""
EVALUATED = ("train", "val")
"""The splits of the two evaluation loaders, in the order in which the data give them."""


class Task(ABC):
    """What `gptpl.training.training_module.TrainingModule` asks of the class of a task."""

    task: ClassVar[str]
    """The choice of conf/task."""
    data_class: ClassVar[type[TrainingData]]
    """The kind of data it trains on."""

    padded: ClassVar[bool] = False
    """Whether its batches are padded: those of the ranks then hold different numbers of tokens."""
    loss_unit: ClassVar[str] = "nats per token"
    """What its losses are in."""

    @abstractmethod
    def batch_loss(self, batch: Any) -> Tensor:
        """Mean loss of one micro-batch, a float32 scalar that can be differentiated."""

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
