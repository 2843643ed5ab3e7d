"""What a report says, before it is written as HTML, Markdown or lines of a terminal."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gptpl.files.figures import COLOURS
from gptpl.files.run_record import RunRecord
from gptpl.reports.pictures import MOST_AXES, Picture, curves_picture, importance_picture, parallel_picture
from gptpl.reports.ranking import (
    BY_LOSS,
    COLUMNS,
    Criterion,
    Entry,
    Failure,
    Group,
    digits,
    groups,
    measures,
    whole,
)
from gptpl.reports.settings import Importance, axes, importance
from gptpl.text import NONE, setting_text

FEWEST_LINES = 3
"""Runs below which parallel coordinates say less than the table."""
WINDOW_SETTINGS = ("data.max_length", "data.stride", "eval_val_batches", "data.batch_size")
"""What decides which windows of the validation text a loss is measured on."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """The runs of one group; `notes` are what to know when reading the table."""

    group: Group
    columns: Sequence[str]
    """Headings of the table after rank and run."""
    rows: Sequence[tuple[Entry, Sequence[str]]]
    """Each entry with its texts in these columns."""
    notes: Sequence[str]
    curves: Picture | None
    """None without any evaluations."""
    importance: Importance
    importance_bars: Picture | None
    """None without shares."""
    parallel: Picture | None
    """None for too few runs or settings."""
    parallel_note: str
    """What is not drawn."""

    @property
    def pictures(self) -> list[Picture]:
        """All that there are."""
        return [each for each in (self.curves, self.parallel, self.importance_bars) if each is not None]


@dataclass(frozen=True, kw_only=True)
class Contents:
    """All of a report; `problems` are the runs that could not be read."""

    title: str
    facts: dict[str, str]
    notes: Sequence[str]
    sections: Sequence[Section]
    samples: "Sequence[SharedPrompt]"
    problems: Sequence[str]


def contents(
    records: Sequence[RunRecord],
    failures: Sequence[Failure],
    *,
    title: str,
    problems: Sequence[str] = (),
    by: Criterion = BY_LOSS,
) -> Contents:
    """Ranks, measures and draws."""
    found = groups(records, failures, by)
    entries = [entry for group in found for entry in group.entries]
    states = Counter(entry.state for entry in entries) | Counter(damaged=len(problems))
    notes = []
    if not states["finished"]:
        notes.append("No run has finished: what follows is all there is.")
    if sum(bool(group.ranked) for group in found) > 1:
        notes.append(
            "These runs differ in their text, its split or the tokenizer. Losses in nats per token cannot be"
            " compared between them: each group has a ranking of its own."
        )
    return Contents(
        title=title,
        facts={"runs": f"{states.total():,}"} | {name: str(n) for name, n in states.items()},
        notes=notes,
        sections=[_section(group, suffix=f"-{place}" if place else "") for place, group in enumerate(found)],
        samples=shared_prompts(entries),
        problems=problems,
    )


def _section(group: Group, *, suffix: str) -> Section:
    finished = [entry for entry in group.ranked if entry.state == "finished"]
    runs = [entry.run for entry in finished if entry.run is not None]
    values = [entry.value for entry in finished]
    varied = axes(group.settings, runs)
    weighed = importance(varied, [group.by.sign * value for value in values])
    order = [axis for axis, _ in weighed.shares]
    drawn = [*order, *(axis for axis in varied if axis not in order)]
    columns, rows = _table(group)
    parallel = bars = None
    if drawn and len(runs) >= FEWEST_LINES:
        colours = [entry.colour for entry in finished]
        parallel = parallel_picture(
            drawn, values, colours, title=group.by.title, name=f"report-settings{suffix}"
        )
    if weighed.shares:
        bars = importance_picture(weighed.shares, name=f"report-importance{suffix}")
    parallel_notes = [
        f"{axis.name} stands for {', '.join(axis.together)} too, which change with it."
        for axis in drawn[:MOST_AXES]
        if axis.together
    ]
    if left := [axis.name for axis in drawn[MOST_AXES:]]:
        parallel_notes.append(f"Not drawn: {', '.join(left)}.")
    names = [axis.name for axis in drawn] or group.settings
    return Section(
        group=group,
        columns=columns,
        rows=rows,
        notes=_table_notes(group),
        curves=curves_picture(group, names, name=f"report-curves{suffix}"),
        importance=weighed,
        importance_bars=bars,
        parallel=parallel,
        parallel_note=" ".join(parallel_notes),
    )


def _table(group: Group) -> tuple[list[str], list[tuple[Entry, list[str]]]]:
    """What it is ranked by, loss, how it ended, settings that differ, what it cost, and what went wrong."""
    by_value = group.by != BY_LOSS
    trials = any(entry.overrides for entry in group.entries)
    errors = any(entry.error for entry in group.entries)
    columns = [group.by.title] * by_value + [*COLUMNS[:2], "state", *group.settings, *COLUMNS[2:]]
    columns += ["overrides"] * trials + ["error"] * errors
    rows = []
    for entry in group.entries:
        loss, perplexity, *costs = measures(entry.run)
        settings = map(setting_text, group.differing_settings(entry).values())
        row = [digits(entry.value)] * by_value + [loss, perplexity, entry.state, *settings, *costs]
        rows.append((entry, row + [entry.overrides or NONE] * trials + [entry.error] * errors))
    return columns, rows


def _table_notes(group: Group) -> list[str]:
    notes = []
    if len(group.ranked) > 1:
        notes.append(
            f"Ranked by the {'lowest' if group.by.mode == 'min' else 'highest'} {group.by.title} after the"
            f" first step{', in nats per token' if group.by == BY_LOSS else ''}; with the settings that"
            " differ."
        )
    if len(group.ranked) > len(COLOURS):
        notes.append(f"The best {len(COLOURS)} have a colour; all others are grey.")
    windows = [name for name in WINDOW_SETTINGS if name in group.settings]
    limited = any(run.settings.get("eval_val_batches") not in (None, "None") for run in group.runs)
    if windows and (limited or windows != ["data.batch_size"]):
        notes.append(
            f"The runs differ in {', '.join(windows)}: their losses are means over other windows of the"
            " validation text. A small difference may come of that; gptpl evaluate measures them alike."
        )
    if any(run.record.get("resumed") for run in group.runs):
        notes.append("A time with * is a resumed run's: of its parts, those that were killed are not in it.")
    return notes


# --- the same prompt ------------------------------------------------------------------------------------

MOST_TEXTS = len(COLOURS)


@dataclass(frozen=True, kw_only=True)
class SharedPrompt:
    """A prompt, how it was continued, and the runs' last continuations, the best run first."""

    prompt: str
    strategy: str
    texts: Sequence[tuple[Entry, str, str]]
    """Run, when (such as `step 1,200`), continuation."""
    left_out: int
    """Runs with such a sample that are not among the first ones."""


