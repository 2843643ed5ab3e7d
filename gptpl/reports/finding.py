"""What folders hold: runs, and trials of a sweep that left none, of which its table tells."""

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gptpl.errors import InputError
from gptpl.records.run_record import RunError, RunRecord, find_runs, is_run, read_run
from gptpl.records.sweep_folder import RESULTS_FILE


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


@dataclass(kw_only=True)
class Found:
    """What folders hold, each run and trial once; `problems` are what could not be read."""

    records: list[RunRecord] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def find(folders: Sequence[Path]) -> Found:
    """All runs and failed trials in folders or below. Raises InputError for a folder that has neither."""
    found, seen = Found(), set[Path]()
    for folder in folders:
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            raise InputError(f"{folder} {what}: give a run's folder, or one with runs in it")
        runs, failures = find_runs(folder), []
        try:
            failures = find_failures(folder)
        except RunError as error:
            found.problems.append(str(error))
        if not runs and not failures:
            raise InputError(f"{folder} holds no run: give a run's folder, or one with runs in it")
        for path in runs:
            if path.resolve() not in seen:
                seen.add(path.resolve())
                try:
                    found.records.append(read_run(path))
                except RunError as error:
                    found.problems.append(str(error))
        known = {failure.folder.resolve() for failure in found.failures}
        found.failures += [each for each in failures if each.folder.resolve() not in known]
    return found


def find_failures(folder: Path) -> list[Failure]:
    """The trials with an error, and those without a run, of all sweeps in a folder or below it.

    Raises RunError where a sweep's table is damaged.
    """
    if is_run(folder):
        return []
    failures = _failures(folder) if (folder / RESULTS_FILE).is_file() else []
    try:
        children = sorted(child for child in folder.iterdir() if not child.name.startswith("."))
    except (PermissionError, FileNotFoundError):
        return failures  # `find_runs` has said so
    below = [child for child in children if child.is_dir() and not child.is_symlink()]
    return [*failures, *(failure for child in below for failure in find_failures(child))]


def _failures(folder: Path) -> list[Failure]:
    path = folder / RESULTS_FILE
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            rows = list(reader)
            names = reader.fieldnames or []
    except (ValueError, csv.Error) as error:
        raise RunError(f"{path} is damaged: restore it, or remove it") from error
    if not {"trial", "overrides", "error"} <= set(names):
        return []  # a table of the same name that is not a sweep's
    return [failure for row in rows if (failure := _failure(folder, row)) is not None]


def _failure(folder: Path, row: dict[str, str | None]) -> Failure | None:
    trial = _trial_folder(folder, row["trial"] or "")
    error, state = row["error"] or "", row.get("state") or ""
    gone = not is_run(trial)
    if not error and not gone:
        return None
    if gone and not error:
        error = f"it has no run in {trial}"
    return Failure(folder=trial, overrides=row["overrides"] or "", state=state or "failed", error=error)


def _trial_folder(sweep: Path, trial: str) -> Path:
    """The trial's own folder, which may be named by its number with something before it, as `trial-003`."""
    own = sweep / trial
    if own.is_dir() or not trial.isdecimal():
        return own
    ending = re.compile(rf"\D*0*{int(trial)}")
    named = [child for child in sweep.iterdir() if child.is_dir() and ending.fullmatch(child.name)]
    return named[0] if len(named) == 1 else own
