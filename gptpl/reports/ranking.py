"""The runs and failed trials in folders, ranked where their losses can be compared, with what each cost."""

import csv
import math
import os
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gptpl.errors import InputError
from gptpl.files.figures import GREY, colour
from gptpl.files.run_record import LOSS, Mode, RunError, RunRecord, find_runs, is_run, read_run
from gptpl.files.run_settings import Setting, differing
from gptpl.runs.listing import RESULTS_FILE
from gptpl.text import NONE, duration_text

# --- what folders hold ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A trial that failed.

    `folder` is where its run is or would be. Where a run with the same folder is reported, it is the one row,
    and has this error if it has none of its own; elsewhere the failure is a row without losses.
    """

    folder: Path
    overrides: str
    state: str = "failed"
    error: str = ""


def find(folders: Sequence[Path]) -> tuple[list[RunRecord], list[Failure], list[str]]:
    """All runs and failed trials in folders or below, each once, and what could not be read.

    Raises InputError for a folder that has neither.
    """
    records: dict[Path, RunRecord | None] = {}
    failed: dict[Path, Failure] = {}
    problems = []
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder} is a file: give a run's folder, or one with runs in it")
        runs, failures = find_runs(folder), []
        try:
            failures = find_failures(folder)
        except RunError as error:
            problems.append(str(error))
        if not runs and not failures:
            raise InputError(f"{folder} holds no run: give a run's folder, or one with runs in it")
        for path in runs:
            if path.resolve() not in records:
                records[path.resolve()] = None
                try:
                    records[path.resolve()] = read_run(path)
                except RunError as error:
                    problems.append(str(error))
        for failure in failures:
            failed.setdefault(failure.folder.resolve(), failure)
    return [run for run in records.values() if run is not None], list(failed.values()), problems


def find_failures(folder: Path) -> list[Failure]:
    """The trials with an error, and those without a run, of all sweeps in a folder or below it.

    Raises RunError where a sweep's table is damaged.
    """
    failures = []
    for path, below, files in os.walk(folder):
        if is_run(Path(path)):
            below.clear()
            continue
        below[:] = sorted(name for name in below if not name.startswith("."))
        if RESULTS_FILE in files and (Path(path) / RESULTS_FILE).is_file():  # no link to nothing
            failures += _failures_of(Path(path))
    return failures


def _failures_of(sweep: Path) -> list[Failure]:
    path = sweep / RESULTS_FILE
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, strict=True))
    except (ValueError, csv.Error) as error:
        raise RunError(f"{path} is damaged: restore it, or remove it") from error
    if not rows or not {"trial", "overrides", "error"} <= rows[0].keys():
        return []  # a table of the same name that is not a sweep's
    failures = []
    for row in rows:
        trial = _trial_folder(sweep, row["trial"] or "")
        error_text = row["error"] or ("" if is_run(trial) else f"it has no run in {trial}")
        if error_text:
            state = row.get("state") or "failed"
            overrides = row["overrides"] or ""
            failures.append(Failure(folder=trial, overrides=overrides, state=state, error=error_text))
    return failures


def _trial_folder(sweep: Path, trial: str) -> Path:
    """The trial's own folder, which may be named by its number with something before it, as `trial-003`."""
    own = sweep / trial
    if own.is_dir() or not trial.isdecimal():
        return own
    ending = re.compile(rf"\D*0*{int(trial)}")
    named = [child for child in sweep.iterdir() if child.is_dir() and ending.fullmatch(child.name)]
    return named[0] if len(named) == 1 else own


# --- ranking --------------------------------------------------------------------------------------------

ORDER = ("init", "model", "task", "optimizer", "scheduler", "data", "tokenizer", "seed", "trainer")
"""Settings of these parts come first, in this order: what is learned before how long and how watched."""
SPLIT_SETTINGS = (
    *("train_ratio", "train_share", "val_share", "test_share", "shuffle", "split_seed", "stratified"),
    *("balance", "duplicates", "mask_instruction", "too_long"),
)
"""Of `data`: with another one, other tokens are validated with."""


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """The metric of an evaluation by whose best value runs are ranked."""

    metric: str = LOSS
    mode: Mode = "min"

    @property
    def title(self) -> str:
        """What the reader calls the metric."""
        return "validation loss" if self.metric == LOSS else self.metric

    @property
    def sign(self) -> int:
        """What makes a lower value the better one."""
        return 1 if self.mode == "min" else -1

    def best(self, run: RunRecord) -> float:
        """The run's best value after the first step; NaN where no finite one was measured."""
        found = run.best_by(self.metric, self.mode)
        return math.nan if found is None else found.metrics[self.metric]


