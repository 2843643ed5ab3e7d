"""The two files of `checkpoints/`: `best.ckpt` to use, `last.ckpt` to go on from."""

import logging
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from gptpl.errors import InputError

log = logging.getLogger(__name__)


class BestCheckpoint(ModelCheckpoint):
    """`best.ckpt`: the weights at the lowest `monitor` so far, without optimizer state.

    Saved after each evaluation that improves on it; a third of the size of a checkpoint to resume from.
    """

    def __init__(self, *, dirpath: str, monitor: str = "val/loss") -> None:
        super().__init__(
            dirpath=dirpath,
            filename="best",
            monitor=monitor,
            mode="min",
            save_top_k=1,
            save_weights_only=True,
            save_on_train_epoch_end=False,
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the best score; the file belongs to it wherever the run's folder is by now."""
        best = str(Path(str(self.dirpath)) / Path(state_dict["best_model_path"]).name)
        moved = {
            "dirpath": self.dirpath,
            "best_model_path": best,
            "kth_best_model_path": best,
            "best_k_models": {best: state_dict["best_model_score"]},
        }
        super().load_state_dict(state_dict | (moved if state_dict["best_model_path"] else {}))


class LastCheckpoint(Checkpoint):
    """`last.ckpt`: everything that is needed to resume.

    Saved when training ends, when it is broken off by an error or Ctrl-C, and in between as often as asked.

    Args:
        dirpath: the folder of the file.
        every_n_minutes: time between saves; None: not by time.
        every_n_steps: optimizer steps between saves; None: not by steps.
    """

    def __init__(
        self, *, dirpath: str, every_n_minutes: float | None = 10.0, every_n_steps: int | None = None
    ) -> None:
        super().__init__()
        for name, value in (("every_n_minutes", every_n_minutes), ("every_n_steps", every_n_steps)):
            if value is not None and value <= 0:
                raise InputError(
                    f"callbacks.checkpoint_last.{name}={value} is not positive: give more than 0, or null"
                )
        self.path = Path(dirpath) / "last.ckpt"
        self.every_n_minutes = every_n_minutes
        self.every_n_steps = every_n_steps
        self._started_step: int | None = None
        self._saved_step = 0
        self._saved_seconds = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock; the step that training starts from needs no saving."""
        self._started_step = self._saved_step = trainer.global_step
        self._saved_seconds = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves when due, once a step."""
        if trainer.global_step == self._saved_step:
            return
        minutes = (time.monotonic() - self._saved_seconds) / 60
        by_time = self.every_n_minutes is not None and minutes >= self.every_n_minutes
        # The first process decides, or some ranks would save and others not.
        by_time = trainer.strategy.broadcast(by_time) if self.every_n_minutes is not None else False
        by_steps = self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0
        if by_time or by_steps:
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the finished run, anew where its last step was saved before it was evaluated."""
        if trainer.global_step != self._started_step:
            self._save(trainer)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Saves what a broken-off run has reached; with several processes the others may be gone already."""
        # Before training has started, a resumed run may not have taken over the whole of its checkpoint.
        started = self._started_step is not None
        if started and trainer.world_size == 1 and trainer.global_step != self._saved_step:
            self._save(trainer)
            log.info("Stopped at step %d; saved %s", trainer.global_step, self.path)

    def _save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.path)
        self._saved_step = trainer.global_step
        self._saved_seconds = time.monotonic()
