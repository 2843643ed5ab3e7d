"""The LightningModule of pretraining: next-token prediction on plain text."""

# B batch, T time, V vocabulary

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gptpl.data.packing import PackedBatch
from gptpl.data.pretraining.datamodule import SequenceData
from gptpl.data.training_data import TrainingData
from gptpl.model import GPTModel
from gptpl.model.loss import (
    IGNORED_TARGET,
    bits_per_byte,
    bytes_of,
    evaluation_loss,
    perplexity,
    training_loss,
)
from gptpl.model.protocol import vocab_size
from gptpl.training.costs import training_flops_per_token
from gptpl.training.module import TrainingModule
from gptpl.training.task import Better, Sums, Task


class LanguageModelingModule(TrainingModule):
    """Trains a language model on sequences of tokens: batches of (inputs, targets), each (B, T) int64.

    Of `packed` documents it is a `PackedBatch`, and all targets of a step count alike, in whatever
    micro-batch and rank.

    The model is a `GPTModel`, or any module from tokens to logits, see `gptpl.model.protocol`. Targets of
    -100 are ignored. It also logs `train/perplexity` of a step and `val/perplexity` of an evaluation, and
    `val/bits_per_byte` where the tokenizer loses no byte of a text, by which tokenizers can be compared; of a
    mixture of sources `val/loss/NAME` of each.
    """

    task = "pretrain"
    data_class: ClassVar[type[TrainingData]] = SequenceData  # type: ignore[type-abstract]
    metrics: ClassVar[Mapping[str, Better]] = {
        **Task.metrics,
        "val/perplexity": "min",
        "val/bits_per_byte": "min",
    }
    use = ("generate", "prompt='Every effort moves you'")

    def __init__(self, net: nn.Module, *, packed: bool = False, **settings: Any) -> None:
        super().__init__(net, **settings)
        if packed:
            self.padded = True

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, V) of tokens (B, T)."""
        return self.net(tokens)

    def batch_loss(self, batch: Any) -> Tensor:
        """Mean cross-entropy of the next tokens."""
        return training_loss(
            self.net, batch[0], batch[1], head=self.head, segments=_segments(batch), compiled=self.compiled
        )

    def loss_weight(self, batch: Any) -> Tensor | None:
        """Of packed documents the number of targets."""
        return (batch[1] != IGNORED_TARGET).sum() if self.padded else None

    def tokens_in(self, batch: Any) -> int:
        """See `Task`."""
        return batch.tokens if isinstance(batch, PackedBatch) else super().tokens_in(batch)

    def inputs_of(self, batch: Any) -> Tensor:
        """See `Task`."""
        return batch[0]

    def step_metrics(self, loss: Tensor) -> dict[str, Tensor]:
        """The perplexity of the step."""
        return {"train/perplexity": loss.exp()}

    def evaluation_sums(self, batch: Any) -> Sums:
        """Sum of the losses and number of targets, and bytes of their text."""
        inputs, targets = batch[:2]
        sums = {"loss": evaluation_loss(self.net, inputs, targets, _segments(batch))}
        if self._token_bytes is not None:
            sums["bytes"] = bytes_of(targets, self._token_bytes)
        return sums

    @cached_property
    def _token_bytes(self) -> Tensor | None:
        lengths = self.tokenizer.token_bytes()
        return None if lengths is None else torch.from_numpy(lengths)

    def evaluation_metrics(self, sums: Mapping[str, Sums]) -> dict[str, float]:
        """Means over all targets, and the validation perplexity."""
        metrics: dict[str, float] = {}
        for split, name in (("train", "eval/train_loss"), ("val", "val/loss")):
            if split in sums:
                total, count = sums[split]["loss"].tolist()[:2]
                metrics[name] = total / count
        for split, of_split in sums.items():
            if split.startswith("val/"):
                total, count = of_split["loss"].tolist()[:2]
                metrics[f"val/loss/{split.removeprefix('val/')}"] = total / count
        if "val/loss" in metrics:
            metrics["val/perplexity"] = perplexity(metrics["val/loss"])
            if "bytes" in sums["val"] and (size := int(sums["val"]["bytes"])):
                metrics["val/bits_per_byte"] = bits_per_byte(float(sums["val"]["loss"][0]), size)
        return metrics

    @property
    def guessing_loss(self) -> float:
        """The natural logarithm of V."""
        return math.log(vocab_size(self.net))

    def flops_per_token(self, T: int) -> int | None:
        """By the model's own method or a GPT-2's configuration, where all weights train."""
        if not all(parameter.requires_grad for parameter in self.net.parameters()):
            return None
        if (own := getattr(self.net, "flops_per_token", None)) is not None:
            return int(own(T))
        return training_flops_per_token(self.net.config, T) if isinstance(self.net, GPTModel) else None


def _segments(batch: Any) -> Tensor | None:
    return batch.segments if isinstance(batch, PackedBatch) else None