BY_LOSS = Criterion()


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A run, or a trial that left none."""

    label: str = ""
    """Its rank, with its group's letter where there are several groups; empty without a value."""
    name: str
    """Its folder, as short as it can be among the others."""
    run: RunRecord | None = None
    value: float = math.nan
    """The best of the metric that runs are ranked by."""
    colour: str = GREY
    """That of its curve; grey beyond the best ones and without a value."""
    state: str
    error: str
    overrides: str = ""
    """Of a trial that left no run, by which it differs from the others."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Entries with the same text, split and tokenizer, the best first, those without a value last."""

    title: str
    """Text and tokenizer; empty where all entries are of one group."""
    entries: Sequence[Entry]
    settings: Sequence[str]
    """Names of those that differ between the runs of the group."""
    by: Criterion

    @property
    def ranked(self) -> list[Entry]:
        """Those with a value."""
        return [entry for entry in self.entries if math.isfinite(entry.value)]

    @property
    def runs(self) -> list[RunRecord]:
        """Of all entries that have one, in their order."""
        return [entry.run for entry in self.entries if entry.run is not None]

    def differing_settings(self, entry: Entry) -> dict[str, Setting | None]:
        """Those of an entry; None where it has no such setting."""
        found = entry.run.settings if entry.run is not None else {}
        return {name: found.get(name) for name in self.settings}


def groups(records: Sequence[RunRecord], failures: Sequence[Failure], by: Criterion = BY_LOSS) -> list[Group]:
    """Everything in groups; the group with the most runs first.

    What has no value and does not tell its data either, is with the others where those are of one group.
    """
    names = _names([*(run.path for run in records), *(failure.folder for failure in failures)])
    failed = {failure.folder.absolute(): failure for failure in failures}
    values = {run.path: by.best(run) for run in records}

    def entry(run: RunRecord, label: str, place: int) -> Entry:
        failure, value = failed.get(run.path.absolute()), values[run.path]
        return Entry(
            label=label if math.isfinite(value) else "",
            name=names[run.path],
            run=run,
            value=value,
            colour=colour(place) if math.isfinite(value) else GREY,
            state="failed" if failure is not None and run.state == "unfinished" else run.state,
            error=_error(run) or (failure.error if failure is not None else ""),
        )

    def group(title: str, letter: str, runs: Sequence[RunRecord], left: Sequence[Failure] = ()) -> Group:
        ranks = {run.path: by.sign * values[run.path] for run in runs}
        order = sorted(
            runs,
            key=lambda run: (
                ranks[run.path] if math.isfinite(ranks[run.path]) else math.inf,
                run.path.as_posix(),
            ),
        )
        entries = [entry(run, f"{letter}{place + 1}", place) for place, run in enumerate(order)]
        entries += [
            Entry(name=names[each.folder], state=each.state, error=each.error, overrides=each.overrides)
            for each in left
        ]
        return Group(title=title, entries=entries, settings=_settings(order), by=by)

    by_data: dict[str, list[RunRecord]] = {}
    for run in records:
        by_data.setdefault(_data_key(run), []).append(run)
    unknown = by_data.pop("", [])
    kinds = sorted(by_data.values(), key=len, reverse=True)
    known = {run.path.absolute() for run in records}
    left = [failure for failure in failures if failure.folder.absolute() not in known]
    if len(kinds) <= 1 and not (kinds and any(math.isfinite(values[run.path]) for run in unknown)):
        one = group("", "", [*(kinds[0] if kinds else []), *unknown], left)
        return [one] if one.entries else []
    letters = [chr(ord("A") + place) if place < 26 else f"Z{place}-" for place in range(len(kinds))]
    made = [
        group(f"Group {letter}: {_data_title(runs[0])}", letter, runs)
        for letter, runs in zip(letters, kinds, strict=True)
    ]
    if unknown or left:
        made.append(group("Data not known: this order may mean nothing", "?", unknown, left))
    return made


