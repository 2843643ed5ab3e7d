"""What is logged: learning rate and speed of every step, settings and best values, the loss curve."""

import logging
import math
import textwrap
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
from torch.optim import Optimizer

from gptpl.callbacks.after_step import AfterStep, epochs_done, language_module, metric, show_picture
from gptpl.errors import InputError
from gptpl.evaluation.loss_curves import LossPoint, curve_verdict, finite, tokens_text
from gptpl.files.figures import new_figure
from gptpl.files.run_record import LOSS
from gptpl.files.run_settings import flat_settings
from gptpl.training.costs import peak_flops
from gptpl.training.loggers import log_hyperparameters, log_text
from gptpl.training.performance import product_dtype
from gptpl.training.task import known_metrics

if TYPE_CHECKING:  # matplotlib takes long to import
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

LINE_CHARACTERS = 120
"""Of the caption."""
MARKED_POINTS = 60
"""Evaluations up to which each has a dot; more would merge into a thick line."""


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


class Hyperparameters(L.Callback):
    """Sends the settings to the loggers once, and at every evaluation the best values so far.

    These are `best_val/loss`, and `best_<metric>` of each metric that the module declares better high
    (`metrics: Mapping[str, "min" | "max"]`).
    """

    def __init__(self) -> None:
        super().__init__()
        self._best: dict[str, float] = {}
        self._logged = False

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Update and log the best values."""
        if trainer.state.fn != "fit":
            return
        highest = [name for name, mode in known_metrics(pl_module).items() if mode == "max"]
        better = {LOSS: np.fmin} | dict.fromkeys(highest, np.fmax)
        for name, better_of in better.items():  # fmin and fmax: nan is never the best
            if (value := metric(trainer, name)) is not None:
                best = f"best_{name}"
                self._best[best] = float(better_of(value, self._best.get(best, value)))
        settings = {} if self._logged else flat_settings(language_module(pl_module).run_config)
        log_hyperparameters(trainer.loggers, settings, self._best, trainer.global_step)
        self._logged = True

    def state_dict(self) -> dict[str, Any]:
        """The best values so far."""
        return {"best": dict(self._best)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the best values of the run that is resumed."""
        lowest = state_dict.get("lowest", {})  # of gptpl 0.1.0
        self._best = {f"best_{LOSS}": lowest["hp/val_loss"]} if "hp/val_loss" in lowest else {}
        self._best |= state_dict.get("best", {})


class LossCurve(L.Callback):
    """Draws training and validation loss to `path` and to the loggers, and says what they show.

    Each evaluation of a training run is a point, that before the first step included, and kept in the
    checkpoint: a resumed run draws the whole curve. It is drawn when training ends, also by an error.
    """

    def __init__(self, *, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        self.points: list[LossPoint] = []
        self._drawn = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin with a run that is not drawn yet."""
        self._drawn = False

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the evaluation."""
        train_loss, val_loss = metric(trainer, "eval/train_loss"), metric(trainer, "val/loss")
        if trainer.state.fn != "fit" or train_loss is None or val_loss is None:
            return
        point = LossPoint(
            step=trainer.global_step,
            epoch=epochs_done(trainer),
            tokens_seen=language_module(pl_module).tokens_seen,
            train_loss=train_loss,
            val_loss=val_loss,
        )
        # A resumed run repeats evaluations that the run before it had made after its last checkpoint.
        self.points = [earlier for earlier in self.points if earlier.step < point.step] + [point]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw and judge the finished run."""
        self._finish(trainer, pl_module)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Draw and judge what there is."""
        if trainer.state.fn == "fit":
            self._finish(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The points as plain numbers, which load with `weights_only=True`."""
        return {"points": [asdict(point) for point in self.points]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the points of the run that is resumed."""
        self.points = [LossPoint(**point) for point in state_dict["points"]]

    def _finish(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._drawn or not self.points or not trainer.is_global_zero:
            return
        self._drawn = True
        module = language_module(pl_module)
        message = curve_verdict(
            self.points,
            uniform_loss=module.guessing_loss,
            whole_model=all(parameter.requires_grad for parameter in module.net.parameters()),
            caveat=getattr(trainer.datamodule, "caveat", ""),  # type: ignore[attr-defined]
        ).message
        figure = loss_figure(self.points, caption=message, unit=module.loss_unit)
        show_picture(trainer, "loss", figure, self.path)
        log_text(trainer.loggers, "verdict", message, trainer.global_step)
        log.info("%s", message)


def loss_figure(points: Sequence[LossPoint], *, caption: str = "", unit: str = "nats per token") -> "Figure":
    """Draw the losses of one or more evaluations; those that are not finite leave gaps."""
    figure = new_figure()
    axes = figure.subplots()
    epochs = [point.epoch for point in points]
    style: Any = {"marker": ".", "linewidth": 1.5} if len(points) <= MARKED_POINTS else {"linewidth": 1.0}
    train = [finite(point.train_loss) for point in points]
    val = [finite(point.val_loss) for point in points]
    axes.plot(epochs, train, color="tab:blue", label="training loss", **style)
    axes.plot(epochs, val, color="tab:orange", label="validation loss", **style)
    if measured := [point for point in points if math.isfinite(point.val_loss)]:
        lowest = min(measured, key=lambda point: point.val_loss)
        label = f"lowest validation loss {lowest.val_loss:.2f} (step {lowest.step:,})"
        circle: Any = {"marker": "o", "markersize": 9, "fillstyle": "none", "markeredgewidth": 1.8}
        axes.plot(lowest.epoch, lowest.val_loss, color="tab:red", linestyle="none", label=label, **circle)
    axes.set_xlabel("Epochs")
    axes.set_ylabel(f"Loss ({unit})")
    axes.grid(visible=True, alpha=0.3)
    axes.margins(x=0.02)
    last = points[-1]
    if last.tokens_seen and last.epoch:  # tokens seen grow in proportion to the epochs
        per_epoch = last.tokens_seen / last.epoch
        functions = (lambda epochs: epochs * per_epoch, lambda tokens: tokens / per_epoch)
        top = axes.secondary_xaxis("top", functions=functions)
        top.set_xlabel("Tokens seen")
        top.xaxis.set_major_formatter(tokens_text)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)  # where it cannot hide a curve
    figure.suptitle("Loss during training", fontweight="bold")
    if caption:
        lines = math.ceil(len(caption) / LINE_CHARACTERS)
        width = len(caption) // lines + 10  # about equal lines, not a last line of one word
        axes.set_title(textwrap.fill(caption, width=width), fontsize="small")
    return figure
