"""When a model is made to write during its training, and the file that keeps what it wrote."""

from abc import ABC, abstractmethod
from pathlib import Path

import lightning as L

from gptpl.callbacks.after_step import AfterStep
from gptpl.callbacks.record_file import RecordFile


class Samples(AfterStep, ABC):
    """Samples after every so many steps or epochs, and at the end of training.

    A subclass makes the samples, and says in `on_fit_start` by `_active` whether this process does. A resumed
    run makes those of its first step again.

    Args:
        path: the JSON Lines file.
        every_n_steps: sample whenever the optimizer steps are a multiple of this; None: not by steps.
        every_n_epochs: sample whenever the finished epochs are a multiple of this; None: not by epochs.
    """

    repeats_on_resume = True

    def __init__(self, *, path: str | Path, every_n_steps: int | None, every_n_epochs: int | None) -> None:
        super().__init__()
        self.every_n_steps = every_n_steps
        self.every_n_epochs = every_n_epochs
        self._file = RecordFile(Path(path))
        self._active = False

    @abstractmethod
    def _sample(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write and show the samples of this step that are not yet there, where the process is active."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the file at the step that training starts from."""
        super().on_train_start(trainer, pl_module)
        if self._active:
            # Those of the step itself are made again, for the loggers, too, have gone back before them.
            self._file.start(step=trainer.global_step - 1)

    def after_step(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sample when the step is due."""
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self._sample(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sample when the epoch is due."""
        super().on_train_epoch_end(trainer, pl_module)
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._sample(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sample the finished model."""
        super().on_train_end(trainer, pl_module)
        self._sample(trainer, pl_module)
