"""The learning curves of several runs in one picture."""

import itertools
import math
import statistics
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gptpl.files.figures import COLOURS, GREY, marker_of
from gptpl.records.run_record import RunRecord
from gptpl.reports.drawing import Picture, bare, picture
from gptpl.reports.ranking import BY_LOSS, Criterion, Entry, Group
from gptpl.reports.texts import ending
from gptpl.text import setting_text, shortened
from gptpl.training.loss_axes import finite, tokens_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE_INCHES, NARROW_INCHES = 9.0, 4.4
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
    labels = run_labels(group, entries, settings)
    runs = "1 run" if len(entries) == 1 else f"{len(entries)} runs"
    return picture(
        name,
        f"Validation and training loss of {runs} against tokens seen",
        lambda narrow: _figure(entries, labels, group.by, narrow=narrow),
    )


def run_labels(group: Group, entries: Sequence[Entry], settings: Sequence[str]) -> list[str]:
    """For each entry its rank, and what tells it apart: the first of the settings, or its name."""
    names = list(settings)[:LABELLED_SETTINGS]
    last_parts = [name.rpartition(".")[2] for name in group.settings]
    labels = []
    for entry in entries:
        parts = []
        for name in names:
            last = name.rpartition(".")[2]
            short = last if last_parts.count(last) == 1 else name
            parts.append(f"{short} {ending(setting_text(group.differing_settings(entry)[name]), 24)}")
        if len(settings) > len(names):
            parts.append("...")
        labels.append(f"{entry.label}  {', '.join(parts) or shortened(entry.name, 50)}")
    return labels


def _figure(entries: Sequence[Entry], labels: Sequence[str], by: Criterion, *, narrow: bool) -> "Figure":
    from matplotlib.figure import Figure

    columns = 1 if narrow or max(map(len, labels)) > WRAP_AT else 2
    labels = (
        [textwrap.fill(label, WRAP_AT, subsequent_indent="   ") for label in labels] if narrow else labels
    )
    lines = sum(label.count("\n") + 1 for label in labels[: len(COLOURS)]) + 3
    lines = math.ceil(lines / columns)
    height = PANEL_HEIGHT * (2 if narrow else 1) + lines * LEGEND_LINE
    figure = Figure(figsize=(NARROW_INCHES if narrow else WIDE_INCHES, height), layout="constrained")
    panels = figure.subplots(2, 1) if narrow else figure.subplots(1, 2)
    for panel, metric in zip(panels, ("", "" if by == BY_LOSS else by.metric), strict=True):
        for entry in reversed(entries):  # the best on top
            _draw(panel, entry, metric)
        bare(panel, grid="both")
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
    began = [next(each.val_loss for each in run.evaluations if math.isfinite(each.val_loss)) for run in runs]
    high = max(began)
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
