"""The LightningModule of instruction tuning: next tokens of prompts and answers."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gptpl.data.instructions.datamodule import InstructionDataModule
from gptpl.data.instructions.template import PromptTemplate
from gptpl.training.language_model import LanguageModelingModule
from gptpl.training.loss import evaluation_scores, perplexity, training_loss
from gptpl.training.task import Better, Sums


class InstructionModule(LanguageModelingModule):
    """Trains a language model to answer, on batches of `gptpl.data.instructions.rows.InstructionBatch`.

    Targets of -100 count nowhere. Within a batch every other target counts alike; the micro-batches and ranks
    of a step count alike, however many targets each has. Beside what pretraining logs: `val/token_accuracy`,
    the share of the validation targets that are the model's most likely token.

    Args:
        net: the model.
        template: the prompts', kept in every checkpoint, so that the model can be asked without it.
        settings: arguments of `TrainingModule`.
    """

    task = "instruct"
    padded = True
    data_class = InstructionDataModule
    metrics: ClassVar[Mapping[str, Better]] = {**LanguageModelingModule.metrics, "val/token_accuracy": "max"}
    use = ("respond", "instruction='Name a synonym of happy.'")

    def __init__(self, net: nn.Module, *, template: PromptTemplate, **settings: Any) -> None:
        super().__init__(net, **settings)
        self.template = template

    def batch_loss(self, batch: Any) -> Tensor:
        """Mean cross-entropy of the targets of the batch."""
        return training_loss(self.net, batch.inputs, batch.targets, head=self.head, segments=batch.segments)

    def tokens_in(self, batch: Any) -> int:
        """See `TrainingModule`."""
        return int(batch.tokens)

    def evaluation_sums(self, batch: Any) -> Sums:
        """Sum of the losses, number of targets, and how many of these are the most likely token."""
        scores = evaluation_scores(self.net, batch.inputs, batch.targets, batch.segments)
        return {"scores": torch.stack(scores)}

    def evaluation_metrics(self, sums: Mapping[str, Sums]) -> dict[str, float]:
        """Means over all targets."""
        metrics: dict[str, float] = {}
        if "train" in sums:
            total, count, _ = sums["train"]["scores"].tolist()
            metrics["eval/train_loss"] = total / count
        if "val" in sums:
            total, count, correct = sums["val"]["scores"].tolist()
            metrics["val/loss"] = total / count
            metrics["val/perplexity"] = perplexity(total / count)
            metrics["val/token_accuracy"] = correct / count
        return metrics

    def task_state(self) -> dict[str, Any]:
        """The template, beside the task's name."""
        return {"name": self.task, "template": self.template.state()}
