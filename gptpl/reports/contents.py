"""The content of a report, before it is written as HTML, Markdown or lines of a terminal."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gptpl.files.figures import COLOURS
from gptpl.files.run_record import BITS_PER_BYTE, RunRecord
from gptpl.reports.pictures import MOST_AXES, Picture, curves_picture, importance_picture, parallel_picture
from gptpl.reports.ranking import BY_LOSS, COLUMNS, Criterion, Failure, Group, RankedRun, groups, measures
from gptpl.reports.settings import axes, importance
from gptpl.text import NONE, loss_text, setting_text

FEWEST_LINES = 3
"""With fewer runs, parallel coordinates say less than the table."""
SEQUENCE_SETTINGS = (
    *("data.max_length", "data.stride", "data.packing", "eval_val_batches", "data.batch_size"),
)
"""Settings that decide which sequences of the validation text a loss is measured on."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """The runs of one group.

    Attributes:
        columns: headings of the table after rank and run.
        rows: each run with its cells.
        notes: how to read the table.
        curves: None without any evaluations.
        parallel: the settings; None for too few runs or settings.
        parallel_note: what is not drawn.
        bars: the importance of the settings; None without any.
        importance_note: how reliable it is, or why there is none.
    """

    group: Group
    columns: Sequence[str]
    rows: Sequence[tuple[RankedRun, Sequence[str]]]
    notes: Sequence[str]
    curves: Picture | None
    parallel: Picture | None
    parallel_note: str
    bars: Picture | None
    importance_note: str

    @property
    def pictures(self) -> list[Picture]:
        """All that exist."""
        return [each for each in (self.curves, self.parallel, self.bars) if each is not None]


@dataclass(frozen=True, kw_only=True)
class Contents:
    """A whole report; `problems` are the errors of the runs that could not be read."""

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
    """Rank, measure and draw."""
    found = groups(records, failures, by)
    entries = [entry for group in found for entry in group.entries]
    states = Counter(entry.state for entry in entries) | Counter(damaged=len(problems))
    notes = []
    if not states["finished"]:
        notes.append("No run has finished: the report shows what there is so far.")
    if sum(bool(group.ranked) for group in found) > 1:
        notes.append(
            "These runs differ in their text, its split or the tokenizer. Losses in nats per token cannot be"
            " compared between them: each group has a ranking of its own (by=val/bits_per_byte compares"
            " tokenizers)."
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
    varied = axes(group.settings, [entry.run for entry in finished if entry.run is not None])
    shares, importance_note = importance(varied, [group.by.sign * entry.value for entry in finished])
    order = [axis for axis, _ in shares]
    drawn = [*order, *(axis for axis in varied if axis not in order)]
    parallel = None
    if drawn and len(finished) >= FEWEST_LINES:
        parallel = parallel_picture(
            drawn,
            [entry.value for entry in finished],
            [entry.colour for entry in finished],
            title=group.by.title,
            name=f"report-settings{suffix}",
        )
    parallel_notes = [
        f"{axis.name} stands for {', '.join(axis.together)} too, which change with it."
        for axis in drawn[:MOST_AXES]
        if axis.together
    ]
    if left := [axis.name for axis in drawn[MOST_AXES:]]:
        parallel_notes.append(f"Not drawn: {', '.join(left)}.")
    columns, rows = _table(group)
    names = [axis.name for axis in drawn] or group.settings
    return Section(
        group=group,
        columns=columns,
        rows=rows,
        notes=_table_notes(group),
        curves=curves_picture(group, names, name=f"report-curves{suffix}"),
        parallel=parallel,
        parallel_note=" ".join(parallel_notes),
        bars=importance_picture(shares, name=f"report-importance{suffix}") if shares else None,
        importance_note=importance_note,
    )


def _table(group: Group) -> tuple[list[str], list[tuple[RankedRun, list[str]]]]:
    """The metric of the ranking, loss, state, settings that differ, costs, and errors."""
    by_value = group.by != BY_LOSS
    trials = any(entry.overrides for entry in group.entries)
    errors = any(entry.error for entry in group.entries)
    # Of those where the loss is lowest three columns, but two where runs are ranked by the third.
    first = 2 if group.by.metric == BITS_PER_BYTE else 3
    columns = [group.by.title] * by_value + [*COLUMNS[:first], "state", *group.settings, *COLUMNS[3:]]
    columns += ["overrides"] * trials + ["error"] * errors
    rows = []
    for entry in group.entries:
        cells = measures(entry.run)
        settings = map(setting_text, group.differing_settings(entry).values())
        row = [loss_text(entry.value)] * by_value + [*cells[:first], entry.state, *settings, *cells[3:]]
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
    differing = [name for name in SEQUENCE_SETTINGS if name in group.settings]
    limited = any(run.settings.get("eval_val_batches") not in (None, "None") for run in group.runs)
    if differing and (limited or differing != ["data.batch_size"]):
        notes.append(
            f"The runs differ in {', '.join(differing)}: their losses are means over different sequences of"
            " the validation text, which may cause small differences; gptpl evaluate measures them alike."
        )
    if any(run.record.get("resumed") for run in group.runs):
        notes.append("A time with * is that of a resumed run, without the parts that were killed.")
    return notes


# --- samples of the same prompt -------------------------------------------------------------------------

MOST_TEXTS = len(COLOURS)


@dataclass(frozen=True, kw_only=True)
class SharedPrompt:
    """A prompt, the strategy of sampling, and the runs' last continuations, the best run first.

    Attributes:
        texts: run, when (such as `step 1,200`), continuation.
        left_out: the number of runs of lower rank with such a sample.
    """

    prompt: str
    strategy: str
    texts: Sequence[tuple[RankedRun, str, str]]
    left_out: int


def shared_prompts(entries: Sequence[RankedRun]) -> list[SharedPrompt]:
    """The prompts and strategies that at least two runs share, or all of a single run."""
    runs = [(entry, entry.run.samples()) for entry in entries if entry.run is not None]
    found: dict[str, dict[int, tuple[RankedRun, Mapping[str, Any]]]] = {}
    for entry, samples in runs:
        for sample in samples:
            if isinstance(sample.get("prompt"), str) and isinstance(sample.get("continuation"), str):
                key = json.dumps([sample["prompt"], sample.get("strategy")], sort_keys=True)
                found.setdefault(key, {})[id(entry)] = entry, sample  # the last one stays
    shared = []
    for by_run in found.values():
        if len(by_run) >= min(2, len(runs)):
            made = list(by_run.values())
            shared.append(
                SharedPrompt(
                    prompt=made[0][1]["prompt"],
                    strategy=_strategy_text(made[0][1].get("strategy")),
                    texts=[(entry, _when(each), each["continuation"]) for entry, each in made[:MOST_TEXTS]],
                    left_out=max(len(made) - MOST_TEXTS, 0),
                )
            )
    return shared


def _when(sample: Mapping[str, Any]) -> str:
    step = sample.get("step")
    return f"step {step:,}" if isinstance(step, int) else ""


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
