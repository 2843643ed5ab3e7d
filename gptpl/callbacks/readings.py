"""What the callbacks read from the Trainer and from the LightningModule."""

import math
from typing import Any, Protocol, cast

import lightning as L
from torch import Tensor, nn

from gptpl.data.tokenizers import Tokenizer
from gptpl.training.resume_state import Position


class LanguageModule(Protocol):
    """The attributes that these callbacks expect of the LightningModule they watch."""

    @property
    def net(self) -> nn.Module:
        """The model itself, not wrapped for a strategy."""

    @property
    def tokenizer(self) -> Tokenizer:
        """What turned text into the tokens."""

    @property
    def guessing_loss(self) -> float:
        """Loss of a model that finds every answer equally likely, in nats."""

    @property
    def loss_unit(self) -> str:
        """What the losses are in, such as "nats per token"."""

    def inputs_of(self, batch: Any) -> Tensor:
        """The tokens (B, T) of a batch that the model is given."""

    def flops_per_token(self, T: int) -> int | None:
        """Arithmetic of training on a token of a row of T; None: it is not known."""

    @property
    def total_steps(self) -> int:
        """Optimizer steps the run is planned for."""

    @property
    def tokens_seen(self) -> int:
        """Training tokens so far, over all ranks."""

    position: Position
    """The boundary after the last finished optimizer step."""

    @property
    def updating(self) -> bool:
        """Whether a step has begun to change weights and optimizer, and has not ended."""

    def evaluates_after(self, step: int) -> bool:
        """Whether an evaluation follows this optimizer step."""

    tokens_per_second: float | None
    """Recent speed of training over all ranks; None before it is known."""

    mfu: float | None
    """The same as a share of what the devices could do; None before it is known, and where it is not."""

    run_config: dict[str, Any]
    """The run's resolved configuration as plain data."""


def language_module(module: L.LightningModule) -> LanguageModule:
    """The same module under the type that names what the callbacks read."""
    return cast(LanguageModule, module)


def metric(trainer: L.Trainer, name: str) -> float | None:
    """The latest logged value of a metric, None when there is none. Waits for the device."""
    value = trainer.callback_metrics.get(name)
    return None if value is None else float(value)


def epochs_done(trainer: L.Trainer) -> float:
    """Passes over the training data so far, with the fraction of the present one, by optimizer steps.

    Whole passes only where the number of batches is not known.
    """
    if trainer.global_step == 0:
        return 0.0
    batches = trainer.num_training_batches
    if not batches or math.isinf(batches):
        return float(trainer.current_epoch)
    # The last, short accumulation of an epoch is a step as well.
    return trainer.global_step / math.ceil(batches / trainer.accumulate_grad_batches)
