"""Records of every step: batches and losses to the last bit, times, the loss until it diverges."""

# B sequences in a batch, T tokens in a sequence

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch

from gptpl.callbacks.after_step import AfterStep, metric, of_every_rank
from gptpl.callbacks.record_file import RecordFile
from gptpl.evaluation.loss_curves import Divergence


class StepTrace(L.Callback):
    """JSON Lines in `path`: for each step its `batches` (hashes) and `losses` (hexadecimal floats).

    Both lists have an entry for every micro-batch of every rank. A line is written before its step can be
    saved; a resumed run drops the lines after the step it resumes from.
    """

    def __init__(self, *, path: str | Path) -> None:
        super().__init__()
        self._file = RecordFile(Path(path))
        self._batches: list[str] = []
        self._losses: list[str] = []
        self._written_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the file at the step that training starts from."""
        self._written_step = trainer.global_step
        if trainer.is_global_zero:
            self._file.start(step=trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note a micro-batch; write the line of the step that it completes."""
        inputs: torch.Tensor = batch[0]  # (B, T)
        self._batches.append(hashlib.sha256(inputs.cpu().contiguous().numpy().data).hexdigest()[:16])
        self._losses.append(float(outputs["loss"]).hex())
        if trainer.global_step != self._written_step:
            self._written_step = trainer.global_step
            of_all = of_every_rank(trainer, (self._batches, self._losses))
            self._batches, self._losses = [], []
            if trainer.is_global_zero:
                batches = [name for of_rank, _ in of_all for name in of_rank]
                losses = [loss for _, of_rank in of_all for loss in of_rank]
                self._file.append([{"step": trainer.global_step, "batches": batches, "losses": losses}])


class StepTimer(L.Callback):
    """Keeps the seconds of every batch and of the evaluation before the first, None without one.

    A batch is forward, backward and, if it is the last of a step, optimizer; for a GPU it is synchronised.
    """

    def __init__(self) -> None:
        super().__init__()
        self.batch_seconds: list[float] = []
        self.evaluation_seconds: float | None = None
        self._started_seconds = 0.0

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._started_seconds = time.perf_counter()

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the evaluation."""
        self.evaluation_seconds = self._elapsed_seconds(pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock."""
        self._started_seconds = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the batch."""
        self.batch_seconds.append(self._elapsed_seconds(pl_module))

    def _elapsed_seconds(self, pl_module: L.LightningModule) -> float:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        return time.perf_counter() - self._started_seconds


class SeenEnough(Exception):  # noqa: N818 (nothing is wrong)
    """All steps are done, or the loss has diverged."""


class LossOfSteps(AfterStep):
    """Keeps the loss of every optimizer step, in nats per token, before its update.

    Ends the training after `steps`, or when it diverges; `progress` is called after each.
    """

    def __init__(self, steps: int, progress: Callable[[], object]) -> None:
        super().__init__()
        self.losses: list[float] = []
        self._steps = steps
        self._progress = progress
        self._divergence = Divergence()

    def after_step(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the loss. Raises SeenEnough after the last step."""
        loss = metric(trainer, "train/loss")
        assert loss is not None
        self.losses.append(loss)
        self._progress()
        if self._divergence.after(loss) or len(self.losses) == self._steps:
            raise SeenEnough
