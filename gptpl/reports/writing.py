"""A report: its content, written as one HTML document, as Markdown with pictures, as lines of a terminal."""

import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptpl.errors import InputError
from gptpl.files.durable import write_atomically
from gptpl.files.figures import COLOURS
from gptpl.files.run_record import BITS_PER_BYTE, RunError, RunRecord, parse_yaml, read_mapping
from gptpl.files.template import package_templates
from gptpl.reports.pictures import (
    MOST_AXES,
    Picture,
    axes,
    curves_picture,
    importance,
    importance_picture,
    parallel_picture,
)
from gptpl.reports.ranking import (
    BY_LOSS,
    COLUMNS,
    Criterion,
    Failure,
    Group,
    RankedRun,
    find,
    groups,
    measures,
)
from gptpl.runs.listing import SWEEP_FILE, find_run
from gptpl.text import NONE, loss_text, nearest, one_line, printable, setting_text, shortened, table

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
        parts: the pictures after the table: title, picture if there is one, note.
    """

    group: Group
    columns: Sequence[str]
    rows: Sequence[tuple[RankedRun, Sequence[str]]]
    notes: Sequence[str]
    parts: Sequence[tuple[str, Picture | None, str]]


@dataclass(frozen=True, kw_only=True)
class Contents:
    """A whole report; `problems` are the errors of the runs that could not be read."""

    title: str
    facts: dict[str, str]
    notes: Sequence[str]
    sections: Sequence[Section]
    samples: Sequence[Mapping[str, Any]]
    problems: Sequence[str]


def _section(group: Group, *, suffix: str) -> Section:
    finished = [entry for entry in group.ranked if entry.state == "finished"]
    varied = axes(group.settings, [entry.run for entry in finished if entry.run is not None])
    shares, note = importance(varied, [group.by.sign * entry.value for entry in finished])
    order = [axis for axis, _ in shares]
    drawn = [*order, *(axis for axis in varied if axis not in order)]
    names = [axis.name for axis in drawn] or group.settings
    parts: list[tuple[str, Picture | None, str]] = []
    if curves := curves_picture(group, names, name=f"report-curves{suffix}"):
        parts.append(("Learning curves", curves, ""))
    if drawn and len(finished) >= FEWEST_LINES:
        parallel = parallel_picture(
            drawn,
            [entry.value for entry in finished],
            [entry.colour for entry in finished],
            title=group.by.title,
            name=f"report-settings{suffix}",
        )
        notes = [
            f"{axis.name} stands for {', '.join(axis.together)} too, which change with it."
            for axis in drawn[:MOST_AXES]
            if axis.together
        ]
        if left := names[MOST_AXES:]:
            notes.append(f"Not drawn: {', '.join(left)}.")
        parts.append(("Settings and losses", parallel, " ".join(notes)))
    if len(group.runs) > 1:
        bars = importance_picture(shares, name=f"report-importance{suffix}") if shares else None
        parts.append(("Importance of the settings", bars, note))
    columns, rows = _table(group)
    return Section(group=group, columns=columns, rows=rows, notes=_table_notes(group), parts=parts)


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


def _shared_prompts(entries: Sequence[RankedRun]) -> list[dict[str, Any]]:
    """The prompts and strategies that at least two runs share, or all of a single run.

    Each with the runs' last `texts`, the best run first: run, when (such as `step 1,200`), continuation.
    """
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
            texts = [(entry, _when(each), each["continuation"]) for entry, each in made[:MOST_TEXTS]]
            shared.append(
                {
                    "prompt": made[0][1]["prompt"],
                    "strategy": _strategy_text(made[0][1].get("strategy")),
                    "texts": texts,
                    "left_out": max(len(made) - MOST_TEXTS, 0),
                }
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


@dataclass(frozen=True, kw_only=True)
class Written:
    """A report and its files."""

    page: Path
    markdown: Path
    contents: Contents


def report(
    *runs: str | Path, output: str | Path | None = None, by: Criterion | None = None, tags: Sequence[str] = ()
) -> Written:
    """Compare runs, failed trials of sweeps included, as a web page and as Markdown.

    Args:
        runs: runs by folder or name (`quick/latest`), or folders with runs in them.
        output: folder of the files; None: that of a single run, or else the current one.
        by: the metric of the ranking; None: that of the folders' sweeps, or else the validation loss.
        tags: only the runs that have all of these.

    Raises InputError if there is no run, and if `output` is a file.
    """
    if not runs:
        raise InputError("no run is given: give a run's folder, or one with runs in it")
    folders = [path if (path := Path(run).expanduser()).is_dir() else find_run(run) for run in runs]
    alone = folders[0].resolve() if len(folders) == 1 else None
    folder = Path(output).expanduser() if output is not None else folders[0] if alone else Path()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output={folder} is a file: give a folder")
    records, failures, problems = find(folders)
    records = [record for record in records if set(tags) <= set(record.tags)]
    if tags and not records:
        raise InputError(f"no run has tag={','.join(tags)}: give others, see gptpl runs list")
    title = f"{alone.parent.name}/{alone.name}" if alone else f"{len(folders)} folders of runs compared"
    if by is not None and not any(math.isfinite(by.best(record)) for record in records):
        measured = {name for record in records for each in record.evaluations for name in each.metrics}
        known = f"; they have {', '.join(sorted(measured))}" if measured else ""
        raise InputError(f"by={by.metric}: no run has it{nearest(by.metric, measured)}{known}")
    by = by or _criterion(folders)
    return write_report(records, failures, folder, title, problems=problems, by=by)


def _criterion(folders: Sequence[Path]) -> Criterion:
    """The metric of the sweeps in these folders, if they agree."""
    found = set()
    for folder in folders:
        try:
            sweep = read_mapping(folder / SWEEP_FILE, parse_yaml)
        except RunError:  # not the folder of a sweep
            sweep = {}
        is_known = sweep.get("mode") in ("min", "max")
        found.add(Criterion(metric=str(sweep.get("metric")), mode=sweep["mode"]) if is_known else BY_LOSS)
    return found.pop() if len(found) == 1 else BY_LOSS


def write_report(
    records: Sequence[RunRecord],
    failures: Sequence[Failure],
    folder: Path,
    title: str,
    *,
    problems: Sequence[str] = (),
    by: Criterion = BY_LOSS,
) -> Written:
    """Compare runs in `report.html`, and in `report.md` with its pictures `report-*.png`.

    The runs may be in any state; `problems` are the errors of those that could not be read. The folder is
    created if needed, and each file is replaced atomically.
    """
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
    report = Contents(
        title=title,
        facts={"runs": f"{states.total():,}"} | {name: str(n) for name, n in states.items()},
        notes=notes,
        sections=[_section(group, suffix=f"-{place}" if place else "") for place, group in enumerate(found)],
        samples=_shared_prompts(entries),
        problems=problems,
    )
    folder.mkdir(parents=True, exist_ok=True)
    for section in report.sections:
        for _, picture, _ in section.parts:
            if picture is not None:
                write_atomically(folder / f"{picture.name}.png", picture.png)
    page, markdown = folder / "report.html", folder / "report.md"
    write_atomically(markdown, _filled("report.md", report, as_markdown))
    write_atomically(page, _filled("report.html", report, printable))
    return Written(page=page, markdown=markdown, contents=report)


# --- HTML and Markdown: the page needs no network, no script, no other file -----------------------------


def _filled(name: str, report: Contents, shown: Callable[[str], str]) -> str:
    """Fill a template, where every value that is not marked as `safe` passes through `shown`.

    Text from the runs is displayed and never interpreted.
    """
    environment = package_templates(
        finalize=lambda value: value if hasattr(value, "__html__") else shown(str(value)),
        keep_trailing_newline=True,
    )
    environment.filters |= {"printable": printable, "markdown": as_markdown, "block": _block}
    return environment.get_template(f"reports/{name}").render(report=report)


def as_markdown(text: str) -> str:
    """The text on one line, escaped so that Markdown shows it as it is, also in a table."""
    escaped = one_line(text).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", escaped)


def _block(text: str) -> str:
    """A block of code, indented rather than fenced: a text can contain a fence."""
    return "\n".join("    " + line for line in (printable(text).split("\n") or [""]))


# --- terminal -------------------------------------------------------------------------------------------

FIRST = ("validation loss", "perplexity", "tokens", "time", "state")
NOT_IN_TERMINAL = ("bits per byte", "last loss", "tokens/s", "peak memory", "parameters")
"""Columns of the page for which the terminal has no room."""
MOST_ROWS = 20


def terminal_lines(report: Contents) -> list[str]:
    """A table for each group, at most as wide as the terminal."""
    width = shutil.get_terminal_size((120, 24)).columns
    lines = [f"damaged: {one_line(problem)}" for problem in report.problems]
    lines += [one_line(note) for note in report.notes]
    for section in report.sections:
        if section.group.title:
            lines += ["", one_line(section.group.title)]
        names = list(section.columns)
        first = list(dict.fromkeys([0, *(names.index(name) for name in FIRST)]))  # 0: the ranking's metric
        others = [place for place, name in enumerate(names) if name not in (*FIRST, *NOT_IN_TERMINAL)]
        kept = list(dict.fromkeys([*first, *others]))
        rows = [["#", "run", *(names[place].rpartition(".")[2] for place in kept)]]
        for entry, cells in section.rows[:MOST_ROWS]:
            texts = (shortened(cells[place], 40) for place in kept)
            rows.append([entry.label, shortened(entry.name, 30), *texts])
        for line in table(rows):
            lines.append(line if len(line) <= width else line[: width - 1] + "\N{HORIZONTAL ELLIPSIS}")
        if len(section.rows) > MOST_ROWS:
            lines.append(f"... and {len(section.rows) - MOST_ROWS} more in the report")
    return lines
