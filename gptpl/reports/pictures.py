"""The pictures of a report: learning curves, settings as parallel coordinates, their importance."""

import io
import itertools
import math
import random
import re
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

from gptpl.evaluation.loss_curves import finite, tokens_text
from gptpl.files.figures import COLOURS, DOTS_PER_INCH, GREY, marker_of
from gptpl.files.run_record import RunRecord
from gptpl.files.run_settings import Setting
from gptpl.reports.ranking import BY_LOSS, Criterion, Group, RankedRun
from gptpl.text import count_text, one_line, setting_text, shortened

if TYPE_CHECKING:  # matplotlib takes long to import, and optuna
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from optuna.distributions import BaseDistribution

# --- settings as axes -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A setting, or what the runs reached.

    Attributes:
        together: names of settings that always change with this one, so that their effects cannot be told
            apart.
        values: one for each run.
    """

    name: str
    together: Sequence[str] = ()
    values: Sequence[Setting | None]

    @property
    def title(self) -> str:
        """The name, and the number of other settings that it stands for."""
        return f"{self.name} (+{len(self.together)})" if self.together else self.name

    @property
    def logarithmic(self) -> bool:
        """Whether the values are positive and span a factor of ten."""
        numbers = self.numbers()
        return bool(numbers) and min(numbers) > 0 and max(numbers) >= 10 * min(numbers)

    @property
    def labels(self) -> list[str]:
        """The different values as texts, in the order of the first runs that have them."""
        return list(dict.fromkeys(map(setting_text, self.values)))

    def numbers(self) -> list[float]:
        """One for each run; empty unless all values are numbers."""
        numbers = [float(value) for value in self.values if _is_number(value)]
        return numbers if len(numbers) == len(self.values) else []

    def places(self) -> list[float]:
        """The place of each run on the axis, from 0 to 1."""
        if not self.numbers():
            labels = self.labels
            return [labels.index(setting_text(value)) / max(len(labels) - 1, 1) for value in self.values]
        numbers = [math.log(value) for value in self.numbers()] if self.logarithmic else self.numbers()
        low, high = min(numbers), max(numbers)
        return [(value - low) / ((high - low) or 1) for value in numbers]


def axes(names: Sequence[str], runs: Sequence[RunRecord]) -> list[Axis]:
    """An axis for each setting that differs between these runs; those that always change together share one.

    Two settings change together if they are equal in the same runs, and each value occurs twice or more on
    average: values drawn independently for each run all differ, which proves nothing.
    """
    made: dict[tuple[int, ...], Axis] = {}
    for name in names:
        values = [run.settings.get(name) for run in runs]
        different = list(dict.fromkeys(map(repr, values)))
        if len(different) < 2:
            continue
        pattern = tuple(different.index(repr(value)) for value in values)
        if len(runs) < 2 * len(different):
            pattern = (-len(made) - 1,)  # of its own
        if pattern in made:
            made[pattern] = replace(made[pattern], together=[*made[pattern].together, name])
        else:
            made[pattern] = Axis(name=name, values=values)
    return list(made.values())


def _is_number(value: Setting | None) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# --- their importance -----------------------------------------------------------------------------------

FEWEST_RUNS = 10
"""With fewer, half of the runs are too few to show a pattern."""
GOOD = 0.5
"""The fraction of runs that count as good.

