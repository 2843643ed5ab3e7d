"""The folder of a sweep: what is in it beside the folders 0, 1, ... of its trials."""

from pathlib import Path

from gptpl.records.run_record import find_runs, is_run

SWEEP_FILE = "sweep.yaml"
"""What the sweep is: its settings, versions and data."""
STUDY_FILE = "sweep.db"
"""The state of its trials, an Optuna study."""
RESULTS_FILE = "results.csv"
"""A row a trial, the best first."""
OUTPUT = "output"
"""A folder with what the trials printed."""
WORKERS = ".workers"
"""A folder with a locked file for each process that works on the sweep."""

_BEFORE = "multirun.yaml"
"""Hydra's file, which marked sweeps before they had a file of their own."""


def is_sweep(folder: Path) -> bool:
    """Whether a folder is that of a sweep."""
    marks = (SWEEP_FILE, RESULTS_FILE, _BEFORE)
    return not is_run(folder) and any((folder / name).is_file() for name in marks)


def trials(sweep: Path) -> list[Path]:
    """The runs in a sweep's folder, by number, those without one behind."""
    found = [run for run in find_runs(sweep) if run.parent == sweep]
    return sorted(found, key=trial_order)


def trial_order(run: Path) -> tuple[bool, str]:
    """Sorts trials by number, those without one behind."""
    return not run.name.isdecimal(), run.name.zfill(9)
