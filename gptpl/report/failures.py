"""Trials of a sweep that left no run: what the sweep's table says of them."""

import csv
import re
from dataclasses import dataclass
from pathlib import Path

from gptpl.records.run_record import RunError, is_run
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