In synthetic runs, 10 to 80 of them, the decisive setting came out first more often than with a tenth, a
quarter or a third.
"""
SHUFFLES = 19
"""A setting exceeds its weight with shuffled losses every time by chance in one of 20 cases."""


class Importance(NamedTuple):
    """Shares that add up to 1, largest first; `note` says how reliable they are, or why there are none."""

    shares: Sequence[tuple[Axis, float]]
    note: str


def importance(axes: Sequence[Axis], losses: Sequence[float]) -> Importance:
    """How much the distribution of a setting in the best runs differs from that in all runs.

    By PED-ANOVA (Watanabe et al., IJCAI 2023, arXiv 2304.10255). `losses` has a finite value for each run,
    lower is better.
    """
    weighed = [axis for axis in axes if axis.numbers() or len(axis.labels) < len(losses)]
    if not weighed:
        return Importance([], "The finished runs differ in no setting that could be weighed.")
    if len(losses) < FEWEST_RUNS:
        runs = count_text(len(losses), "finished run")
        return Importance([], f"Too few runs to weigh settings: {runs} of at least {FEWEST_RUNS}.")
    found = _weights(weighed, losses)
    total = sum(found.values())
    if total <= 0:
        return Importance([], "No setting stands out in the better half of the runs.")
    shares = sorted(((axis, found[axis.name] / total) for axis in weighed), key=lambda pair: -pair[1])
    rng = random.Random(0)
    clear = set(found)
    for _ in range(SHUFFLES):
        by_chance = _weights(weighed, rng.sample(losses, len(losses)))
        clear = {name for name in clear if found[name] > by_chance[name]}
    names = [axis.name for axis, _ in shares if axis.name in clear]
    note = (
        f"From {len(losses)} finished runs: how far the values in their better half differ from those in all."
        f" More than by chance (more than in any of {SHUFFLES} shufflings of the losses):"
        f" {', '.join(names) or 'none, so do not read anything into this order'}."
    )
    return Importance(shares, note)


def _weights(axes: Sequence[Axis], losses: Sequence[float]) -> Mapping[str, float]:
    import optuna
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # Losses that tie: no setting stands out, which is what the result says, too.
            warnings.filterwarnings("ignore", message="Target and region quantiles select the same set")
            study = optuna.create_study(direction="minimize")
            distributions = {axis.name: _distribution(axis) for axis in axes}
            columns: dict[str, list[float] | list[str]] = {
                axis.name: axis.numbers() or [setting_text(value) for value in axis.values] for axis in axes
            }
            for place, loss in enumerate(losses):
                params = {name: values[place] for name, values in columns.items()}
                study.add_trial(optuna.create_trial(params=params, distributions=distributions, value=loss))
            evaluator = PedAnovaImportanceEvaluator(target_quantile=GOOD)
            return get_param_importances(study, evaluator=evaluator, normalize=False)
    finally:
        optuna.logging.set_verbosity(verbosity)


def _distribution(axis: Axis) -> "BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if numbers := axis.numbers():
        return FloatDistribution(min(numbers), max(numbers), log=axis.logarithmic)
    return CategoricalDistribution(axis.labels)


# --- pictures -------------------------------------------------------------------------------------------

INK, LINE, PAPER = "#010203", "#c7c8cc", "#fefdfe"
"""Text, lines of the axes, and the background of labels: in an SVG they become the page's own colours."""
WIDTH = 9.0
"""Inches."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure, as PNG for Markdown and as an `<svg>` element in the page's colours for HTML.

    Attributes:
        name: of the PNG file, without its suffix.
        alt: the description for those who do not see it.
    """

    name: str
    alt: str
    png: bytes
    svg: str


