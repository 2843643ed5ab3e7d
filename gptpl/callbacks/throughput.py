"""Training speed in tokens per second, and as a share of what the hardware can do."""

import time
from collections import deque
from typing import Any

import lightning as L

from gptpl.callbacks.after_step import language_module
from gptpl.errors import InputError
from gptpl.training.flops import peak_flops
from gptpl.training.performance import product_dtype


class Throughput(L.Callback):
    """Keeps `tokens_per_second` and `mfu` of the training module up to date: all ranks, over recent batches.

    `mfu` is the model FLOPs utilisation: the arithmetic that training needs for these tokens, by the module's
    `flops_per_token`, over what the devices could do at most in the time, by `peak_flops`. It is left out
    where the device or the arithmetic is not known.

    The time of a batch is forward, backward and optimizer; evaluations, samples and saves do not count, nor
    does the first batch, which warms up caches and compiles.

    A GPU's work may only be queued when a batch ends here. It is not waited for: the check of the gradient's
    norm does so in every step, so the host is never more than an optimizer and a forward pass ahead, and what
    one batch leaves over is in the next one's time.

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
        self._peak_flops: float | None = None  # of all ranks together
        self._flops_per_token: int | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Finds out what the devices can do."""
        dtype = product_dtype(str(trainer.precision))
        config = getattr(language_module(pl_module).net, "config", None)
        peak = peak_flops(pl_module.device, dtype, config)
        self._peak_flops = None if peak is None else peak * trainer.world_size

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Starts the clock."""
        module = language_module(pl_module)
        if self._peak_flops is not None:
            self._flops_per_token = module.flops_per_token(module.inputs_of(batch).shape[1])
        self._tokens_before = module.tokens_seen
        self._started_seconds = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Adds the batch to the average."""
        if not self._warm:
            self._warm = True
            return
        module = language_module(pl_module)
        elapsed_seconds = time.perf_counter() - self._started_seconds
        self._recent.append((elapsed_seconds, module.tokens_seen - self._tokens_before))
        seconds = sum(elapsed for elapsed, _ in self._recent)
        module.tokens_per_second = sum(tokens for _, tokens in self._recent) / seconds
        if self._peak_flops is not None and self._flops_per_token is not None:
            module.mfu = module.tokens_per_second * self._flops_per_token / self._peak_flops
