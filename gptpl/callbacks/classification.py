"""A classifier's pictures at every evaluation, and its scores at the end."""

# C classes, K bins of confidence

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L
import numpy as np
from numpy.typing import NDArray

from gptpl.callbacks.after_step import of_every_rank, show_picture, sum_of_ranks
from gptpl.callbacks.checkpoints import BestCheckpoint
from gptpl.checkpoints.format import read_checkpoint
from gptpl.data.classification.datamodule import LabelledDataModule
from gptpl.errors import InputError
from gptpl.evaluation.classifier import accuracy_text, evaluate_classifier, scores
from gptpl.training.classification import ClassificationModule, named_scores
from gptpl.training.sharding import FullyShardedStrategy

if TYPE_CHECKING:  # matplotlib takes long to import
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

DOTS_PER_INCH = 120
MOST_NUMBERED = 20
"""Classes up to which each cell has its number; more would not be readable."""
LABEL_CHARACTERS = 18


class ClassificationReport(L.Callback):
    """Draws the validation texts' confusion matrix and calibration to the loggers and to two PNG files.

    At every evaluation; the files show the last one.
    """

    def __init__(self, *, confusion_path: str | Path, calibration_path: str | Path) -> None:
        super().__init__()
        self.confusion_path = Path(confusion_path)
        self.calibration_path = Path(calibration_path)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the evaluation."""
        if not isinstance(pl_module, ClassificationModule):
            raise InputError(
                "callbacks.classification_report needs task=classify: leave it out with"
                " '~callbacks.classification_report'"
            )
        sums = pl_module.evaluated.get("val")
        if trainer.state.fn != "fit" or not trainer.is_global_zero or sums is None:
            return
        title = f"step {trainer.global_step:,}, validation, "
        accuracy = accuracy_text(sums["confusion"], pl_module.labels)
        confusion = confusion_figure(sums["confusion"], pl_module.labels, title=f"{title}\n{accuracy}")
        show_picture(trainer, "confusion", confusion, self.confusion_path)
        error = scores(**sums).calibration_error
        calibration = reliability_figure(sums["calibration"], error=error, title=title)
        show_picture(trainer, "calibration", calibration, self.calibration_path)


def confusion_figure(confusion: NDArray[np.float64], labels: Sequence[str], *, title: str = "") -> "Figure":
    """Draw a confusion matrix (C, C), true classes in rows; colours are fractions of the row."""
    from matplotlib.figure import Figure

    C = len(labels)
    side = min(12.0, 3.2 + 0.5 * C)
    figure = Figure(figsize=(side + 0.8, side), dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots()
    rows = confusion.sum(axis=1, keepdims=True)
    fractions = np.divide(confusion, rows, out=np.zeros_like(confusion), where=rows > 0)
    image = axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="Fraction of the true class", shrink=0.8)
    most = LABEL_CHARACTERS
    names = [label if len(label) <= most else label[: most - 3] + "..." for label in labels]
    axes.set_xticks(range(C), names, rotation=45 if C > 3 else 0, ha="right" if C > 3 else "center")
    axes.set_yticks(range(C), names)
    axes.set_xlabel("Predicted")
    axes.set_ylabel("True")
    if C <= MOST_NUMBERED:
        for (row, column), count in np.ndenumerate(confusion):
            color = "white" if fractions[row, column] > 0.5 else "black"
            axes.text(column, row, f"{count:,.0f}", ha="center", va="center", color=color)
    axes.set_title(title, fontsize="medium")
    return figure


def reliability_figure(calibration: NDArray[np.float64], *, error: float, title: str = "") -> "Figure":
    """Draw calibration sums (3, K): accuracy by confidence, and below it the number of predictions."""
    from matplotlib.figure import Figure

    count, _, right = calibration
    K = len(count)
    edges = np.arange(K) / K
    accuracy = np.divide(right, count, out=np.zeros(K), where=count > 0)
    figure = Figure(figsize=(5, 6), dpi=DOTS_PER_INCH, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.bar(
        edges, accuracy, width=1 / K, align="edge", color="tab:blue", edgecolor="white", label="accuracy"
    )
    above.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1, label="perfectly calibrated")
    above.set_ylabel("Accuracy")
    above.set_ylim(0, 1)
    above.legend(loc="upper left", frameon=False)
    above.set_title(f"{title}expected calibration error {error:.3f}", fontsize="medium")
    below.bar(edges, count, width=1 / K, align="edge", color="tab:gray", edgecolor="white")
    below.set_xlabel("Confidence")
    below.set_ylabel("Predictions")
    below.set_xlim(0, 1)
    return figure


class FinalScores(L.Callback):
    """Scores the whole training, validation and test splits when training has ended, for the run's record.

    The weights are those of `best.ckpt`, if the run keeps that, else the last; afterwards the module has its
    own again. Each rank scores a part of the texts. `final_metrics` are then `test/loss`, `test/accuracy`,
    `test/f1`, `test/f1_<label>`, `test/calibration_error`, `best_train/accuracy` and `best_val/accuracy`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.final_metrics: dict[str, float] = {}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Score the splits that the data have."""
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(pl_module, ClassificationModule) or not isinstance(datamodule, LabelledDataModule):
            return
        if isinstance(trainer.strategy, FullyShardedStrategy):
            log.info("the test texts are not scored here (the model is sharded): use gptpl evaluate")
            return
        kept = (
            callback.best_model_path
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, BestCheckpoint) and callback.best_model_path
        )
        best = next(kept, None)
        if not all(of_every_rank(trainer, best is not None and Path(best).is_file())):
            if best is not None:
                log.warning("the last weights are scored: not every process can read %s", best)
            best = None
        before = None
        if best is not None:
            before = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}
            pl_module.load_state_dict(read_checkpoint(Path(best), verified=True)["state_dict"])
        of_all_ranks = partial(sum_of_ranks, trainer)
        for split in datamodule.load():
            batches = datamodule.split_dataloader(split)
            with pl_module.uncompiled():
                found = evaluate_classifier(pl_module.net, batches, of_all_ranks=of_all_ranks)
            if split == "test":
                scores = named_scores(found.scores, pl_module.labels, "test/")
                self.final_metrics |= {"test/loss": found.loss} | scores
            else:
                self.final_metrics[f"best_{split}/accuracy"] = found.scores.accuracy
            if trainer.is_global_zero:
                log.info(
                    "%s, %s weights: %s, F1 %.3f, calibration error %.3f, loss %.4f, %s texts",
                    split, "best" if best else "last", accuracy_text(found.confusion, pl_module.labels),
                    found.scores.macro_f1, found.scores.calibration_error, found.loss, f"{found.texts:,}",
                )  # fmt: skip
        if before is not None:
            pl_module.load_state_dict(before)
