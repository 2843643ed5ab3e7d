"""Pictures of judgements: how scores are spread, and which of two models is ahead."""

import io
from typing import TYPE_CHECKING

from gptpl.callbacks.loss_figure import DOTS_PER_INCH, SIZE_INCHES
from gptpl.cli.judge_results import TITLES, Comparison, Scores
from gptpl.judging.comparison import DRAW, LOSS, WIN
from gptpl.report.palette import COLOURS, GREY

if TYPE_CHECKING:  # matplotlib takes long to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BINS = 20


def scores_figure(scores: Scores) -> "Figure":
    """A histogram of the judge's scores where there are any, and of those against the references."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    panels = {name: [getattr(each, name) for each in scores.references] for name in ("token_f1", "rouge_l")}
    judged = [each.value for each in scores.verdicts if each.value is not None]
    if judged:
        panels = {"judge": judged, **panels}
    for axes, (name, values) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        _histogram(axes, values, scores.scale if name == "judge" else (0.0, 1.0))
        mean = scores.means[name]
        axes.axvline(mean.value or 0.0, color=COLOURS[3])
        if mean.low is not None and mean.high is not None:
            axes.axvspan(mean.low, mean.high, color=COLOURS[3], alpha=0.25, linewidth=0)
        axes.set_xlabel(TITLES[name][0].upper() + TITLES[name][1:])
    figure.suptitle(
        f"Scores of {scores.count} answers, with their mean and its 95 % interval", fontweight="bold"
    )
    return figure


def comparison_figure(comparison: Comparison) -> "Figure":
    """Differences of the scores with their intervals, and where a judge decided, how often each model won."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    panels = figure.subplots(1, 2 if comparison.preferences else 1, squeeze=False)[0]
    names = [name for name in comparison.means if name != "win_rate"]
    for row, name in enumerate(reversed(names)):
        mean = comparison.means[name]
        assert mean.value is not None
        low, high = mean.low, mean.high
        if low is not None and high is not None:
            panels[0].plot([low, high], [row, row], color=COLOURS[0], linewidth=2)
        panels[0].plot([mean.value], [row], color=COLOURS[0], marker="o")
    panels[0].axvline(0, color=GREY, linewidth=1)
    panels[0].set_yticks(range(len(names)), [TITLES[name] for name in reversed(names)])
    panels[0].set_xlabel("First minus second")
    if comparison.preferences:
        counts = [comparison.results[each] for each in (WIN, DRAW, LOSS)]
        bars = panels[1].bar(
            ("first better", "tie", "second better"), counts, color=(COLOURS[0], GREY, COLOURS[1])
        )
        panels[1].bar_label(bars)
        panels[1].set_ylabel("Entries")
    figure.suptitle(f"Two models' answers to {comparison.count} instructions", fontweight="bold")
    return figure


def png_of(figure: "Figure") -> bytes:
    """The figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _histogram(axes: "Axes", values: list[float], scale: tuple[float, float]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.hist(values, bins=BINS, range=scale, color=COLOURS[0])
    axes.set_ylabel("Entries")
    axes.grid(visible=True, axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
