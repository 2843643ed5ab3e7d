"""Runs and sweeps on disk: the size of a folder, one run by its name, or all of them in a list."""

import os
import re
import stat
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from gptpl.files.run_record import (
    CHECKPOINT_FOLDER,
    RunError,
    RunRecord,
    find_runs,
    is_run,
    parse_yaml,
    read_mapping,
    read_run,
    read_run_json,
    started,
)
from gptpl.text import near, nearest, some


@dataclass(frozen=True, kw_only=True)
class DiskUse:
    """The sizes, in bytes, of the files below a folder, by their paths in it; 0 for a link."""

    files: Mapping[str, int]
    newest: float
    """When the last of them was written, in seconds since 1970; 0 for an empty folder."""

    @property
    def total(self) -> int:
        """The size of all files."""
        return sum(self.files.values())

    @property
    def checkpoints(self) -> Mapping[str, int]:
        """The files of a run's checkpoints."""
        return {name: size for name, size in self.files.items() if name.startswith(f"{CHECKPOINT_FOLDER}/")}


def disk_use(folder: Path) -> DiskUse:
    """Measure a folder. A file with two names counts once; links are not followed.

    Files that vanish meanwhile, as those of a running run do, and those that may not be read, are left out.
    """
    files: dict[str, int] = {}
    newest = 0.0
    seen: set[tuple[int, int]] = set()
    for at, folders, names in os.walk(folder):
        for path in (Path(at, name) for name in (*folders, *names)):
            with suppress(FileNotFoundError):
                found = path.lstat()
                if stat.S_ISDIR(found.st_mode):
                    continue
                again = stat.S_ISLNK(found.st_mode) or (found.st_dev, found.st_ino) in seen
                seen.add((found.st_dev, found.st_ino))
                files[path.relative_to(folder).as_posix()] = 0 if again else found.st_size
                newest = max(newest, found.st_mtime)
    return DiskUse(files=dict(sorted(files.items())), newest=newest)


# --- sweeps ---------------------------------------------------------------------------------------------

SWEEP_FILE = "sweep.yaml"
"""The sweep's settings, versions and data."""
STUDY_FILE = "sweep.db"
"""The state of its trials, an Optuna study."""
RESULTS_FILE = "results.csv"
"""A row for each trial, the best first."""
OUTPUT = "output"
"""A folder with the output of the trials."""
WORKERS = ".workers"
"""A folder with a locked file for each process that works on the sweep."""

_KEYS = {"swept", "sampler", "versions"}
"""Of `sweep.yaml`; other programs have files of that name, and tables of the other."""
_HEADER = b"trial,overrides"


def is_sweep(folder: Path) -> bool:
    """Whether a folder is that of a sweep of gptpl, by the contents of its files."""
    if is_run(folder):
        return False
    with suppress(OSError):
        if (folder / RESULTS_FILE).read_bytes().startswith(_HEADER):
            return True
    return has_keys(folder / SWEEP_FILE, parse_yaml, _KEYS)


def has_keys(path: Path, parse: Callable[[str], Any], keys: Collection[str]) -> bool:
    """Whether a file can be read and has all of these keys, as one that gptpl wrote."""
    try:
        return read_mapping(path, parse).keys() >= set(keys)
    except RunError:
        return False


def trials(sweep: Path) -> list[Path]:
    """The runs in a sweep's folder, in their order."""
    return sorted((run for run in find_runs(sweep) if run.parent == sweep), key=trial_order)


def trial_order(run: Path) -> tuple[bool, str]:
    """Sort key: trials by number, those without one last."""
    return not run.name.isdecimal(), run.name.zfill(9)


# --- one run, and all of them ---------------------------------------------------------------------------

LATEST = "latest"
SORTS = ("date", "loss", "size")

_DEPTH = 5
"""Folders between `runs/` and a run, at most."""


def runs_folder() -> Path:
    """The folder of all runs and sweeps: GPTPL_RUNS, else `runs` in the working folder."""
    return Path(os.environ.get("GPTPL_RUNS") or "runs").expanduser()


