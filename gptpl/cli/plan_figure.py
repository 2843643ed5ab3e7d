"""The picture of a learning rate over a run that has not begun."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from gptpl.callbacks.loss_figure import DOTS_PER_INCH, SIZE_INCHES

if TYPE_CHECKING:  # matplotlib takes long to import
    from matplotlib.figure import Figure

MOST_POINTS = 2000


def drawn_steps(steps: int) -> list[int]:
    """Finished steps before each update that is drawn: all of a short run, of a long one evenly spaced."""
    if steps <= MOST_POINTS:
        return list(range(steps))
    return sorted({round(i * (steps - 1) / (MOST_POINTS - 1)) for i in range(MOST_POINTS)})


def rate_curves(
    rates: Mapping[str, float], factor: Callable[[int], float], steps: int
) -> tuple[list[int], dict[str, list[float]]]:
    """The updates that are drawn, counted from 1 as in the logs, and their rates by name of the group."""
    drawn = drawn_steps(steps)
    factors = [factor(step) for step in drawn]
    return [step + 1 for step in drawn], {
        name: [peak * share for share in factors] for name, peak in rates.items()
    }


def rate_figure(
    rates: Mapping[str, float], factor: Callable[[int], float], *, steps: int, steps_per_epoch: int
) -> "Figure":
    """Every group's rate against the optimizer steps, with epochs above."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots()
    updates, curves = rate_curves(rates, factor, steps)
    for name, values in curves.items():
        same = name != "lr" and values == curves.get("lr")  # one would hide the other
        axes.plot(
            updates, values, label=name, linestyle="--" if same else "-", marker="." if steps < 40 else ""
        )
    axes.set_xlabel("Optimizer steps")
    axes.set_ylabel("Learning rate")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.02)
    axes.grid(visible=True, alpha=0.3)
    axes.yaxis.set_major_formatter(lambda rate, _position: f"{rate:g}")

    def to_epochs(updates: Any) -> Any:
        return updates / steps_per_epoch

    def to_updates(epochs: Any) -> Any:
        return epochs * steps_per_epoch

    top = axes.secondary_xaxis("top", functions=(to_epochs, to_updates))
    top.set_xlabel("Epochs")
    if len(curves) > 1:
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle("Learning rate of the run", fontweight="bold")
    return figure