def _picture(name: str, alt: str, draw: Callable[[], "Figure"]) -> Picture:
    from matplotlib import rc_context

    style: Any = {
        **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), LINE),
        **dict.fromkeys(("axes.labelcolor", "text.color", "xtick.labelcolor", "ytick.labelcolor"), INK),
        "axes.axisbelow": True,
        "axes.facecolor": "none",
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": 9,
        "font.family": ["sans-serif"],
        "font.size": 9,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "svg.fonttype": "none",  # text that can be read aloud, searched and copied
        "svg.hashsalt": name,  # ids that no other picture of the page has
        "text.parse_math": False,  # a dollar in a setting is a dollar
    }
    png, svg = io.BytesIO(), io.StringIO()
    with rc_context(style):
        figure = draw()
        figure.savefig(png, format="png", dpi=DOTS_PER_INCH, facecolor="white", metadata={"Software": None})
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(svg, format="svg", transparent=True, metadata=nothing)
    text = svg.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<style type=\"text/css\">.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r' (?:width|height)="[^"]*"', "", text, count=2)  # the page decides
    text = re.sub(r'<g id="', f'<g id="{name}-', text)
    for colour, variable in ((INK, "ink"), (LINE, "line"), (PAPER, "paper")):
        text = text.replace(colour, f"var(--{variable})")
    return Picture(name=name, alt=alt, png=png.getvalue(), svg=text)


def _ending(text: str, length: int) -> str:
    """The last characters of one line: those that tell paths apart."""
    line = one_line(text)
    return line if len(line) <= length else "\N{HORIZONTAL ELLIPSIS}" + line[1 - length :]


# --- learning curves ------------------------------------------------------------------------------------

PANEL_HEIGHT, LEGEND_LINE = 3.3, 0.19
"""Inches."""
MARKED_EVALUATIONS = 30
"""Beyond so many evaluations the markers of a curve would merge into a thick line."""
LABELLED_SETTINGS = 4
WRAP_AT = 60
"""Characters that fit into half the width of the legend."""


def curves_picture(group: Group, settings: Sequence[str], *, name: str) -> Picture | None:
    """Losses against tokens seen; to the right where they are lowest, or the metric of the ranking.

    None without any. `settings` are names by which runs are told apart, the most telling first.
    """
    entries = [
        entry
        for entry in group.ranked
        if entry.run is not None and entry.run.best is not None and len(entry.run.evaluations) > 1
    ]
    if not entries:
        return None
    labels = _labels(group, entries, settings)
    return _picture(
        name,
        f"Validation and training loss of {count_text(len(entries), 'run')} against tokens seen",
        lambda: _curves(entries, labels, group.by),
    )


def _labels(group: Group, entries: Sequence[RankedRun], settings: Sequence[str]) -> list[str]:
    """For each run its rank, and what tells it apart: the first of the settings, or its name."""
    last_parts = [name.rpartition(".")[2] for name in group.settings]
    labels = []
    for entry in entries:
        parts = []
        for name in settings[:LABELLED_SETTINGS]:
            last = name.rpartition(".")[2]
            short = last if last_parts.count(last) == 1 else name
            parts.append(f"{short} {_ending(setting_text(group.differing_settings(entry)[name]), 24)}")
        if len(settings) > LABELLED_SETTINGS:
            parts.append("...")
        labels.append(f"{entry.label}  {', '.join(parts) or shortened(entry.name, 50)}")
    return labels


def _curves(entries: Sequence[RankedRun], labels: Sequence[str], by: Criterion) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    best = [entry for entry in entries if entry.colour != GREY]
    legend = [
        (
            label,
            Line2D([], [], color=entry.colour, marker=marker_of(entry.colour), markersize=4, linewidth=1.7),
        )
        for label, entry in zip(labels, entries, strict=True)
        if entry.colour != GREY
    ]
    if len(entries) > len(best):
        grey = Line2D([], [], color=GREY, linewidth=0.9)
        legend.append((f"{len(entries) - len(best)} of lower rank", grey))
    for text, width in (("validation loss", 1.7), ("training loss, in evaluation mode", 0.7)):
        legend.append((text, Line2D([], [], color=GREY, linewidth=width)))
    columns = 1 if max(map(len, labels)) > WRAP_AT else 2
    height = PANEL_HEIGHT + math.ceil(len(legend) / columns) * LEGEND_LINE
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, metric in zip(panels, ("", "" if by == BY_LOSS else by.metric), strict=True):
        for entry in reversed(entries):  # the best on top
            _draw(panel, entry, metric)
        panel.grid(visible=True)
        panel.set(xlabel="Tokens seen", ylabel=metric or "Loss (nats per token)")
        panel.xaxis.set_major_formatter(tokens_text)
        panel.margins(x=0.02)
    runs = [entry.run for entry in best or entries if entry.run is not None]
    panels[0].set(title="all", ylim=_whole_range([entry.run for entry in entries if entry.run is not None]))
    if by == BY_LOSS:
        tokens, losses = _lowest_part(runs)
        panels[1].set(title="where they are lowest", xlim=tokens, ylim=losses)
    texts, handles = zip(*legend, strict=True)
    figure.legend(handles, texts, loc="outside lower left", ncols=columns, fontsize=8)
    return figure


def _draw(panel: "Axes", entry: RankedRun, metric: str) -> None:
    """Draw the losses, or another metric."""
    assert entry.run is not None
    evaluations = entry.run.evaluations
    tokens = [each.tokens_seen for each in evaluations]
    best = entry.colour != GREY
    marker = marker_of(entry.colour) if len(evaluations) <= MARKED_EVALUATIONS else ""
    val = [finite(each.metrics.get(metric, math.nan) if metric else each.val_loss) for each in evaluations]
    panel.plot(tokens, val, color=entry.colour, linewidth=1.7 if best else 0.9, marker=marker, markersize=4)
    if best and not metric:
        train = [finite(each.train_loss) for each in evaluations]
        panel.plot(tokens, train, color=entry.colour, linewidth=0.7, alpha=0.8)


def _whole_range(runs: Sequence[RunRecord]) -> tuple[float, float]:
    """From the lowest loss to the highest first one: a curve that diverges leaves the picture."""
    losses = [loss for run in runs for each in run.evaluations for loss in (each.val_loss, each.train_loss)]
    low = min(filter(math.isfinite, losses))
    high = max(next(filter(math.isfinite, (each.val_loss for each in run.evaluations))) for run in runs)
    margin = 0.05 * ((high - low) or 1)
    return low - margin, high + margin


def _lowest_part(runs: Sequence[RunRecord]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Tokens and losses around the best losses of the better half of these runs."""
    bests = [run.best.val_loss for run in runs if run.best is not None]
    low, high = _whole_range(runs)
    spread = max(statistics.median(bests) - min(bests), 0.08 * (high - low))
    limits = min(bests) - 0.5 * spread, statistics.median(bests) + 0.7 * spread
    inside = [
        before.tokens_seen
        for run in runs
        for before, each in itertools.pairwise(run.evaluations)
        if each.val_loss <= limits[1]
    ]
    end = max(each.tokens_seen for run in runs for each in run.evaluations)
    start = min(inside, default=0)
    margin = 0.03 * ((end - start) or 1)
    return (start - margin, end + margin), limits


# --- pictures of settings -------------------------------------------------------------------------------

MOST_AXES = 8
MOST_LABELS = 8
"""On one axis; of more values every second, third, ... is named."""
CLOSE = 0.07
"""Labels of values that are nearer than this part of the axis would overlap."""


def parallel_picture(
    axes: Sequence[Axis], values: Sequence[float], colours: Sequence[str], *, title: str, name: str
) -> Picture:
    """A line for each run, from setting to setting to the value it reached, which `title` names.

    The first MOST_AXES axes are drawn. Runs are in the order of their ranking, with the colours of their
    learning curves.
    """
    shown = axes[:MOST_AXES]
    reached = Axis(name=title, values=values)
    return _picture(
        name,
        f"Parallel coordinates: {', '.join(axis.name for axis in shown)} and the {title}",
        lambda: _parallel([*shown, reached], colours),
    )


def _parallel(axes: Sequence[Axis], colours: Sequence[str]) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 3.6))
    panel = figure.add_axes((0.01, 0.05, 0.98, 0.78))
    heights = [axis.places() for axis in axes]
    for run in reversed(range(len(colours))):  # the best on top
        width, alpha = (0.8, 0.6) if colours[run] == GREY else (1.6, 0.9)
        line = [height[run] for height in heights]
        panel.plot(line, color=colours[run], linewidth=width, alpha=alpha, marker="o", markersize=3)
    behind = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.75, "pad": 0.8}
    text: Any = {"zorder": 4, "bbox": behind}
    for place, axis in enumerate(axes):
        panel.plot([place, place], [0, 1], color=LINE, linewidth=0.8, zorder=0)
        title = shortened(axis.title, 30).replace(".", ".\n")
        panel.text(place, 1.06, title, ha="center", va="bottom", fontsize=8, fontweight="bold", **text)
        for height, value in _value_labels(axis):
            panel.annotate(
                value, (place, height), (6, 0), textcoords="offset points", va="center", fontsize=7, **text
            )
    panel.set_xlim(-0.25, len(axes) - 0.65)
    panel.set_axis_off()
    return figure


def _value_labels(axis: Axis) -> list[tuple[float, str]]:
    """Places on the axis with the values there, some left out so that they do not overlap."""
    pairs = sorted(dict(zip(axis.places(), axis.values, strict=True)).items())
    every = math.ceil(len(pairs) / MOST_LABELS)
    kept = pairs if every == 1 else [*pairs[:-1:every], pairs[-1]]
    apart = kept[:1]
    for where, value in kept[1:]:
        if where - apart[-1][0] < CLOSE and where == 1.0 and len(apart) > 1:
            apart.pop()  # the ends matter more
        if where - apart[-1][0] >= CLOSE:
            apart.append((where, value))
    return [(where, _ending(setting_text(value), 14)) for where, value in apart]


def importance_picture(shares: Sequence[tuple[Axis, float]], *, name: str) -> Picture:
    """A bar for each setting, the largest on top."""
    return _picture(
        name,
        "Importance: " + ", ".join(f"{axis.title} {share:.0%}" for axis, share in shares),
        lambda: _bars(shares),
    )


def _bars(shares: Sequence[tuple[Axis, float]]) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 0.32 * len(shares) + 0.5), layout="constrained")
    panel = figure.subplots()
    widths = [100 * share for _, share in shares]
    bars = panel.barh(range(len(shares)), widths, color=COLOURS[0], height=0.62)
    panel.bar_label(bars, [f"{width:.0f} %" for width in widths], padding=3)
    panel.set_yticks(range(len(shares)), [shortened(axis.title, 60) for axis, _ in shares])
    panel.set(xlim=(0, 1.15 * max(widths)), xticks=[])
    panel.invert_yaxis()
    panel.spines["bottom"].set_visible(False)
    panel.tick_params(length=0)
    return figure
