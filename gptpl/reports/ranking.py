"""The runs and failed trials in folders, ranked where their losses can be compared, and what each cost."""

import csv
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gptpl.errors import InputError
from gptpl.files.figures import GREY, colour
from gptpl.files.run_record import BITS_PER_BYTE, LOSS, Mode, RunError, RunRecord, find_runs, is_run, read_run
from gptpl.files.run_settings import Setting, differing
from gptpl.runs.listing import RESULTS_FILE
from gptpl.text import NONE, bytes_text, duration_text, loss_text

# --- the content of folders -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A trial that failed, in the folder where its run is or would be.

    If that run is reported, it gets this error, unless it has one of its own; otherwise the failure is
    reported without losses.
    """

    folder: Path
    overrides: str
    state: str = "failed"
    error: str = ""


def find(folders: Sequence[Path]) -> tuple[list[RunRecord], list[Failure], list[str]]:
    """All runs and failed trials in folders or below, each once, and the errors of those that are damaged.

    Raises InputError for a folder that has neither.
    """
    paths: dict[Path, Path] = {}
    failures: dict[Path, Failure] = {}
    records, problems = [], []
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder} is a file: give a run's folder, or one with runs in it")
        runs, failed = find_runs(folder), []
        try:
            failed = find_failures(folder)
        except RunError as error:
            problems.append(str(error))
        if not runs and not failed:
            raise InputError(f"{folder} holds no run: give a run's folder, or one with runs in it")
        paths |= {path.resolve(): path for path in runs if path.resolve() not in paths}
        failures |= {each.folder.resolve(): each for each in failed}
    for path in paths.values():
        try:
            records.append(read_run(path))
        except RunError as error:
            problems.append(str(error))
    return records, list(failures.values()), problems


def find_failures(folder: Path) -> list[Failure]:
    """The trials with an error, or without a run, of all sweeps in a folder or below it.

    Raises RunError for a damaged table of results.
    """
    failures = []
    for path, below, files in os.walk(folder):
        if is_run(Path(path)):
            below.clear()
            continue
        below[:] = sorted(name for name in below if not name.startswith("."))
        table = Path(path, RESULTS_FILE)
        if RESULTS_FILE not in files or not table.is_file():
            continue
        try:
            with table.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file, strict=True))
        except (ValueError, csv.Error) as error:
            raise RunError(f"{table} is damaged: restore it, or remove it") from error
        for row in rows:
            if not {"trial", "overrides", "error"} <= row.keys():
                break  # the table of another program
            trial = Path(path, row["trial"] or "")
            error_text = row["error"] or ("" if is_run(trial) else f"it has no run in {trial}")
            if error_text:
                state, overrides = row.get("state") or "failed", row["overrides"] or ""
                failures.append(Failure(folder=trial, overrides=overrides, state=state, error=error_text))
    return failures


# --- ranking --------------------------------------------------------------------------------------------

ORDER = ("init", "model", "task", "optimizer", "scheduler", "data", "tokenizer", "seed", "trainer")
"""The order of settings by their first part: what is learned before how long and how it is watched."""
SPLIT_SETTINGS = (
    *("split", "val_tokens", "train_ratio", "val_ratio", "test_ratio", "shuffle", "split_seed", "stratified"),
    *("balance", "duplicates", "precedence", "mask_instruction", "too_long"),
)
"""Settings of `data` that decide which tokens are used for validation."""


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """The metric by whose best value runs are ranked."""

    metric: str = LOSS
    mode: Mode = "min"

    @property
    def title(self) -> str:
        """The metric's name for the reader."""
        return {LOSS: "validation loss", BITS_PER_BYTE: "bits per byte"}.get(self.metric, self.metric)

    @property
    def sign(self) -> int:
        """The factor that makes lower values better."""
        return 1 if self.mode == "min" else -1

    def best(self, run: RunRecord) -> float:
        """The run's best value after the first step; NaN without a finite one."""
        found = run.best_by(self.metric, self.mode)
        return math.nan if found is None else found.metrics[self.metric]


