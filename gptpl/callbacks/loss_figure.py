"""The picture of a training run: training and validation loss against epochs and tokens seen."""

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gptpl.files.figures import DOTS_PER_INCH, SIZE_INCHES
from gptpl.training.loss_curves import LossPoint, finite, tokens_text

if TYPE_CHECKING:  # matplotlib takes long to import; only the end of a run needs it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINE_CHARACTERS = 120
"""So much of the caption fits on one line."""

MARKED_POINTS = 60
"""Up to so many evaluations each gets a dot; more would run into a thick line."""


def loss_figure(points: Sequence[LossPoint], *, caption: str = "", unit: str = "nats per token") -> "Figure":
    """Draw the losses of one or more evaluations, with a caption under the title.

    Losses that are not finite leave gaps. Uses no state of pyplot: nothing has to be closed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots()
    epochs = [point.epoch for point in points]
    marker, width = (".", 1.5) if len(points) <= MARKED_POINTS else ("", 1.0)
    train = [finite(point.train_loss) for point in points]
    val = [finite(point.val_loss) for point in points]
    axes.plot(epochs, train, color="tab:blue", marker=marker, linewidth=width, label="training loss")
    axes.plot(epochs, val, color="tab:orange", marker=marker, linewidth=width, label="validation loss")
    _mark_lowest(axes, points)
    axes.set_xlabel("Epochs")
    axes.set_ylabel(f"Loss ({unit})")
    axes.grid(visible=True, alpha=0.3)
    axes.margins(x=0.02)
    _add_token_axis(axes, points[-1])
    # Beside the axes, not in them, the legend cannot hide a curve.
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle("Loss during training", fontweight="bold")
    if caption:
        lines = math.ceil(len(caption) / LINE_CHARACTERS)
        width = len(caption) // lines + 10  # about equal lines, no last line of one word
        axes.set_title(textwrap.fill(caption, width=width), fontsize="small")
    return figure


def _mark_lowest(axes: "Axes", points: Sequence[LossPoint]) -> None:
    finite = [point for point in points if math.isfinite(point.val_loss)]
    if not finite:
        return
    lowest = min(finite, key=lambda point: point.val_loss)
    axes.plot(
        lowest.epoch,
        lowest.val_loss,
        color="tab:red",
        linestyle="none",
        marker="o",
        markersize=9,
        fillstyle="none",
        markeredgewidth=1.8,
        label=f"lowest validation loss {lowest.val_loss:.2f} (step {lowest.step:,})",
    )


def _add_token_axis(axes: "Axes", last: LossPoint) -> None:
    """A second axis above: tokens seen grow in proportion to the epochs."""
    if not last.tokens_seen or not last.epoch:
        return
    per_epoch = last.tokens_seen / last.epoch

    def to_tokens(epochs: Any) -> Any:
        return epochs * per_epoch

    def to_epochs(tokens: Any) -> Any:
        return tokens / per_epoch

    top = axes.secondary_xaxis("top", functions=(to_tokens, to_epochs))
    top.set_xlabel("Tokens seen")
    top.xaxis.set_major_formatter(tokens_text)
