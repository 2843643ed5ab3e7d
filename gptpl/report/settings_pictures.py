"""What the settings did: parallel coordinates, and bars of importance."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gptpl.report.axes import Axis
from gptpl.report.drawing import LINE, PAPER, Picture, bare, picture
from gptpl.report.palette import COLOURS, GREY
from gptpl.report.plain_text import ending, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_AXES = 8
MOST_LABELS = 8
"""Of one axis; of more values every second, third, ... is named."""
CLOSE = 0.07
"""Of an axis: texts of values nearer than this would overlap."""
_BEHIND = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.75, "pad": 0.8}
WIDE_INCHES, NARROW_INCHES = 9.0, 4.4


def parallel_picture(
    axes: Sequence[Axis], losses: Sequence[float], colours: Sequence[str], *, name: str
) -> Picture:
    """A line a run, from setting to setting to its loss.

    Args:
        axes: settings with a value for each run, the first MOST_AXES of which are drawn.
        losses: one a run, the best first.
        colours: one a run, those of the learning curves.
        name: of the file.
    """
    shown = list(axes)[:MOST_AXES]
    loss = Axis(name="validation loss", together=[], values=list(losses), numeric=True, measured=True)
    return picture(
        name,
        f"Parallel coordinates: {', '.join(axis.name for axis in shown)} and the validation loss",
        lambda narrow: _parallel(shown, loss, colours, narrow=narrow),
    )


def _parallel(axes: Sequence[Axis], loss: Axis, colours: Sequence[str], *, narrow: bool) -> "Figure":
    from matplotlib.figure import Figure

    size = (NARROW_INCHES, 0.95 * len(axes) + 1.2) if narrow else (WIDE_INCHES, 3.6)
    figure = Figure(figsize=size)
    panel = figure.add_axes((0.03, 0.03, 0.94, 0.94) if narrow else (0.01, 0.05, 0.98, 0.78))
    columns = [axis.places() for axis in (*axes, loss)]
    places = range(len(columns))
    for run in reversed(range(len(colours))):  # the best on top
        values = [column[run] for column in columns]
        best = colours[run] != GREY
        style = {"linewidth": 1.6 if best else 0.8, "alpha": 0.9 if best else 0.6, "color": colours[run]}
        points = (values, [-place for place in places]) if narrow else (list(places), values)
        panel.plot(*points, marker="o", markersize=3, **style)  # type: ignore[arg-type]
    for place, axis in enumerate((*axes, loss)):
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
