"""The LightningModule of pretraining: next-token prediction on plain text."""

# B batch, T time, V vocabulary

import math
from collections.abc import Mapping
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from gptpl.data.pretraining.datamodule import TextDataModule
from gptpl.data.training_data import TrainingData
from gptpl.model import GPTModel
from gptpl.model.loss import bits_per_byte, bytes_of, evaluation_loss, perplexity, training_loss
from gptpl.model.protocol import vocab_size
from gptpl.training.flops import training_flops_per_token
from gptpl.training.module import TrainingModule
from gptpl.training.task import Better, Sums, Task

Batch = tuple[Tensor, Tensor]


class LanguageModelingModule(TrainingModule):
    """Trains a language model on sequences of tokens: batches of (inputs, targets), each (B, T) int64.

    The model is a `GPTModel`, or any module from tokens to logits, see `gptpl.model.protocol`. Targets of
    -100 are ignored. It also logs `train/perplexity` of a step and `val/perplexity` of an evaluation, and
    `val/bits_per_byte` where the tokenizer loses no byte of a text, by which tokenizers can be compared.
    """

    task = "pretrain"
    data_class: ClassVar[type[TrainingData]] = TextDataModule
    metrics: ClassVar[Mapping[str, Better]] = {
        **Task.metrics,
        "val/perplexity": "min",
        "val/bits_per_byte": "min",
    }
    use = ("generate", "prompt='Every effort moves you'")

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, V) of tokens (B, T)."""
        logits: Tensor = self.net(tokens)
        return logits

    def batch_loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy of the next tokens."""
        return training_loss(self.net, batch[0], batch[1], head=self.head)

    def inputs_of(self, batch: Batch) -> Tensor:
        """See `Task`."""
        return batch[0]

    def step_metrics(self, loss: Tensor) -> dict[str, Tensor]:
        """The perplexity of the step."""
        return {"train/perplexity": loss.exp()}

    def evaluation_sums(self, batch: Batch) -> Sums:
        """Sum of the losses and number of targets, and bytes of their text."""
        inputs, targets = batch
        sums = {"loss": evaluation_loss(self.net, inputs, targets)}
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
