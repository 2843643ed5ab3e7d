"""Training speed in tokens per second."""

import time
from collections import deque
from typing import Any

import lightning as L
import torch

from gptpl.callbacks.readings import language_module
from gptpl.errors import InputError


class Throughput(L.Callback):
    """Keeps `tokens_per_second` of the training module up to date: all ranks together, over recent batches.

    The time of a batch is forward, backward and optimizer; evaluations, samples and saves do not count, nor
    does the first batch, which warms up caches and compiles.

    Args:
        window: batches the average is taken over.
    """

    def __init__(self, *, window: int = 20) -> None:
        if window < 1:
            raise InputError(f"callbacks.throughput.window={window} averages nothing: give 1 or more batches")
        super().__init__()
        self._recent: deque[tuple[float, int]] = deque(maxlen=window)
        self._started_seconds = 0.0
        self._tokens_before = 0
        self._warm = False

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Starts the clock."""
        self._tokens_before = language_module(pl_module).tokens_seen
        self._started_seconds = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Adds the batch to the average."""
        if pl_module.device.type != "cpu":  # whose work may only be queued
            torch.accelerator.synchronize()
        if not self._warm:
            self._warm = True
            return
        module = language_module(pl_module)
        elapsed_seconds = time.perf_counter() - self._started_seconds
        self._recent.append((elapsed_seconds, module.tokens_seen - self._tokens_before))
        seconds = sum(elapsed for elapsed, _ in self._recent)
        module.tokens_per_second = sum(tokens for _, tokens in self._recent) / seconds
