"""The pictures of a report: learning curves, settings as parallel coordinates, their importance."""

import io
import itertools
import math
import re
import statistics
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptpl.evaluation.loss_curves import finite, tokens_text
from gptpl.files.figures import COLOURS, DOTS_PER_INCH, GREY, marker_of
from gptpl.files.run_record import RunRecord
from gptpl.reports.ranking import BY_LOSS, Criterion, Entry, Group
from gptpl.reports.settings import Axis
from gptpl.text import count_text, one_line, setting_text, shortened

if TYPE_CHECKING:  # matplotlib takes long to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, LINE, PAPER = "#010203", "#c7c8cc", "#fefdfe"
"""Text, lines of the axes and what is behind a text: in an SVG they become the page's own colours."""
WIDE_INCHES, NARROW_INCHES = 9.0, 4.4


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure in two shapes, for wide and narrow pages, as SVG that takes the page's colours, and as PNG."""

    name: str
    """Of the PNG file, without its ending."""
    alt: str
    """What it shows, for those who do not see it."""
    png: bytes
    """For Markdown."""
    wide: str
    """An `<svg>` element, for HTML, as `narrow`."""
    narrow: str


def _picture(name: str, alt: str, draw: Callable[[bool], "Figure"]) -> Picture:
    """Draws both shapes; `draw` takes whether the figure is the narrow one."""
    from matplotlib import rc_context

    style: Any = {
        **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), LINE),
        **dict.fromkeys(("axes.labelcolor", "text.color", "xtick.labelcolor", "ytick.labelcolor"), INK),
        "axes.facecolor": "none",
        "axes.titlesize": 9,
        "font.family": ["sans-serif"],
        "font.size": 9,
        "legend.frameon": False,
        "svg.fonttype": "none",  # text that can be read aloud, searched and copied
        "text.parse_math": False,  # a dollar in a setting is a dollar
    }
    png = io.BytesIO()
    with rc_context(style):
        wide, narrow = draw(False), draw(True)
        wide.savefig(png, format="png", dpi=DOTS_PER_INCH, facecolor="white", metadata={"Software": None})
        svgs = _svg(wide, salt=name), _svg(narrow, salt=f"{name}-narrow")
    return Picture(name=name, alt=alt, png=png.getvalue(), wide=svgs[0], narrow=svgs[1])


def _svg(figure: "Figure", *, salt: str) -> str:
    from matplotlib import rc_context

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.hashsalt": salt}):  # names within the SVG that no other one of the page has
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<style type=\"text/css\">.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r' (?:width|height)="[^"]*"', "", text, count=2)  # the page decides
    text = re.sub(r'<g id="', f'<g id="{salt}-', text)
    for colour, name in ((INK, "ink"), (LINE, "line"), (PAPER, "paper")):
        text = text.replace(colour, f"var(--{name})")
    return text


def _bare(axes: "Axes", *, grid: str) -> None:
    """Takes away the frame and shows a faint grid along "x", "y" or "both"."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(visible=True, axis=grid, linewidth=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def _ending(text: str, length: int) -> str:
    """The last characters of one line: of paths, those that tell them apart."""
    line = one_line(text)
    return line if len(line) <= length else "\N{HORIZONTAL ELLIPSIS}" + line[1 - length :]


# --- learning curves ------------------------------------------------------------------------------------

PANEL_HEIGHT, LEGEND_LINE = 3.3, 0.19
"""Inches."""
MARKED_EVALUATIONS = 30
"""Up to so many evaluations of a run get a sign each; more would run into a thick line."""
LABELLED_SETTINGS = 4
WRAP_AT = 60
"""So many characters of the legend fit into a narrow picture, or into half of a wide one."""


def curves_picture(group: Group, settings: Sequence[str], *, name: str) -> Picture | None:
    """Losses against tokens seen; beside it where they are lowest, or what runs are ranked by instead.

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
        lambda narrow: _figure(entries, labels, group.by, narrow=narrow),
    )


def _labels(group: Group, entries: Sequence[Entry], settings: Sequence[str]) -> list[str]:
    """For each entry its rank, and what tells it apart: the first of the settings, or its name."""
    names = list(settings)[:LABELLED_SETTINGS]
    last_parts = [name.rpartition(".")[2] for name in group.settings]
    labels = []
    for entry in entries:
        parts = []
        for name in names:
            last = name.rpartition(".")[2]
            short = last if last_parts.count(last) == 1 else name
            parts.append(f"{short} {_ending(setting_text(group.differing_settings(entry)[name]), 24)}")
        if len(settings) > len(names):
            parts.append("...")
        labels.append(f"{entry.label}  {', '.join(parts) or shortened(entry.name, 50)}")
    return labels


