"""What the settings that differ did: as axes, as parallel coordinates, and weighed by their importance."""

import math
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptpl.files.figures import COLOURS, GREY
from gptpl.records.run_record import RunRecord
from gptpl.records.settings import Setting
from gptpl.reports.drawing import LINE, PAPER, Picture, bare, picture
from gptpl.reports.texts import digits, ending
from gptpl.text import setting_text, shortened

if TYPE_CHECKING:  # matplotlib and optuna are imported where they are used
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from optuna.distributions import BaseDistribution


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A setting, with those that always change together with it.

    Attributes:
        name: of the setting.
        together: names of the others, whose effect cannot be told from its own.
        values: one a run.
        numeric: whether all values are numbers.
        measured: whether the values are no setting but what came of it: shown with four digits, never
            logarithmic.
    """

    name: str
    together: Sequence[str]
    values: Sequence[Setting | None]
    numeric: bool
    measured: bool = False

    @property
    def title(self) -> str:
        """The name, and how many others it stands for."""
        return f"{self.name} (+{len(self.together)})" if self.together else self.name

    @property
    def logarithmic(self) -> bool:
        """Whether the values are positive and span a factor of ten."""
        numbers = self.numbers()
        return bool(numbers) and not self.measured and min(numbers) > 0 and max(numbers) >= 10 * min(numbers)

    @property
    def labels(self) -> list[str]:
        """The different values as texts, in the order of the first runs that have them."""
        return list(dict.fromkeys(setting_text(value) for value in self.values))

    def text(self, value: Setting | None) -> str:
        """A value as it is shown."""
        return digits(float(value)) if self.measured and value is not None else setting_text(value)

    def numbers(self) -> list[float]:
        """One a run; none at all where not all values are numbers."""
        return [float(value) for value in self.values if value is not None] if self.numeric else []

    def places(self) -> list[float]:
        """Where each run is on the axis, from 0 to 1."""
        if not self.numeric:
            labels = self.labels
            return [labels.index(setting_text(value)) / max(len(labels) - 1, 1) for value in self.values]
        numbers = [math.log(value) for value in self.numbers()] if self.logarithmic else self.numbers()
        low, high = min(numbers), max(numbers)
        return [(value - low) / ((high - low) or 1) for value in numbers]


def axes(names: Sequence[str], runs: Sequence[RunRecord]) -> list[Axis]:
    """One a setting that differs between these runs; those that always change together are one.

    Together change what is the same in the same runs. This is taken for no accident where each value comes
    twice or more on average: of values that are drawn anew for each run, each differs from run to run.
    """
    made: dict[tuple[int, ...], Axis] = {}
    for name in names:
        values = [run.settings.get(name) for run in runs]
        different = list(dict.fromkeys(map(repr, values)))
        if len(different) < 2:
            continue
        pattern = tuple(different.index(repr(value)) for value in values)
        repeated = len(runs) >= 2 * len(different)
        if repeated and pattern in made:
            first = made[pattern]
            made[pattern] = Axis(
                name=first.name,
                together=[*first.together, name],
                values=first.values,
                numeric=first.numeric,
            )
            continue
        key = pattern if repeated else (-len(made) - 1,)
        made[key] = Axis(name=name, together=[], values=values, numeric=all(map(_is_number, values)))
    return list(made.values())


def _is_number(value: Setting | None) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# --- importance -----------------------------------------------------------------------------------------

FEWEST_RUNS = 10
"""Below, half of the runs are too few to show a pattern."""
GOOD = 0.5
"""The share of runs that are the good ones.

