"""What callbacks share: acting after a step, values of all ranks, the Trainer's numbers, pictures."""

import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import lightning as L
import torch

from gptpl.files.figures import figure_pixels, write_png
from gptpl.training.loggers import log_image
from gptpl.training.module import TrainingModule

if TYPE_CHECKING:  # matplotlib takes long to import
    from matplotlib.figure import Figure

T = TypeVar("T")

log = logging.getLogger(__name__)


class AfterStep(L.Callback):
    """Acts once after each optimizer step, when its numbers are in the loggers.

    That is before the evaluation and the samples that may follow it, before the end of the epoch and before
    the next batch, whichever comes first. Lightning's `on_train_batch_end` comes too early (the step is not
    logged yet, and after every micro-batch), and its next hook depends on what comes next.

    All such callbacks of a Trainer act together, in their order, when the hook of the first is called: each
    says on its rank whether it is `due`, one small reduction tells who is on any rank, and those act.

    A resumed run does not repeat what was done after the step that it starts from, except for classes with
    `repeats_on_resume`.
    """

    repeats_on_resume = False
    acting_seconds = 0.0
    """Time that all of them took, kept by the first: it is not training."""
    _reached: int | None = None

    def due(self, trainer: L.Trainer, pl_module: L.LightningModule) -> bool:
        """Whether to act after this step. Ranks may differ: one is enough for all to act."""
        return True

    def after_step(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What is to be done; `trainer.global_step` is the number of the step."""
        raise NotImplementedError

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the step that training starts from."""
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
        everyone = trainer.callbacks  # type: ignore[attr-defined]
        callbacks = [callback for callback in everyone if isinstance(callback, AfterStep)]
        waiting = [each for each in callbacks if each._reached not in (None, trainer.global_step)]
        if self is not callbacks[0] or not waiting:
            return
        for callback in waiting:
            callback._reached = trainer.global_step
        started = time.perf_counter()
        due = on_any_rank(trainer, [callback.due(trainer, pl_module) for callback in waiting])
        for callback, acts in zip(waiting, due, strict=True):
            if acts:
                callback.after_step(trainer, pl_module)
        self.acting_seconds += time.perf_counter() - started


def on_any_rank(trainer: L.Trainer, flags: Sequence[bool]) -> list[bool]:
    """Which flags are set on at least one rank. Lightning's reductions have a barrier each, this has none."""
    if trainer.world_size == 1:
        return list(flags)
    found = torch.tensor(flags, dtype=torch.int32, device=trainer.strategy.root_device)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in found.tolist()]


def sum_of_ranks(trainer: L.Trainer, value: torch.Tensor) -> torch.Tensor:
    """The sum of the ranks' values, on the CPU."""
    if trainer.world_size > 1:
        value = value.to(trainer.strategy.root_device)
        torch.distributed.all_reduce(value)
    return value.cpu()


def of_every_rank(trainer: L.Trainer, value: T) -> list[T]:
    """The values that the ranks call this with, by rank."""
    if trainer.world_size == 1:
        return [value]
    values = [value] * trainer.world_size
    torch.distributed.all_gather_object(values, value)
    return values


def language_module(module: L.LightningModule) -> TrainingModule:
    """The module typed with what callbacks read; any other with those attributes will do."""
    return cast(TrainingModule, module)


def metric(trainer: L.Trainer, name: str) -> float | None:
    """The latest logged value of a metric, if there is one. Waits for the device."""
    value = trainer.callback_metrics.get(name)
    return None if value is None else float(value)


def epochs_done(trainer: L.Trainer) -> float:
    """Passes over the training data so far, by optimizer steps, with the fraction of the current one.

    Whole passes only if the number of batches is unknown.
    """
    if trainer.global_step == 0:
        return 0.0
    batches = trainer.num_training_batches
    if not batches or math.isinf(batches):
        return float(trainer.current_epoch)
    # The last, short accumulation of an epoch is a step as well.
    return trainer.global_step / math.ceil(batches / trainer.accumulate_grad_batches)


def show_picture(trainer: L.Trainer, name: str, figure: "Figure", path: Path) -> None:
    """Send a picture to the loggers, and write it to a PNG file; if that fails, training continues."""
    pixels = figure_pixels(figure)
    log_image(trainer.loggers, name, pixels, trainer.global_step)
    try:
        write_png(pixels, path)
    except OSError as error:
        log.warning("The picture could not be written to %s: %s", path, error)
