"""What a report says, before it is written as HTML, Markdown or lines of a terminal."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gptpl.files.figures import COLOURS
from gptpl.records.run_record import RunRecord
from gptpl.reports.curves import curves_picture
from gptpl.reports.drawing import Picture
from gptpl.reports.finding import Failure
from gptpl.reports.ranking import BY_LOSS, NO_CELLS, Criterion, Entry, Group, groups, measures
from gptpl.reports.settings import (
    MOST_AXES,
    Axis,
    Importance,
    axes,
    importance,
    importance_picture,
    parallel_picture,
)
from gptpl.reports.texts import digits, whole
from gptpl.text import NONE, setting_text

FEWEST_LINES = 3
"""Runs below which parallel coordinates say less than the table."""
WINDOW_SETTINGS = ("data.max_length", "data.stride", "eval_val_batches", "data.batch_size")
"""What decides which windows of the validation text a loss is measured on."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """The runs of one group.

    Attributes:
        group: the ranking.
        columns: headings of the table after rank and run.
        rows: each entry with its texts in these columns.
        notes: what to know when reading the table.
        curves: None without any evaluations.
        importance: what settings matter, or why that cannot be said.
        importance_bars: None without shares.
        parallel: parallel coordinates; None for too few runs or settings.
        parallel_note: what is not drawn.
    """

    group: Group
    columns: Sequence[str]
    rows: Sequence[tuple[Entry, Sequence[str]]]
    notes: Sequence[str]
    curves: Picture | None
    importance: Importance
    importance_bars: Picture | None
    parallel: Picture | None
    parallel_note: str


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
    sections = [_section(group, suffix=f"-{place}" if place else "") for place, group in enumerate(found)]
    return Contents(
        title=title,
        facts=_facts(found, problems),
        notes=_notes(found),
        sections=sections,
        samples=shared_prompts([entry for group in found for entry in group.entries]),
        problems=problems,
    )


def _facts(found: Sequence[Group], problems: Sequence[str]) -> dict[str, str]:
    entries = [entry for group in found for entry in group.entries]
    states: dict[str, int] = {}
    for entry in entries:
        states[entry.state] = states.get(entry.state, 0) + 1
    facts = {"runs": f"{len(entries) + len(problems):,}"} | {name: str(n) for name, n in states.items()}
    return facts | ({"damaged": str(len(problems))} if problems else {})


def _notes(found: Sequence[Group]) -> list[str]:
    notes = []
    if not any(entry.state == "finished" for group in found for entry in group.entries):
        notes.append("No run has finished: what follows is all there is.")
    if sum(bool(group.ranked) for group in found) > 1:
        notes.append(
            "These runs differ in their text, its split or the tokenizer. Losses in nats per token cannot be"
            " compared between them: each group has a ranking of its own."
        )
    return notes


def _section(group: Group, *, suffix: str) -> Section:
    finished = [entry for entry in group.ranked if entry.state == "finished"]
    runs = [entry.run for entry in finished if entry.run is not None]
    values = [entry.value for entry in finished]
    varied = axes(group.settings, runs)
    weighed = importance(varied, [group.by.sign * value for value in values])
    order = [axis for axis, _ in weighed.shares]
    drawn = [*order, *(axis for axis in varied if axis not in order)]
    columns, rows = _table(group)
    parallel = None
    if drawn and len(runs) >= FEWEST_LINES:
        colours = [entry.colour for entry in finished]
        parallel = parallel_picture(
            drawn, values, colours, title=group.by.title, name=f"report-settings{suffix}"
        )
    return Section(
        group=group,
        columns=columns,
        rows=rows,
        notes=_table_notes(group),
        curves=curves_picture(
            group, [axis.name for axis in drawn] or group.settings, name=f"report-curves{suffix}"
        ),
        importance=weighed,
        importance_bars=importance_picture(weighed.shares, name=f"report-importance{suffix}")
        if weighed.shares
        else None,
        parallel=parallel,
        parallel_note=_parallel_note(drawn),
    )


def _table(group: Group) -> tuple[list[str], list[tuple[Entry, list[str]]]]:
    """What it is ranked by, loss, how it ended, settings that differ, what it cost, and what went wrong."""
    measured = {id(entry): measures(entry.run).cells() if entry.run else NO_CELLS for entry in group.entries}
    costs = list(NO_CELLS)[2:]
    trials = any(entry.overrides for entry in group.entries)
    errors = any(entry.error for entry in group.entries)
    columns = ["validation loss", "perplexity", "state", *group.settings, *costs]
    columns += ["overrides"] * trials + ["error"] * errors
    ranked_by_loss = group.by == BY_LOSS
    columns = columns if ranked_by_loss else [group.by.title, *columns]
    rows = []
    for entry in group.entries:
        cells = measured[id(entry)]
        settings = [setting_text(value) for value in group.differing_settings(entry).values()]
        row = [cells["validation loss"], cells["perplexity"], entry.state, *settings]
        row = row if ranked_by_loss else [digits(entry.value), *row]
        row += [cells[name] for name in costs]
        row += [entry.overrides or NONE] * trials + [entry.error] * errors
        rows.append((entry, row))
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


def _parallel_note(drawn: Sequence[Axis]) -> str:
    parts = [
        f"{axis.name} stands for {', '.join(axis.together)} too, which change with it."
        for axis in drawn[:MOST_AXES]
        if axis.together
    ]
    left = [axis.name for axis in drawn[MOST_AXES:]]
    if left:
        parts.append(f"Not drawn: {', '.join(left)}.")
    return " ".join(parts)


# --- the same prompt ------------------------------------------------------------------------------------

MOST_TEXTS = len(COLOURS)
LEFT_OUT = "Left out: {} of lower rank."


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
    runs = [entry for entry in entries if entry.run is not None]
    found: dict[str, list[tuple[Entry, Mapping[str, Any]]]] = {}
    for entry in runs:
        for key, sample in _last_samples(entry).items():
            found.setdefault(key, []).append((entry, sample))
    needed = min(2, len(runs))
    return [_shared(made) for made in found.values() if len(made) >= needed]


def _last_samples(entry: Entry) -> dict[str, Mapping[str, Any]]:
    samples = entry.run.samples() if entry.run is not None else []
    return {
        json.dumps([sample["prompt"], sample.get("strategy")], sort_keys=True): sample
        for sample in samples
        if isinstance(sample.get("prompt"), str) and isinstance(sample.get("continuation"), str)
    }


def _shared(made: Sequence[tuple[Entry, Mapping[str, Any]]]) -> SharedPrompt:
    first = made[0][1]
    return SharedPrompt(
        prompt=first["prompt"],
        strategy=_strategy_text(first.get("strategy")),
        texts=[(entry, _when(sample), sample["continuation"]) for entry, sample in made[:MOST_TEXTS]],
        left_out=max(len(made) - MOST_TEXTS, 0),
    )


def _when(sample: Mapping[str, Any]) -> str:
    step = sample.get("step")
    return f"step {whole(step)}" if isinstance(step, int) else ""


def _strategy_text(strategy: Any) -> str:
    if not isinstance(strategy, dict):
        return ""
    if strategy.get("temperature") == 0 and not any(
        value for name, value in strategy.items() if name != "temperature"
    ):
        return "greedy"
    given = {name: value for name, value in strategy.items() if value is not None}
    return ", ".join(
        f"{name} {setting_text(value if isinstance(value, bool | int | float) else str(value))}"
        for name, value in given.items()
    )
