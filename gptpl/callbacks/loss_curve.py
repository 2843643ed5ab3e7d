"""The loss curve of a run: recorded at every evaluation, drawn and judged at the end."""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from gptpl.callbacks.loss_figure import loss_figure
from gptpl.callbacks.readings import epochs_done, language_module, metric
from gptpl.files.figures import figure_pixels, write_png
from gptpl.training.loggers import log_image, log_text
from gptpl.training.loss_curves import LossPoint, curve_verdict

log = logging.getLogger(__name__)


class LossCurve(L.Callback):
    """Draws training and validation loss to `path` and to the loggers, and says what they show.

    A point is recorded at every evaluation of a training run, the one before the first step included, and
    kept in the checkpoint: a resumed run draws the whole curve. It is drawn when training ends, also by an
    interrupt or an error. A picture that cannot be written is a warning: the checkpoints are worth more.

    Args:
        path: the PNG file; it appears or is replaced in one move.
    """

    def __init__(self, *, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        self.points: list[LossPoint] = []
        self._drawn = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin a run that is not drawn yet."""
        self._drawn = False

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the evaluation that has just been measured."""
        train_loss, val_loss = metric(trainer, "eval/train_loss"), metric(trainer, "val/loss")
        if trainer.state.fn != TrainerFn.FITTING or train_loss is None or val_loss is None:
            return
        point = LossPoint(
            step=trainer.global_step,
            epoch=epochs_done(trainer),
            tokens_seen=language_module(pl_module).tokens_seen,
            train_loss=train_loss,
            val_loss=val_loss,
        )
        # A resumed run evaluates steps anew that the run before it had already reached.
        self.points = [earlier for earlier in self.points if earlier.step < point.step] + [point]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw and judge the finished run."""
        self._finish(trainer, pl_module)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Draw and judge what there is."""
        if trainer.state.fn == TrainerFn.FITTING:
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
        verdict = curve_verdict(
            self.points,
            uniform_loss=module.guessing_loss,
            whole_model=all(parameter.requires_grad for parameter in module.net.parameters()),
            caveat=getattr(trainer.datamodule, "caveat", ""),  # type: ignore[attr-defined]
        )
        pixels = figure_pixels(loss_figure(self.points, caption=verdict.message, unit=module.loss_unit))
        log_image(trainer.loggers, "loss", pixels, trainer.global_step)
        log_text(trainer.loggers, "verdict", verdict.message, trainer.global_step)
        try:
            write_png(pixels, self.path)
        except OSError as error:
            log.warning("The loss curve could not be written to %s: %s", self.path, error)
        log.info("%s", verdict.message)