def find_run(name: str | Path, *, key: str = "") -> Path:
    """Find a run by its folder or its name, without reading metrics.

    A path that exists is returned as it is, unless it is a folder that only holds runs. Otherwise a name is,
    below `runs_folder()`,

    - the path of a run: `quick/2026-11-26_02-14-00`, `sweeps/quick_1a2b/3`;
    - that of a folder with one run in it: `quick`;
    - a beginning of its path, or of its last parts, that no other run has: `2026-11-26_02`, `quick/2026`;
    - `latest`, the run started last, or `quick/latest`, of those that `quick` fits.

    `key` is the setting that named the run, for messages. Raises RunError where no run fits, or several do.
    """
    given, root = Path(name).expanduser(), runs_folder()
    shown = f"{key}={name}" if key else str(name)
    if given.exists():
        below = [] if given.is_file() or is_run(given) else find_runs(given, depth=_DEPTH)
        return _only(below, shown, str(name)) if below else given
    wanted = ""  # a path to somewhere else
    if given.absolute().is_relative_to(root.absolute()):
        wanted = given.absolute().relative_to(root.absolute()).as_posix()
    elif not given.is_absolute() and ".." not in given.parts:
        wanted = given.as_posix()
    found = find_runs(root, depth=_DEPTH) if wanted and root.is_dir() else []
    runs = {run.relative_to(root).as_posix(): run for run in found if run != root}
    group = wanted.removesuffix(LATEST).rstrip("/") if Path(wanted).name == LATEST else wanted
    if fitting := _fitting(group, runs):
        return _only(fitting, shown, str(name)) if group == wanted else max(fitting, key=_age)
    if not runs:
        where = f", and there are no runs in {near(root)}" if wanted else ""
        raise RunError(f"{shown} does not exist{where}: give a run's folder")
    names = [*runs, *(run.name for run in runs.values()), *(path.partition("/")[0] for path in runs)]
    raise RunError(
        f"{shown} is not a run{nearest(group, names)} (gptpl runs list shows all in {near(root)}; {LATEST} is"
        " the newest)"
    )


def _fitting(wanted: str, runs: dict[str, Path]) -> list[Path]:
    """The runs that fit in the strictest way in which any does; all of them for an empty name."""
    name = re.escape(wanted)
    for pattern in (rf"^{name}(/|$)", rf"(^|/){name}$", rf"(^|/){name}/", rf"(^|/){name}"):
        if found := [run for path, run in runs.items() if re.search(pattern, path)]:
            return found
    return []


def _only(runs: Sequence[Path], shown: str, name: str) -> Path:
    if len(runs) == 1:
        return runs[0]
    newest = [near(run) for run in sorted(runs, key=_age, reverse=True)]
    raise RunError(
        f"{shown} could be any of {len(runs)} runs: give one of {some(newest, 5)}, or"
        f" {name.rstrip('/')}/{LATEST} for the first of them"
    )


def _age(run: Path) -> tuple[datetime, tuple[bool, str]]:
    """Sort key: by start, within a second by name."""
    try:
        record = read_run_json(run)
    except RunError:
        record = {}
    return started(run, record), trial_order(run)


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A run with its size; `record` is None where `damage` says why it cannot be read.

    `sweep` is the folder of the sweep that it is a trial of.
    """

    path: Path
    use: DiskUse
    record: RunRecord | None
    sweep: Path | None
    damage: str = ""

    @property
    def started_seconds(self) -> float:
        """The start in seconds since 1970; of a damaged run, when it was last written."""
        return self.record.started.timestamp() if self.record else self.use.newest

    @property
    def best_loss(self) -> float:
        """The lowest validation loss; infinite without one."""
        return self.record.best.val_loss if self.record and self.record.best else float("inf")


def list_runs(folders: Sequence[Path] = (), *, by: str = "date", tags: Collection[str] = ()) -> list[Listed]:
    """The runs below folders (none: below `runs_folder()`) that have all of these tags.

    By `date` a sweep counts as one run; the newest comes first, by `loss` the lowest, by `size` the largest.
    """
    listed, wanted = _listed(folders or [runs_folder()]), set(tags)
    runs = [each for each in listed if wanted <= set(each.record.tags if each.record else ())]
    if by == "loss":
        return sorted(runs, key=lambda each: (each.best_loss, -each.started_seconds))
    if by == "size":
        return sorted(runs, key=lambda each: -each.use.total)
    newest: dict[Path, float] = {}
    for each in runs:
        newest[each.sweep or each.path] = max(newest.get(each.sweep or each.path, 0.0), each.started_seconds)

    def date(each: Listed) -> tuple[Any, ...]:
        group = each.sweep or each.path
        return -newest[group], group, trial_order(each.path)

    return sorted(runs, key=date)


def _listed(folders: Sequence[Path]) -> Iterator[Listed]:
    paths = [path for folder in folders if folder.is_dir() for path in find_runs(folder)]
    in_a_sweep = cache(is_sweep)  # asked once a folder
    for path in {path.resolve(): path for path in paths}.values():
        use, sweep = disk_use(path), path.parent if in_a_sweep(path.parent) else None
        try:
            yield Listed(path=path, use=use, record=read_run(path), sweep=sweep)
        except RunError as error:
            if use.files:  # otherwise it was removed while we looked
                yield Listed(path=path, use=use, record=None, sweep=sweep, damage=str(error))
