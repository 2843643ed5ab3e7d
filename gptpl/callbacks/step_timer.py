"""How long the steps of a training take, and the evaluation before them."""

import time
from typing import Any

import lightning as L
import torch


class StepTimer(L.Callback):
    """Keeps the seconds of every batch and of the evaluation before the first.

    A batch is forward, backward and, where it is the last of a step, optimizer. A GPU is waited for, so that
    its work counts where it was asked for.

    Attributes:
        batch_seconds: one number a batch.
        evaluation_seconds: of the whole evaluation; None: there was none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.batch_seconds: list[float] = []
        self.evaluation_seconds: float | None = None
        self._started_seconds = 0.0

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock."""
        self._started_seconds = time.perf_counter()

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes the evaluation."""
        self.evaluation_seconds = self._elapsed_seconds(pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Starts the clock."""
        self._started_seconds = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes the batch."""
        self.batch_seconds.append(self._elapsed_seconds(pl_module))

    def _elapsed_seconds(self, pl_module: L.LightningModule) -> float:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        return time.perf_counter() - self._started_seconds
