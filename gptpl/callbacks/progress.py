"""Progress over the whole training, in optimizer steps."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar
from lightning.pytorch.trainer.states import TrainerFn

from gptpl.callbacks.pace import Pace
from gptpl.callbacks.progress_display import Display, open_display
from gptpl.callbacks.progress_text import LABELS, clock_text, evaluation_text, training_text
from gptpl.callbacks.readings import epochs_done, language_module, metric
from gptpl.errors import InputError

log = logging.getLogger(__name__)


class ProgressBar(LightningProgressBar):
    """One bar for the whole training: optimizer steps, epoch, loss, perplexity, tokens per second, time left.

    Where standard error is no terminal there is a log line every `log_every_seconds` instead. Every
    evaluation of a training run is one log line. The time left follows from the pace of all steps of this
    session but the first, evaluations and samples included; a resumed run starts at its step.

    `trainer.validate`, `test` and `predict` show their batches in the same way.

    Args:
        log_every_seconds: above 0.
    """

    def __init__(self, *, log_every_seconds: float = 15.0) -> None:
        super().__init__()
        if not log_every_seconds > 0:
            raise InputError(
                f"log_every_seconds={log_every_seconds!r} of the progress bar: give a number above 0"
            )
        self.log_every_seconds = log_every_seconds
        self.is_enabled = True
        self._display: Display | None = None
        self._pace: Pace | None = None
        self._evaluated = 0
        self._to_evaluate: int | None = None

    def disable(self) -> None:
        """Show nothing; Lightning calls this on all processes but the first."""
        self.is_enabled = False

    def enable(self) -> None:
        """Show again."""
        self.is_enabled = True

    def print(self, *args: Any, sep: str = " ", end: str = "\n", **kwargs: Any) -> None:
        """Print without tearing the bar; `LightningModule.print` comes here."""
        if self._display is None or kwargs.get("file") is not None:
            super().print(*args, sep=sep, end=end, **kwargs)
        else:
            self._display.write(sep.join(map(str, args)) + end)

    # --- training -------------------------------------------------------------------------------------

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the display: the evaluation before the first step belongs to the training."""
        self._open_training(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._open_training(trainer, pl_module)
        self._pace = Pace(trainer.global_step)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Show the step before: when it ended, the module had not logged its loss yet."""
        step, total = trainer.global_step, language_module(pl_module).total_steps
        if self._display is None or self._pace is None:
            return
        self._pace.reach(step)
        if self._display.due():
            left = self._pace.seconds_left(step, total=total)
            self._display.show(step, _training_text(trainer, pl_module, _labelled("time left", left)))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the last step, and how long it all took."""
        if self._display is not None and self._pace is not None:
            took = _labelled("took", self._pace.seconds_taken())
            self._display.show(trainer.global_step, _training_text(trainer, pl_module, took))
        self._close()

    # --- evaluation, in a training run or alone -------------------------------------------------------

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count this evaluation's batches."""
        sanity = trainer.sanity_checking
        self._start_evaluation(trainer, trainer.num_sanity_val_batches if sanity else trainer.num_val_batches)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count one batch."""
        self._count_batch(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log what an evaluation in a training run found."""
        if not _fitting(trainer):
            self._close()
        elif self.is_enabled:
            text = evaluation_text(
                train_loss=metric(trainer, "eval/train_loss"),
                val_loss=metric(trainer, "val/loss"),
                val_perplexity=metric(trainer, "val/perplexity"),
            )
            log.info("step %d: %s", trainer.global_step, text)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count the test's batches."""
        self._start_evaluation(trainer, trainer.num_test_batches)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count one batch."""
        self._count_batch(trainer, pl_module)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count the prediction's batches."""
        self._start_evaluation(trainer, trainer.num_predict_batches)

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count one batch."""
        self._count_batch(trainer, pl_module)

    # --- the display's life ---------------------------------------------------------------------------

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Give the terminal back before the error is reported."""
        self._close()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the terminal back in any case."""
        self._close()

    def _open_training(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._open("step", total=language_module(pl_module).total_steps, initial=trainer.global_step)

    def _open(self, unit: str, *, total: int | None, initial: int = 0) -> None:
        if self.is_enabled and self._display is None:
            self._display = open_display(
                unit, total=total, initial=initial, log_every_seconds=self.log_every_seconds
            )

    def _close(self) -> None:
        if self._display is not None:
            self._display.close()
            self._display = None

    def _start_evaluation(self, trainer: L.Trainer, batches: Sequence[int | float]) -> None:
        self._evaluated = 0
        total = sum(batches)
        self._to_evaluate = None if math.isinf(total) else int(total)
        if not _fitting(trainer):
            self._open("batch", total=self._to_evaluate)

    def _count_batch(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._evaluated += 1
        if self._display is None:
            return
        if _fitting(trainer):
            if self._display.due():
                total = "?" if self._to_evaluate is None else self._to_evaluate
                text = _training_text(trainer, pl_module, f"evaluating {self._evaluated}/{total}")
                self._display.show(trainer.global_step, text)
        elif self._display.due() or self._evaluated == self._to_evaluate:
            self._display.show(self._evaluated, "")


def _fitting(trainer: L.Trainer) -> bool:
    return trainer.state.fn == TrainerFn.FITTING


def _training_text(trainer: L.Trainer, pl_module: L.LightningModule, end: str) -> str:
    metrics = {name: metric(trainer, name) for name in LABELS}
    metrics["train/tokens_per_second"] = language_module(pl_module).tokens_per_second
    return training_text(epoch=max(math.ceil(epochs_done(trainer)), 1), metrics=metrics, end=end)


def _labelled(label: str, seconds: float | None) -> str:
    return "" if seconds is None else f"{label} {clock_text(seconds)}"
