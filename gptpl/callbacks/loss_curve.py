"""The loss curve of a run: recorded at every evaluation, drawn and judged at the end."""

import logging
import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L

from gptpl.callbacks.after_step import epochs_done, language_module, metric, show_picture
from gptpl.evaluation.loss_curves import LossPoint, curve_verdict, finite, tokens_text
from gptpl.files.figures import new_figure
from gptpl.training.loggers import log_text

if TYPE_CHECKING:  # matplotlib takes long to import
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

LINE_CHARACTERS = 120
"""Of the caption."""
MARKED_POINTS = 60
"""Evaluations up to which each has a dot; more would merge into a thick line."""


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
