"""What callbacks share: a hook that Lightning lacks, and what they read from the Trainer and the module."""

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import lightning as L
import torch

from gptpl.files.figures import figure_pixels, write_png
from gptpl.training.loggers import log_image
from gptpl.training.module import TrainingModule

if TYPE_CHECKING:  # matplotlib takes long to import; only who draws needs it
    from matplotlib.figure import Figure

T = TypeVar("T")

log = logging.getLogger(__name__)


class AfterStep(L.Callback):
    """Calls `after_step` once for each optimizer step, when its numbers are in the loggers.

    That is before the evaluation and the samples that may follow it, before the end of the epoch and before
    the next batch, whichever comes first. Lightning's `on_train_batch_end` comes too early (the step is not
    logged yet, and after every micro-batch), and its next hook depends on what comes next.

    Where training starts, `after_step` has been called for the step that a resumed run starts from, in the
    run before; a class with `repeats_on_resume` gets the call again.
    """

    repeats_on_resume = False
    _reached: int | None = None

    def after_step(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What is to be done; `trainer.global_step` is the number of the step."""
        raise NotImplementedError

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes the step that training starts from."""
        self._reached = 0 if self.repeats_on_resume else trainer.global_step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """The next batch comes."""
        self._call(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """An evaluation comes."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._call(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The epoch is over."""
        self._call(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Training is over."""
        self._call(trainer, pl_module)

    def _call(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._reached is not None and trainer.global_step != self._reached:
            self._reached = trainer.global_step
            self.after_step(trainer, pl_module)


def language_module(module: L.LightningModule) -> TrainingModule:
    """The module under the type that has what the callbacks read. Any other with those attributes serves."""
    return cast(TrainingModule, module)


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


def of_every_rank(trainer: L.Trainer, value: T) -> list[T]:
    """The values that the ranks call this with, by rank."""
    if trainer.world_size == 1:
        return [value]
    values = [value] * trainer.world_size
    torch.distributed.all_gather_object(values, value)
    return values


def show_picture(trainer: L.Trainer, name: str, figure: "Figure", path: Path) -> None:
    """A picture to the loggers and into a PNG file, which appears or is replaced in one move.

    One that cannot be written is a warning: the checkpoints are worth more.
    """
    pixels = figure_pixels(figure)
    log_image(trainer.loggers, name, pixels, trainer.global_step)
    try:
        write_png(pixels, path)
    except OSError as error:
        log.warning("The picture could not be written to %s: %s", path, error)
