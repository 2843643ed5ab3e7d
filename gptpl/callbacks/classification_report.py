"""Pictures of a classifier at every evaluation: its confusion matrix, and how far its probabilities hold."""

import logging
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from gptpl.callbacks.classification_figures import confusion_figure, reliability_figure
from gptpl.errors import InputError
from gptpl.files.figures import figure_pixels, write_png
from gptpl.training.classification import ClassificationModule
from gptpl.training.evaluation import accuracy_text, scores
from gptpl.training.loggers import log_image

log = logging.getLogger(__name__)


class ClassificationReport(L.Callback):
    """Draws the validation texts' confusion matrix and calibration to the loggers and to two PNG files.

    They are drawn anew at every evaluation; the files show the last. A picture that cannot be written is a
    warning: the checkpoints are worth more.

    Args:
        confusion_path: PNG of the confusion matrix.
        calibration_path: PNG of accuracy against confidence.
    """

    def __init__(self, *, confusion_path: str | Path, calibration_path: str | Path) -> None:
        super().__init__()
        self.confusion_path = Path(confusion_path)
        self.calibration_path = Path(calibration_path)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the evaluation that has just been measured."""
        if not isinstance(pl_module, ClassificationModule):
            raise InputError(
                "callbacks.classification_report needs task=classify: leave it out with"
                " '~callbacks.classification_report'"
            )
        sums = pl_module.evaluated.get("val")
        if trainer.state.fn != TrainerFn.FITTING or not trainer.is_global_zero or sums is None:
            return
        found = scores(**sums)
        title = f"step {trainer.global_step:,}, validation, "
        pictures: list[tuple[str, Path, Any]] = [
            (
                "confusion",
                self.confusion_path,
                confusion_figure(
                    sums["confusion"],
                    pl_module.labels,
                    title=f"{title}\n{accuracy_text(sums['confusion'], pl_module.labels)}",
                ),
            ),
            (
                "calibration",
                self.calibration_path,
                reliability_figure(sums["calibration"], error=found.calibration_error, title=title),
            ),
        ]
        for name, path, figure in pictures:
            pixels = figure_pixels(figure)
            log_image(trainer.loggers, name, pixels, trainer.global_step)
            try:
                write_png(pixels, path)
            except OSError as error:
                log.warning("The picture could not be written to %s: %s", path, error)
