"""The folder of a sweep: what is in it beside the folders 0, 1, ... of its trials."""

from pathlib import Path

from gptpl.records.run_record import RunError, find_runs, is_run, parse_yaml, read_mapping

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

_KEYS = {"swept", "sampler", "versions"}
"""Of `sweep.yaml`; other programs have files of that name, and tables of the other."""
_HEADER = b"trial,overrides"


def is_sweep(folder: Path) -> bool:
    """Whether a folder is that of a sweep of gptpl's, by what its files say and not by their names alone."""
    if is_run(folder):
        return False
    try:
        if (folder / RESULTS_FILE).is_file() and (folder / RESULTS_FILE).read_bytes().startswith(_HEADER):
            return True
        return (folder / SWEEP_FILE).is_file() and read_mapping(
            folder / SWEEP_FILE, parse_yaml
        ).keys() >= _KEYS
    except (OSError, RunError):
        return False


def trials(sweep: Path) -> list[Path]:
    """The runs in a sweep's folder, by number, those without one behind."""
    found = [run for run in find_runs(sweep) if run.parent == sweep]
    return sorted(found, key=trial_order)


def trial_order(run: Path) -> tuple[bool, str]:
    """Sorts trials by number, those without one behind."""
    return not run.name.isdecimal(), run.name.zfill(9)
