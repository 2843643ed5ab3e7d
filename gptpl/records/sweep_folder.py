"""The folder of a sweep: `results.csv` beside the folders 0, 1, ... of its trials."""

from pathlib import Path

from gptpl.records.run_record import find_runs, is_run

RESULTS_FILE = "results.csv"


def is_sweep(folder: Path) -> bool:
    """Whether a folder is that of a sweep."""
    return not is_run(folder) and any((folder / name).is_file() for name in (RESULTS_FILE, "multirun.yaml"))


def trials(sweep: Path) -> list[Path]:
    """The runs in a sweep's folder, by number, those without one behind."""
    found = [run for run in find_runs(sweep) if run.parent == sweep]
    return sorted(found, key=trial_order)


def trial_order(run: Path) -> tuple[bool, str]:
    """Sorts trials by number, those without one behind."""
    return not run.name.isdecimal(), run.name.zfill(9)