def _figure(entries: Sequence[Entry], labels: Sequence[str], by: Criterion, *, narrow: bool) -> "Figure":
    from matplotlib.figure import Figure

    columns = 1 if narrow or max(map(len, labels)) > WRAP_AT else 2
    if narrow:
        labels = [textwrap.fill(label, WRAP_AT, subsequent_indent="   ") for label in labels]
    lines = sum(label.count("\n") + 1 for label in labels[: len(COLOURS)]) + 3
    height = PANEL_HEIGHT * (2 if narrow else 1) + math.ceil(lines / columns) * LEGEND_LINE
    figure = Figure(figsize=(NARROW_INCHES if narrow else WIDE_INCHES, height), layout="constrained")
    panels = figure.subplots(2, 1) if narrow else figure.subplots(1, 2)
    for panel, metric in zip(panels, ("", "" if by == BY_LOSS else by.metric), strict=True):
        for entry in reversed(entries):  # the best on top
            _draw(panel, entry, metric)
        _bare(panel, grid="both")
        panel.set_xlabel("Tokens seen")
        panel.set_ylabel(metric or "Loss (nats per token)")
        panel.xaxis.set_major_formatter(tokens_text)
        panel.margins(x=0.02)
    runs = [entry.run for entry in entries if entry.run is not None]
    panels[0].set_title("all")
    panels[0].set_ylim(*_whole_range(runs))
    if by == BY_LOSS:
        panels[1].set_title("where they are lowest")
        (left, right), limits = _lowest_part(
            [entry.run for entry in entries if entry.run and entry.colour != GREY] or runs
        )
        panels[1].set_xlim(left, right)
        panels[1].set_ylim(*limits)
    _legend(figure, entries, labels, columns=columns)
    return figure


def _draw(panel: "Axes", entry: Entry, metric: str) -> None:
    """The losses, or another metric."""
    assert entry.run is not None
    evaluations = entry.run.evaluations
    tokens = [each.tokens_seen for each in evaluations]
    best = entry.colour != GREY
    marker = marker_of(entry.colour) if len(evaluations) <= MARKED_EVALUATIONS else ""
    val = [finite(each.metrics.get(metric, math.nan) if metric else each.val_loss) for each in evaluations]
    train = [finite(each.train_loss) for each in evaluations]
    width = 1.7 if best else 0.9
    panel.plot(tokens, val, color=entry.colour, linewidth=width, marker=marker, markersize=4)
    if best and not metric:
        panel.plot(tokens, train, color=entry.colour, linewidth=0.7, alpha=0.8)


def _legend(figure: "Figure", entries: Sequence[Entry], labels: Sequence[str], *, columns: int) -> None:
    from matplotlib.lines import Line2D

    pairs = [pair for pair in zip(entries, labels, strict=True) if pair[0].colour != GREY]
    handles = [
        Line2D([], [], color=entry.colour, marker=marker_of(entry.colour), markersize=4, linewidth=1.7)
        for entry, _ in pairs
    ]
    texts = [label for _, label in pairs]
    if len(entries) > len(pairs):
        handles.append(Line2D([], [], color=GREY, linewidth=0.9))
        texts.append(f"{len(entries) - len(pairs)} of lower rank")
    for text, width in (("validation loss", 1.7), ("training loss, in evaluation mode", 0.7)):
        handles.append(Line2D([], [], color=GREY, linewidth=width))
        texts.append(text)
    figure.legend(handles, texts, loc="outside lower left", ncols=columns, fontsize=8)


def _whole_range(runs: Sequence[RunRecord]) -> tuple[float, float]:
    """From the lowest loss to the highest that a run began with; what diverges leaves the picture."""
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


# --- settings -------------------------------------------------------------------------------------------

MOST_AXES = 8
MOST_LABELS = 8
"""Of one axis; of more values every second, third, ... is named."""
CLOSE = 0.07
"""Of an axis: texts of values nearer than this would overlap."""
_BEHIND = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.75, "pad": 0.8}


def parallel_picture(
    axes: Sequence[Axis], values: Sequence[float], colours: Sequence[str], *, title: str, name: str
) -> Picture:
    """A line a run, from setting to setting to what it reached: its value, which `title` names.

    The first MOST_AXES axes are drawn. Runs are in the order of their ranking, with the colours of their
    learning curves.
    """
    shown = axes[:MOST_AXES]
    reached = Axis(name=title, values=values, measured=True)
    return _picture(
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
    places = list(range(len(columns)))
    for run in reversed(range(len(colours))):  # the best on top
        values = [column[run] for column in columns]
        best = colours[run] != GREY
        style = {"linewidth": 1.6 if best else 0.8, "alpha": 0.9 if best else 0.6, "color": colours[run]}
        points = (values, [-place for place in places]) if narrow else (places, values)
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
    return [(where, _ending(axis.text(value), 14)) for where, value in apart]


def importance_picture(shares: Sequence[tuple[Axis, float]], *, name: str) -> Picture:
    """A bar a setting, the largest on top."""
    return _picture(
        name,
        "Importance: " + ", ".join(f"{axis.title} {share:.0%}" for axis, share in shares),
        lambda narrow: _bars(shares, narrow=narrow),
    )


def _bars(shares: Sequence[tuple[Axis, float]], *, narrow: bool) -> "Figure":
    from matplotlib.figure import Figure

    size = (NARROW_INCHES if narrow else WIDE_INCHES, 0.32 * len(shares) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    panel = figure.subplots()
    places = list(range(len(shares)))
    widths = [100 * share for _, share in shares]
    bars = panel.barh(places, widths, color=COLOURS[0], height=0.62)
    panel.bar_label(bars, [f"{width:.0f} %" for width in widths], padding=3)
    panel.set_yticks(places, [shortened(axis.title, 28 if narrow else 60) for axis, _ in shares])
    panel.invert_yaxis()
    panel.set_xlim(0, 1.15 * max(widths))
    _bare(panel, grid="x")
    panel.set_xticks([])
    panel.spines["bottom"].set_visible(False)
    panel.tick_params(length=0)
    return figure
