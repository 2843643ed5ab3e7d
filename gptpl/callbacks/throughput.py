"""What is logged of every step: its learning rate, and the speed of training."""

import time
from collections import deque
from typing import Any

import lightning as L
from torch.optim import Optimizer

from gptpl.callbacks.after_step import AfterStep, language_module
from gptpl.errors import InputError
from gptpl.training.flops import peak_flops
from gptpl.training.performance import product_dtype


class Throughput(L.Callback):
    """Logs `train/tokens_per_second` and `train/mfu` of all ranks, over recent steps.

    The module's `tokens_per_second` is the same number, for other callbacks. MFU is the model FLOPs
    utilisation: the arithmetic that training on these tokens needs, by the module's `flops_per_token`, over
    the most that the devices can do in the time, by `peak_flops`. It is left out where the device or the
    arithmetic is not known.

    A step's time runs from the end of the step before to its own end: waiting for data counts, evaluations
    and the callbacks' work after steps (samples, saves) do not. The first step, which warms up caches and
    compiles, does not count either.

    A GPU's work may only be queued when a step ends here. It is not waited for: the check of the gradient's
    norm does so in every step, so the host is never more than an optimizer step and a forward pass ahead, and
    the rest of a step's work is in the time of the next.

    Args:
        window: optimizer steps the average is taken over.
    """

    def __init__(self, *, window: int = 20) -> None:
        if window < 1:
            raise InputError(f"callbacks.throughput.window must be positive, got {window}")
        super().__init__()
        self._recent: deque[tuple[float, int]] = deque(maxlen=window)
        self._before: tuple[float, int] | None = None
        """Seconds of training and tokens seen at the end of the last step."""
        self._step = 0
        self._peak_flops: float | None = None  # of all ranks together

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find out what the devices can do."""
        dtype = product_dtype(str(trainer.precision))
        config = getattr(language_module(pl_module).net, "config", None)
        peak = peak_flops(pl_module.device, dtype, config)
        self._peak_flops = None if peak is None else peak * trainer.world_size
        self._before = None
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the step that this batch completed, if any, to the average."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        module = language_module(pl_module)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        paused = sum(callback.acting_seconds for callback in callbacks if isinstance(callback, AfterStep))
        now = time.perf_counter() - paused - module.evaluation_seconds, module.tokens_seen
        before, self._before = self._before, now
        if before is None:
            return
        self._recent.append((now[0] - before[0], now[1] - before[1]))
        seconds = sum(elapsed for elapsed, _ in self._recent)
        module.tokens_per_second = sum(tokens for _, tokens in self._recent) / seconds
        module.log("train/tokens_per_second", module.tokens_per_second)
        flops = None if self._peak_flops is None else module.flops_per_token(module.inputs_of(batch).shape[1])
        if self._peak_flops is not None and flops is not None:
            module.log("train/mfu", module.tokens_per_second * flops / self._peak_flops)


class LearningRate(L.Callback):
    """Logs the learning rate of each update as `lr`, and of parameter groups with a name as `lr/<name>`.

    Lightning's own monitor logs that of the next update.
    """

    def __init__(self) -> None:
        super().__init__()
        self._rates: dict[str, float] = {}

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Note the learning rates before the schedule advances."""
        self._rates = {
            f"lr/{group['name']}" if "name" in group else "lr": float(group["lr"])
            for group in optimizer.param_groups
        }

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log them with the step's other metrics."""
        for name, rate in self._rates.items():
            pl_module.log(name, rate)
