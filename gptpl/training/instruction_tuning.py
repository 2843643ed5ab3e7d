"""The LightningModule of instruction tuning: next tokens of prompts and answers."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from gptpl.data.instructions.datamodule import InstructionDataModule
from gptpl.data.instructions.records import PromptTemplate
from gptpl.model.loss import IGNORED_TARGET, evaluation_loss, summed_scores, training_loss
from gptpl.training.language_model import LanguageModelingModule
from gptpl.training.task import Better, Sums, Task


class InstructionModule(LanguageModelingModule):
    """Trains a language model to answer instructions.

    Its batches are `gptpl.data.packing.PackedBatch`. Targets of -100 are ignored; all other
    targets of a step count alike, in whatever micro-batch and rank. It also logs `val/token_accuracy`, the
    fraction of validation targets that are the model's most likely token. Every checkpoint keeps the
    `template`, so that the model can be used without it.
    """

    task = "instruct"
    padded = True
    data_class = InstructionDataModule
    metrics: ClassVar[Mapping[str, Better]] = {
        **Task.metrics,
        "val/perplexity": "min",
        "val/token_accuracy": "max",
    }
    use = ("respond", "instruction='Name a synonym of happy.'")

    def __init__(self, net: nn.Module, *, template: PromptTemplate, **settings: Any) -> None:
        super().__init__(net, **settings)
        self.template = template

    def batch_loss(self, batch: Any) -> Tensor:
        """Mean cross-entropy of the targets of the batch."""
        return training_loss(
            self.net, batch.inputs, batch.targets, head=self.head, segments=batch.segments,
            compiled=self.compiled,
        )  # fmt: skip

    def loss_weight(self, batch: Any) -> Tensor:
        """The number of targets."""
        return (batch.targets != IGNORED_TARGET).sum()

    def tokens_in(self, batch: Any) -> int:
        """See `Task`."""
        return int(batch.tokens)

    def evaluation_sums(self, batch: Any) -> Sums:
        """Sum of the losses, number of targets, number of targets that are the most likely token."""
        sums = evaluation_loss(self.net, batch.inputs, batch.targets, batch.segments, summed_scores)
        return {"loss": sums}

    def evaluation_metrics(self, sums: Mapping[str, Sums]) -> dict[str, float]:
        """Means over all targets, and the fraction of right tokens."""
        metrics = super().evaluation_metrics(sums)
        if "val" in sums:
            _, count, correct = sums["val"]["loss"].tolist()
            metrics["val/token_accuracy"] = correct / count
        return metrics

    def task_state(self) -> dict[str, Any]:
        """The task's name and the template."""
        return {"name": self.task, "template": self.template.state()}