BY_LOSS = Criterion()


@dataclass(frozen=True, kw_only=True)
class RankedRun:
    """A run, or a trial that left none.

    Attributes:
        label: its rank, after its group's letter if there are several groups; empty without a value.
        name: its folder, without the part that all have in common.
        value: the best of the metric by which runs are ranked, or NaN.
        colour: of its curve; grey for those beyond the best ones and without a value.
        overrides: of a trial that left no run: how it differs from the others.
    """

    label: str = ""
    name: str
    run: RunRecord | None = None
    value: float = math.nan
    colour: str = GREY
    state: str
    error: str
    overrides: str = ""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs with the same text, split and, unless ranked by bits per byte, tokenizer, the best first.

    Those without a value come last.

    Attributes:
        title: text and tokenizer; empty if there is only one group.
        settings: names of those that differ within the group.
    """

    title: str
    entries: Sequence[RankedRun]
    settings: Sequence[str]
    by: Criterion

    @property
    def ranked(self) -> list[RankedRun]:
        """Those with a value."""
        return [entry for entry in self.entries if math.isfinite(entry.value)]

    @property
    def runs(self) -> list[RunRecord]:
        """The records of all that have one."""
        return [entry.run for entry in self.entries if entry.run is not None]

    def differing_settings(self, entry: RankedRun) -> dict[str, Setting | None]:
        """The values of `settings` in a run; None if it does not have one."""
        found = entry.run.settings if entry.run is not None else {}
        return {name: found.get(name) for name in self.settings}


def groups(records: Sequence[RunRecord], failures: Sequence[Failure], by: Criterion = BY_LOSS) -> list[Group]:
    """Everything in groups, the group with the most runs first.

    Runs that have no value and do not record their data are put with the others if those are of one group.
    """
    names = _names([*(run.path for run in records), *(failure.folder for failure in failures)])
    failed = {failure.folder.absolute(): failure for failure in failures}
    by_data: dict[str, list[RankedRun]] = {}
    for run in records:
        failure = failed.pop(run.path.absolute(), None)
        entry = RankedRun(
            name=names[run.path],
            run=run,
            value=by.best(run),
            state="failed" if failure is not None and run.state == "unfinished" else run.state,
            error=_error(run) or (failure.error if failure is not None else ""),
        )
        by_data.setdefault(_data_key(run, by), []).append(entry)
    unknown = by_data.pop("", [])
    left = [
        RankedRun(name=names[each.folder], state=each.state, error=each.error, overrides=each.overrides)
        for each in failed.values()
    ]
    kinds = sorted(by_data.values(), key=len, reverse=True)
    if len(kinds) <= 1 and not (kinds and any(math.isfinite(each.value) for each in unknown)):
        together = [*(kinds[0] if kinds else []), *unknown, *left]
        return [_group("", "", together, by)] if together else []
    found = []
    for place, entries in enumerate(kinds):
        letter = chr(ord("A") + place) if place < 26 else f"Z{place}-"
        assert entries[0].run is not None
        found.append(_group(f"Group {letter}: {_data_title(entries[0].run, by)}", letter, entries, by))
    if unknown or left:
        found.append(_group("Data not known: this order may mean nothing", "?", [*unknown, *left], by))
    return found


def _group(title: str, letter: str, entries: Sequence[RankedRun], by: Criterion) -> Group:
    def rank(entry: RankedRun) -> tuple[float, bool, str]:
        value = by.sign * entry.value if math.isfinite(entry.value) else math.inf
        return value, entry.run is None, entry.run.path.as_posix() if entry.run is not None else ""

    ordered = [
        replace(entry, label=f"{letter}{place + 1}", colour=colour(place))
        if math.isfinite(entry.value)
        else entry
        for place, entry in enumerate(sorted(entries, key=rank))
    ]

    def part(name: str) -> int:
        first = name.partition(".")[0]
        return ORDER.index(first) if first in ORDER else len(ORDER)

    names = differing([entry.run.settings for entry in ordered if entry.run is not None])
    settings = sorted((name for name in names if name != "name"), key=part)
    return Group(title=title, entries=ordered, settings=settings, by=by)


def _data_key(run: RunRecord, by: Criterion) -> str:
    """The same for runs that `by` compares; empty if the run does not record its data.

    Losses are in nats per token, of the same tokenizer; bits per byte only ask for the same text.
    """
    data, tokenizer = run.entry("data", "sha256"), run.entry("tokenizer", "sha256")
    if by.metric == BITS_PER_BYTE:
        tokenizer = ""
    return repr((data, tokenizer, _split_settings(run))) if data or tokenizer else ""


def _split_settings(run: RunRecord) -> dict[str, Setting]:
    settings = run.settings
    return {name: settings[f"data.{name}"] for name in SPLIT_SETTINGS if f"data.{name}" in settings}


def _data_title(run: RunRecord, by: Criterion) -> str:
    def of(part: str, name: str) -> str:
        return str(run.entry(part, name) or "?")

    split = _split_settings(run) or {"train_ratio": "?"}
    tokenizer = f", tokenizer {of('tokenizer', 'name')} of {of('tokenizer', 'vocab_size')} tokens"
    return (
        f"text {of('data', 'name')} ({of('data', 'sha256')[:8]})"
        + tokenizer * (by.metric != BITS_PER_BYTE)
        + "".join(f", {name} {value}" for name, value in split.items())
    )


def _error(run: RunRecord) -> str:
    text = run.entry(run.state, "error" if run.state == "failed" else "reason")
    step = run.entry(run.state, "step")
    return f"{text or ''}{'' if step is None else f' (after step {step})'}".strip()


def _names(folders: Sequence[Path]) -> dict[Path, str]:
    """Each folder without the part that all have in common; a single one with its parent."""
    absolute = {folder: folder.absolute() for folder in folders}
    if not absolute:
        return {}
    common = Path(os.path.commonpath([path.parent for path in absolute.values()]))
    if len(set(absolute.values())) == 1:
        common = common.parent
    names = {folder: path.relative_to(common).as_posix() for folder, path in absolute.items()}
    return {folder: f"run {name}" if name.isdecimal() else name for folder, name in names.items()}


# --- results and costs ----------------------------------------------------------------------------------

COLUMNS = (
    *("validation loss", "perplexity", "bits per byte", "last loss", "tokens", "time", "tokens/s"),
    *("peak memory", "parameters"),
)


def measures(run: RunRecord | None) -> list[str]:
    """The cells of COLUMNS. The time of a resumed run has a star."""
    if run is None:
        return [NONE] * len(COLUMNS)
    loss = BY_LOSS.best(run)
    speeds = [row["train/tokens_per_second"] for row in run.rows if "train/tokens_per_second" in row]
    best = run.best_by(LOSS, "min")
    bits = math.nan if best is None else best.metrics.get(BITS_PER_BYTE, math.nan)
    seconds, memory = run.record.get("seconds", math.nan), run.record.get("peak_memory_bytes")
    is_of_tokens = (run.record.get("use") or [""])[0] != "classify"
    return [
        loss_text(loss),
        f"{math.exp(loss):,.2f}" if loss < 700 and is_of_tokens else NONE,
        f"{bits:.4f}" if math.isfinite(bits) else NONE,
        loss_text(None if run.last is None else run.last.val_loss),
        _whole(run.tokens_seen or math.nan),
        duration_text(seconds) + ("*" if run.record.get("resumed") and math.isfinite(seconds) else ""),
        _whole(statistics.median(speeds) if speeds else math.nan),
        NONE if memory is None else bytes_text(memory),
        _whole(run.record.get("parameters", math.nan)),
    ]


def _whole(value: float) -> str:
    return f"{round(value):,}" if math.isfinite(value) else NONE