In synthetic runs, 10 to 80 of them, the setting that decided came out first more often than with a tenth, a
quarter or a third.
"""
SHUFFLES = 19
"""A setting that weighs more than with shuffled losses, every time, does so by chance once in 20 times."""


@dataclass(frozen=True, kw_only=True)
class Importance:
    """Shares that add up to 1, largest first; `note` says what they are worth, or why there are none."""

    shares: Sequence[tuple[Axis, float]]
    note: str


def importance(axes: Sequence[Axis], losses: Sequence[float]) -> Importance:
    """How much the values of a setting in the best runs are distributed otherwise than in all.

    By PED-ANOVA (Watanabe et al., IJCAI 2023, arXiv 2304.10255).

    Args:
        axes: settings with a value for each run.
        losses: one a run, finite, lower is better.
    """
    weighed = [axis for axis in axes if axis.numeric or len(axis.labels) < len(losses)]
    if not weighed:
        return Importance(shares=[], note="The finished runs differ in no setting that could be weighed.")
    if len(losses) < FEWEST_RUNS:
        runs = f"{len(losses)} finished run{'' if len(losses) == 1 else 's'}"
        return Importance(
            shares=[],
            note=f"Too few runs to weigh settings: {runs} of at least {FEWEST_RUNS}.",
        )
    found = _weights(weighed, losses)
    total = sum(found.values())
    if total <= 0:
        return Importance(shares=[], note="No setting stands out in the better half of the runs.")
    shares = sorted(((axis, found[axis.name] / total) for axis in weighed), key=lambda pair: -pair[1])
    clear = _beyond_chance(weighed, losses, found)
    names = [axis.name for axis, _ in shares if axis.name in clear]
    note = (
        f"From {len(losses)} finished runs: how far the values in their better half differ from those in all."
        f" More than by chance (more than in any of {SHUFFLES} shufflings of the losses):"
        f" {', '.join(names) or 'none, so do not read anything into this order'}."
    )
    return Importance(shares=shares, note=note)


def _beyond_chance(axes: Sequence[Axis], losses: Sequence[float], found: Mapping[str, float]) -> set[str]:
    """Names of the settings whose weight no shuffling of the losses reaches."""
    rng = random.Random(0)
    clear = set(found)
    for _ in range(SHUFFLES):
        weights = _weights(axes, rng.sample(losses, len(losses)))
        clear = {name for name in clear if found[name] > weights[name]}
    return clear


def _weights(axes: Sequence[Axis], losses: Sequence[float]) -> dict[str, float]:
    import optuna
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # Of losses that tie: no setting stands out, which is what the result says, too.
            warnings.filterwarnings("ignore", message="Target and region quantiles select the same set")
            study = optuna.create_study(direction="minimize")
            distributions = {axis.name: _distribution(axis) for axis in axes}
            columns: dict[str, list[float] | list[str]] = {
                axis.name: axis.numbers() or [setting_text(value) for value in axis.values] for axis in axes
            }
            for place, loss in enumerate(losses):
                params = {name: values[place] for name, values in columns.items()}
                trial = optuna.create_trial(params=params, distributions=distributions, value=loss)
                study.add_trial(trial)
            evaluator = PedAnovaImportanceEvaluator(target_quantile=GOOD)
            return get_param_importances(study, evaluator=evaluator, normalize=False)
    finally:
        optuna.logging.set_verbosity(verbosity)


def _distribution(axis: Axis) -> "BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if axis.numeric:
        return FloatDistribution(min(axis.numbers()), max(axis.numbers()), log=axis.logarithmic)
    return CategoricalDistribution(axis.labels)


# --- pictures -------------------------------------------------------------------------------------------

MOST_AXES = 8
MOST_LABELS = 8
"""Of one axis; of more values every second, third, ... is named."""
CLOSE = 0.07
"""Of an axis: texts of values nearer than this would overlap."""
_BEHIND = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.75, "pad": 0.8}
WIDE_INCHES, NARROW_INCHES = 9.0, 4.4


def parallel_picture(
    axes: Sequence[Axis], values: Sequence[float], colours: Sequence[str], *, title: str, name: str
) -> Picture:
    """A line a run, from setting to setting to what it reached.

    Args:
        axes: settings with a value for each run, the first MOST_AXES of which are drawn.
        values: one a run, the best first.
        colours: one a run, those of the learning curves.
        title: what the values are.
        name: of the file.
    """
    shown = list(axes)[:MOST_AXES]
    reached = Axis(name=title, together=[], values=list(values), numeric=True, measured=True)
    return picture(
        name,
        f"Parallel coordinates: {', '.join(axis.name for axis in shown)} and the {title}",
        lambda narrow: _parallel(shown, reached, colours, narrow=narrow),
    )


def _parallel(axes: Sequence[Axis], reached: Axis, colours: Sequence[str], *, narrow: bool) -> "Figure":
    from matplotlib.figure import Figure

    size = (NARROW_INCHES, 0.95 * len(axes) + 1.2) if narrow else (WIDE_INCHES, 3.6)
    figure = Figure(figsize=size)
    panel = figure.add_axes((0.03, 0.03, 0.94, 0.94) if narrow else (0.01, 0.05, 0.98, 0.78))
    columns = [axis.places() for axis in (*axes, reached)]
    places = range(len(columns))
    for run in reversed(range(len(colours))):  # the best on top
        values = [column[run] for column in columns]
        best = colours[run] != GREY
        style = {"linewidth": 1.6 if best else 0.8, "alpha": 0.9 if best else 0.6, "color": colours[run]}
        points = (values, [-place for place in places]) if narrow else (list(places), values)
        panel.plot(*points, marker="o", markersize=3, **style)  # type: ignore[arg-type]
    for place, axis in enumerate((*axes, reached)):
        _coordinate(panel, axis, place, narrow=narrow)
    if narrow:
        panel.set_ylim(-len(axes) - 0.35, 0.5)
    else:
        panel.set_xlim(-0.25, len(axes) + 0.35)
    panel.set_axis_off()
    return figure


def _coordinate(panel: "Axes", axis: Axis, place: int, *, narrow: bool) -> None:
    """One axis with its name and the texts of its values: upright, or lying where the page is narrow."""
    title = shortened(axis.title, 30)
    name_style: Any = {"fontsize": 8, "fontweight": "bold", "zorder": 4, "bbox": _BEHIND}
    value_style: Any = {"fontsize": 7, "zorder": 4, "textcoords": "offset points", "bbox": _BEHIND}
    if narrow:
        panel.plot([0, 1], [-place, -place], color=LINE, linewidth=0.8, zorder=0)
        panel.text(0, 0.2 - place, title, va="bottom", **name_style)
    else:
        panel.plot([place, place], [0, 1], color=LINE, linewidth=0.8, zorder=0)
        panel.text(place, 1.06, title.replace(".", ".\n"), ha="center", va="bottom", **name_style)
    for where, text in _value_labels(axis):
        if narrow:
            side = "left" if where < 0.05 else "right" if where > 0.95 else "center"
            panel.annotate(text, (where, -place), (0, -5), ha=side, va="top", **value_style)
        else:
            panel.annotate(text, (place, where), (6, 0), va="center", **value_style)


def _value_labels(axis: Axis) -> list[tuple[float, str]]:
    """Where on the axis which value stands: its values, or some of them."""
    places = axis.places()
    pairs = sorted(dict(zip(places, axis.values, strict=True)).items())
    every = -(-len(pairs) // MOST_LABELS)
    kept = pairs[::every] if every == 1 else [*pairs[:-1:every], pairs[-1]]
    apart = kept[:1]
    for where, value in kept[1:]:
        if where - apart[-1][0] < CLOSE and where == 1.0 and len(apart) > 1:
            apart.pop()  # the ends matter more
        if where - apart[-1][0] >= CLOSE:
            apart.append((where, value))
    return [(where, ending(axis.text(value), 14)) for where, value in apart]


def importance_picture(shares: Sequence[tuple[Axis, float]], *, name: str) -> Picture:
    """A bar a setting, the largest on top."""
    return picture(
        name,
        "Importance: " + ", ".join(f"{axis.title} {share:.0%}" for axis, share in shares),
        lambda narrow: _bars(shares, narrow=narrow),
    )


def _bars(shares: Sequence[tuple[Axis, float]], *, narrow: bool) -> "Figure":
    from matplotlib.figure import Figure

    size = (NARROW_INCHES if narrow else WIDE_INCHES, 0.32 * len(shares) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    panel = figure.subplots()
    places = range(len(shares))
    widths = [100 * share for _, share in shares]
    bars = panel.barh(list(places), widths, color=COLOURS[0], height=0.62)
    panel.bar_label(bars, [f"{width:.0f} %" for width in widths], padding=3)
    panel.set_yticks(list(places), [shortened(axis.title, 28 if narrow else 60) for axis, _ in shares])
    panel.invert_yaxis()
    panel.set_xlim(0, 1.15 * max(widths))
    bare(panel, grid="x")
    panel.set_xticks([])
    panel.spines["bottom"].set_visible(False)
    panel.tick_params(length=0)
    return figure