def _settings(runs: Sequence[RunRecord]) -> list[str]:
    """Names of those that differ, ordered by their parts."""

    def part(name: str) -> int:
        first = name.partition(".")[0]
        return ORDER.index(first) if first in ORDER else len(ORDER)

    names = differing([run.settings for run in runs])
    return sorted((name for name in names if name != "name"), key=part)


def _data_key(run: RunRecord) -> str:
    """The same for runs that validate with the same tokens; empty where the run does not tell."""
    data, tokenizer = run.entry("data", "sha256"), run.entry("tokenizer", "sha256")
    return repr((data, tokenizer, _split_settings(run))) if data or tokenizer else ""


def _split_settings(run: RunRecord) -> dict[str, Setting]:
    """What decides, beside the text, which tokens are validated with; as far as the run's data have it."""
    settings = run.settings
    return {name: settings[f"data.{name}"] for name in SPLIT_SETTINGS if f"data.{name}" in settings}


def _data_title(run: RunRecord) -> str:
    def of(part: str, name: str) -> str:
        return str(run.entry(part, name) or "?")

    split = "".join(
        f", {name} {value}" for name, value in (_split_settings(run) or {"train_ratio": "?"}).items()
    )
    return (
        f"text {of('data', 'name')} ({of('data', 'sha256')[:8]}), tokenizer {of('tokenizer', 'name')} of"
        f" {of('tokenizer', 'vocab_size')} tokens{split}"
    )


def _error(run: RunRecord) -> str:
    text = run.entry(run.state, "error" if run.state == "failed" else "reason")
    step = run.entry(run.state, "step")
    return f"{text or ''}{'' if step is None else f' (after step {step})'}".strip()


def _names(folders: Sequence[Path]) -> dict[Path, str]:
    """Each folder by what comes after what all have in common; a single one with the folder around it."""
    absolute = {folder: folder.absolute() for folder in folders}
    around = [set(path.parents) for path in absolute.values()]
    common = max(set.intersection(*around), key=lambda path: len(path.parts)) if around else Path()
    if len(set(absolute.values())) == 1:
        common = common.parent
    names = {folder: path.relative_to(common).as_posix() for folder, path in absolute.items()}
    return {folder: f"run {name}" if name.isdecimal() else name for folder, name in names.items()}


# --- what a run reached and cost ------------------------------------------------------------------------

COLUMNS = (
    *("validation loss", "perplexity", "last loss", "tokens", "time", "tokens/s", "peak memory"),
    "parameters",
)


def measures(run: RunRecord | None) -> list[str]:
    """The texts of COLUMNS, read from a run's files. The time of a resumed run has a star."""
    if run is None:
        return [NONE] * len(COLUMNS)
    loss = BY_LOSS.best(run)
    speeds = [row["train/tokens_per_second"] for row in run.rows if "train/tokens_per_second" in row]
    logged = [row["train/tokens_seen"] for row in run.rows if "train/tokens_seen" in row]
    seen = max([*logged, *(each.tokens_seen for each in run.evaluations)], default=math.nan)
    seconds = run.record.get("seconds", math.nan)
    return [
        digits(loss),
        digits(math.exp(loss) if loss < 700 else math.nan),
        digits(math.nan if run.last is None else run.last.val_loss),
        whole(run.record.get("tokens_seen", seen)),
        duration_text(seconds) + ("*" if run.record.get("resumed") and math.isfinite(seconds) else ""),
        digits(statistics.median(speeds) if speeds else math.nan),
        gigabytes(run.record.get("peak_memory_bytes", math.nan)),
        whole(run.record.get("parameters", math.nan)),
    ]


def digits(value: float, count: int = 4) -> str:
    """So many significant digits, thousands separated: 3.026, 20.61, 12,350."""
    if not math.isfinite(value):
        return NONE
    if value == 0:
        return "0"
    if abs(value) >= 1e15:
        return f"{value:.{count - 1}e}"
    places = count - 1 - math.floor(math.log10(abs(value)))
    rounded = round(value, places)
    return f"{rounded:,.{max(places, 0)}f}" if abs(value) >= 1e-4 else f"{value:.{count}g}"


def whole(value: float) -> str:
    """A count: 15,360."""
    return f"{round(value):,}" if math.isfinite(value) else NONE


def gigabytes(size: float) -> str:
    """Bytes in units of 10^9."""
    return f"{digits(size / 1e9, 3)} GB" if math.isfinite(size) else NONE
