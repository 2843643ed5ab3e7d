"""Which batches every step saw and what loss they had, to the last bit."""

# B windows in a batch, T tokens in a window

import hashlib
from pathlib import Path
from typing import Any

import lightning as L
import torch

from gptpl.callbacks.record_file import RecordFile


class StepTrace(L.Callback):
    """One JSON object a step in `path`: `step`, `batches` (a hash each), `losses` (as hexadecimal floats).

    Both lists have an entry for every micro-batch of every rank. A line is written before its step can be
    saved; a resumed run takes back the lines beyond the step it resumes from.

    Args:
        path: the JSON Lines file.
    """

    def __init__(self, *, path: str | Path) -> None:
        super().__init__()
        self._file = RecordFile(Path(path))
        self._batches: list[str] = []
        self._losses: list[str] = []
        self._written_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Opens the file at the step that training starts from."""
        self._written_step = trainer.global_step
        if trainer.is_global_zero:
            self._file.start(step=trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes one micro-batch, (inputs, targets), each (B, T); writes the line of the step it completed."""
        inputs: torch.Tensor = batch[0]
        self._batches.append(hashlib.sha256(inputs.cpu().contiguous().numpy().data).hexdigest()[:16])
        self._losses.append(float(outputs["loss"]).hex())
        if trainer.global_step != self._written_step:
            self._written_step = trainer.global_step
            self._write(trainer)

    def _write(self, trainer: L.Trainer) -> None:
        noted: list[Any] = [[self._batches, self._losses]]
        if trainer.world_size > 1:
            noted = [None] * trainer.world_size
            torch.distributed.all_gather_object(noted, [self._batches, self._losses])
        self._batches, self._losses = [], []
        if trainer.is_global_zero:
            batches = [name for of_rank in noted for name in of_rank[0]]
            losses = [loss for of_rank in noted for loss in of_rank[1]]
            record = {"step": trainer.global_step, "batches": batches, "losses": losses}
            self._file.append([record])
