"""The LightningModule of classification: one label for each text."""

# B batch, T time, C classes, K bins of confidence

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptpl.checkpoints.loading import classifier_task
from gptpl.data.classification.datamodule import LabelledBatch, LabelledDataModule
from gptpl.errors import InputError
from gptpl.evaluation.classifier import Numbers, Scores, classification_sums, scores
from gptpl.model import ClassifierConfig, GPTBackbone, GPTClassifier
from gptpl.model.classifier import Pooling
from gptpl.model.loss import IGNORED_TARGET
from gptpl.model.protocol import class_path
from gptpl.training.module import TrainingModule
from gptpl.training.task import Better, Sums, Task


class ClassificationModule(TrainingModule):
    """Trains a `GPTClassifier` on batches of `LabelledBatch`; its head is drawn when the module is made.

    The loss is the mean cross-entropy of the texts' classes, weighted by `class_weights`, if given: in
    training and in evaluation, so that the two can be compared. Every evaluation also logs accuracy
    (`eval/train_accuracy`, `val/accuracy`), the mean F1 of the classes (`val/f1`), each class's F1
    (`val/f1_<label>`; nan for a class that neither occurs nor is predicted), and `val/calibration_error`.

    Args:
        net: a GPT-2, of which all layers but the head are used.
        max_length: tokens read from a text.
        padded_to: tokens that every text is padded to; None: as its batch needs.
        pooling, head_bias: see `ClassifierConfig`.
        run: arguments of `TrainingModule`.

    Raises InputError for "last_position" without `padded_to`.
    """

    task = "classify"
    padded = True
    data_class = LabelledDataModule
    loss_unit = "nats per text"
    metrics: ClassVar[Mapping[str, Better]] = {
        **Task.metrics,
        "val/accuracy": "max",
        "val/f1": "max",
        "val/calibration_error": "min",
        "eval/train_accuracy": "max",
    }
    use = ("classify", "text='See you at six'")
    net: GPTClassifier

    def __init__(
        self,
        net: nn.Module,
        *,
        labels: Sequence[str],
        class_weights: Sequence[float] | None = None,
        max_length: int,
        padded_to: int | None = None,
        pooling: Pooling = "last_token",
        head_bias: bool = True,
        **run: Any,
    ) -> None:
        classifier = ClassifierConfig(n_classes=len(labels), pooling=pooling, head_bias=head_bias)
        if pooling == "last_position" and padded_to is None:
            raise InputError(
                "task.pooling=last_position reads the padding, whose length must not depend on the batch: set"
                " data.padding=longest"
            )
        if not isinstance(net, GPTBackbone):
            raise InputError(
                f"task=classify puts its head on gptpl's GPT-2, this model is a {class_path(net)}:"
                " use a model of conf/model, or a task of your own"
            )
        super().__init__(GPTClassifier.on(net, classifier), **run)
        self.labels = tuple(labels)
        self.max_length = max_length
        self.padded_to = padded_to
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", weights, persistent=False)
        self.evaluated: dict[str, dict[str, Numbers]] = {}
        """Totals of the last evaluation by split: `confusion` (C, C), `calibration` (3, K)."""

    @classmethod
    def default_tune(cls, *, pretrained: bool) -> str:
        """Random weights that stay as they are say nothing about a text."""
        return "last_block" if pretrained else "all"

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Logits (B, C) of tokens (B, T), lengths (B,)."""
        return self.net(tokens, lengths)

    def batch_loss(self, batch: LabelledBatch) -> Tensor:
        """Sum of the labels' weighted cross-entropies, divided by their number.

        torch's weighted mean divides by the sum of the weights: a batch of a single class would then count as
        if nothing were weighted, and a step would depend on how its texts are divided into micro-batches.
        """
        logits = self.net(batch.tokens, batch.lengths).float()  # (B, C)
        total = F.cross_entropy(
            logits, batch.labels, weight=self.class_weights, ignore_index=IGNORED_TARGET, reduction="sum"
        )
        return total / (batch.labels != IGNORED_TARGET).sum()

    def inputs_of(self, batch: LabelledBatch) -> Tensor:
        """See `Task`."""
        return batch.tokens

    def tokens_in(self, batch: LabelledBatch) -> int:
        """See `Task`."""
        return int(batch.lengths.sum())

    def evaluation_sums(self, batch: LabelledBatch) -> Sums:
        """Losses and their weights (2,), confusion (C, C), calibration (3, K)."""
        logits = self.net(batch.tokens, batch.lengths).float()
        return classification_sums(logits, batch.labels, self.class_weights)

    def evaluation_metrics(self, sums: Mapping[str, Sums]) -> dict[str, float]:
        """Losses, accuracies, and further scores of the validation texts."""
        metrics: dict[str, float] = {}
        self.evaluated = {
            split: {name: total.cpu().double().numpy() for name, total in of_split.items() if name != "loss"}
            for split, of_split in sums.items()
        }
        for split, group in (("train", "eval/train_"), ("val", "val/")):
            if split in sums:
                total, weight = sums[split]["loss"].tolist()
                metrics[f"{group}loss"] = total / weight
                found = scores(**self.evaluated[split])
                metrics |= named_scores(found, self.labels, group) if split == "val" else {}
                metrics[f"{group}accuracy"] = found.accuracy
        return metrics

    @property
    def guessing_loss(self) -> float:
        """The natural logarithm of C."""
        return math.log(len(self.labels))

    def task_state(self) -> dict[str, Any]:
        """What `gptpl classify` needs."""
        return classifier_task(self.net.classifier, self.labels, self.max_length, self.padded_to)


def named_scores(found: Scores, labels: Sequence[str], group: str) -> dict[str, float]:
    """Scores as metrics, their names beginning with `group`, such as "val/"."""
    return {
        f"{group}accuracy": found.accuracy,
        f"{group}f1": found.macro_f1,
        **{f"{group}f1_{label}": value for label, value in zip(labels, found.f1, strict=True)},
        f"{group}calibration_error": found.calibration_error,
    }