def shared_prompts(entries: Sequence[Entry]) -> list[SharedPrompt]:
    """The prompts and strategies that two runs or more have, or all of a single run, in the runs' order."""
    runs = [(entry, entry.run.samples()) for entry in entries if entry.run is not None]
    found: dict[str, dict[int, tuple[Entry, Mapping[str, Any]]]] = {}
    for entry, samples in runs:
        for sample in samples:
            if isinstance(sample.get("prompt"), str) and isinstance(sample.get("continuation"), str):
                key = json.dumps([sample["prompt"], sample.get("strategy")], sort_keys=True)
                found.setdefault(key, {})[id(entry)] = entry, sample  # the last one stays
    shared = []
    for made in found.values():
        if len(made) >= min(2, len(runs)):
            [(_, first), *_] = made.values()
            shared.append(
                SharedPrompt(
                    prompt=first["prompt"],
                    strategy=_strategy_text(first.get("strategy")),
                    texts=[(entry, _when(sample), sample["continuation"]) for entry, sample in made.values()][
                        :MOST_TEXTS
                    ],
                    left_out=max(len(made) - MOST_TEXTS, 0),
                )
            )
    return shared


def _when(sample: Mapping[str, Any]) -> str:
    step = sample.get("step")
    return f"step {whole(step)}" if isinstance(step, int) else ""


def _strategy_text(strategy: Any) -> str:
    if not isinstance(strategy, dict):
        return ""
    if strategy.get("temperature") == 0 and not any({**strategy, "temperature": 0}.values()):
        return "greedy"
    return ", ".join(
        f"{name} {setting_text(value if isinstance(value, bool | int | float) else str(value))}"
        for name, value in strategy.items()
        if value is not None
    )
