"""Pictures of judgements: how scores are spread, and which of two models is ahead."""

from typing import TYPE_CHECKING

from gptpl.files.figures import COLOURS, DOTS_PER_INCH, GREY, SIZE_INCHES
from gptpl.judging.measures import TITLES
from gptpl.judging.verdicts import DRAW, LOSS, WIN

if TYPE_CHECKING:  # matplotlib takes long to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from gptpl.judging.results import Comparison, Scores

_BINS = 20


def scores_figure(scores: "Scores") -> "Figure":
    """A histogram of the judge's scores where there are any, and of those by the references."""
    names = ("token_f1", "rouge_l")
    panels = {name: [getattr(each, name) for each in scores.references] for name in names}
    scored = [each.value for each in scores.verdicts if each.value is not None]
    if scored:
        panels = {"judge": scored, **panels}
    figure, row = _panels(len(panels))
    for axes, (name, values) in zip(row, panels.items(), strict=True):
        _histogram(axes, values, scores.scale if name == "judge" else (0.0, 1.0))
        mean = scores.means[name]
        axes.axvline(mean.value or 0.0, color=COLOURS[3])
        if mean.low is not None and mean.high is not None:
            axes.axvspan(mean.low, mean.high, color=COLOURS[3], alpha=0.25, linewidth=0)
        axes.set_xlabel(TITLES[name][0].upper() + TITLES[name][1:])
    title = f"Scores of {scores.count} answers, with their mean and its 95 % interval"
    figure.suptitle(title, fontweight="bold")
    return figure


def comparison_figure(comparison: "Comparison") -> "Figure":
    """Differences with their intervals, and where a judge decided, how often each model won."""
    figure, panels = _panels(2 if comparison.preferences else 1)
    names = list(reversed(comparison.differences))
    for row, name in enumerate(names):
        mean = comparison.means[name]
        assert mean.value is not None
        if mean.low is not None and mean.high is not None:
            panels[0].plot([mean.low, mean.high], [row, row], color=COLOURS[0], linewidth=2)
        panels[0].plot([mean.value], [row], color=COLOURS[0], marker="o")
    panels[0].axvline(0, color=GREY, linewidth=1)
    panels[0].set_yticks(range(len(names)), [TITLES[name] for name in names])
    panels[0].set_xlabel("First minus second")
    if comparison.preferences:
        counts = [comparison.results[each] for each in (WIN, DRAW, LOSS)]
        labels, colours = ("first better", "tie", "second better"), (COLOURS[0], GREY, COLOURS[1])
        panels[1].bar_label(panels[1].bar(labels, counts, color=colours))
        panels[1].set_ylabel("Entries")
    figure.suptitle(f"Two models' answers to {comparison.count} instructions", fontweight="bold")
    return figure


def _panels(count: int) -> tuple["Figure", list["Axes"]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _histogram(axes: "Axes", values: list[float], scale: tuple[float, float]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.hist(values, bins=_BINS, range=scale, color=COLOURS[0])
    axes.set_ylabel("Entries")
    axes.grid(visible=True, axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
