"""Removes runs and sweeps, or only their checkpoints: what belongs to gptpl, whole or not at all."""

import json
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gptpl.errors import InputError
from gptpl.files.durable import is_locked
from gptpl.files.run_record import (
    BEST,
    CHECKPOINT_FOLDER,
    CONFIG_FILE,
    RUN_FILE,
    RunError,
    RunRecord,
    find_runs,
    is_run,
    parse_yaml,
    read_run,
)
from gptpl.runs.listing import DiskUse, disk_use, has_keys, is_sweep, runs_folder, trials
from gptpl.text import count_text, near, some

JUST_NOW_SECONDS = 60
"""A run without an end that was written so recently may be running."""

_OWN = re.compile(
    r"(.*/)?\.[^/]+\.tmp|metrics\.csv\.tmp"  # left by interrupted writes
    r"|config\.yaml|run\.json|metrics\.csv|train\.log|(evaluations|samples|steps|judgements)\.jsonl"
    r"|(loss|confusion|calibration)\.png|(scores|comparison)\.(json|png)|report(\.html|\.md|-.*\.png)"
    r"|data/(train|validation|test)\.(csv|json)"
    r"|nonfinite_step_\d+\.txt"
    r"|checkpoints/(best|last|step-\d+)(\.ckpt|\.[0-9a-f]{8}-\d+-of-\d+\.part)(\.sha256)?(\.damaged)?"
    r"|adapter/(adapter_model\.safetensors|adapter_config\.json|gptpl\.json)"
    r"|tensorboard/(.*/)?(events\.out\.tfevents\..*|hparams\.yaml)"
)
"""The files of a run, by their paths in its folder."""
_OWN_OF_SWEEP = re.compile(
    r"results\.csv|multirun\.yaml|sweep\.yaml|sweep\.db(-journal)?|\.[^/]+\.tmp"
    r"|report(\.html|\.md|-.*\.png)"
    r"|output/\d+\.(log|stop)|\.workers/[^/]+\.lock|\.slurm/.*"
)
"""The files of a sweep that are not a trial's."""


@dataclass(frozen=True, kw_only=True)
class Removal:
    """The removal of a run, a sweep, or what an interrupted removal left of one of them.

    With `checkpoints_only` only checkpoints other than `best.ckpt` are removed; `bytes` is what is removed.
    """

    path: Path
    runs: Sequence[Path]
    use: DiskUse
    checkpoints_only: bool
    bytes: int

    @property
    def half_done(self) -> bool:
        """Whether an earlier removal was interrupted."""
        return not self.path.is_dir()

    @property
    def kind(self) -> str:
        """How the run ended, or what else it is."""
        if self.half_done:
            return "half removed"
        return _state(self.path) if is_run(self.path) else f"sweep of {count_text(len(self.runs), 'run')}"

    @property
    def foreign(self) -> list[str]:
        """The files that would be removed and that gptpl did not write."""
        return [] if self.half_done or self.checkpoints_only else foreign_files(self.path, self.use)

    def remove(self) -> None:
        """Remove it."""
        if self.checkpoints_only:
            for run in self.runs:
                remove_checkpoints(run, disk_use(run))
        else:
            remove_folder(self.path)


def plan_removal(paths: Sequence[Path], *, checkpoints_only: bool = False) -> list[Removal]:
    """The removals of these folders, each once, without those inside another.

    Raises InputError for a link, for a folder that is neither a run nor a sweep, and for a run in training.
    """
    for path in paths:
        if path.is_symlink():
            raise InputError(f"{path} is a link to {path.readlink()}: give the folder itself")
    full = list(dict.fromkeys(path.resolve() for path in paths))
    for path in full:
        _check_removable(path, checkpoints_only=checkpoints_only)
    removals = []
    for path in full:
        if any(other in path.parents for other in full):
            continue
        half_done = not path.is_dir()
        runs = [] if half_done else [path] if is_run(path) else trials(path)
        for run in runs:
            if is_locked(run):
                raise InputError(f"a process is training in {near(run)}: stop it first")
        use = disk_use(rest_of(path) if half_done else path)
        needless = sum(sum(needless_checkpoints(disk_use(run)).values()) for run in runs)
        size = needless if checkpoints_only else use.total
        removals.append(Removal(path=path, runs=runs, use=use, checkpoints_only=checkpoints_only, bytes=size))
    return removals


def _check_removable(path: Path, *, checkpoints_only: bool) -> None:
    half_done = not path.exists() and rest_of(path).is_dir() and not checkpoints_only
    if Path.cwd().is_relative_to(path):
        raise InputError(f"{path} is the folder that you are in, or around it: change to another one first")
    if half_done or is_gptpls(path):
        return
    inside = len(find_runs(path)) if path.is_dir() and not is_run(path) else 0
    if inside:
        raise InputError(
            f"{near(path)} is not a run but holds {count_text(inside, 'run')}: give those to remove, as in"
            f" {near(path)}/*"
        )
    raise InputError(
        f"{near(path)} is neither a run nor a sweep of gptpl, or its {CONFIG_FILE} is damaged, and is"
        " left alone: give a folder that gptpl runs list shows, or remove it yourself"
    )


def warnings(removals: Sequence[Removal]) -> Iterator[str]:
    """What one may not want to lose, a line each."""
    for each in removals:
        for run in each.runs:
            use = disk_use(run)
            ago = time.time() - use.newest
            if _state(run) in ("unfinished", "damaged") and ago < JUST_NOW_SECONDS:
                yield f"{near(run)} was written {max(ago, 0):.0f} seconds ago: it may be running"
            if each.checkpoints_only and f"{CHECKPOINT_FOLDER}/{BEST}" not in use.files:
                yield f"{near(run)} has no {BEST}: none of its weights would be left"
        if each.foreign:
            yield f"{near(each.path)} holds files that gptpl did not write: {some(each.foreign)}"
    # Runs below runs/ and next to a folder that is removed: not a whole disk.
    others = find_runs(runs_folder()) if runs_folder().is_dir() else []
    for parent in {each.path.parent for each in removals}:
        others += [child for child in parent.iterdir() if is_run(child)]
    checkpoints_only = any(each.checkpoints_only for each in removals)
    for record, place in dependents([each.path for each in removals], others):
        if not (checkpoints_only and place.name == BEST):
            yield (
                f"{near(record.path)} started from {near(place)}: it keeps its own weights, but could not be"
                " trained again from the start"
            )


def _state(run: Path) -> str:
    record = _readable(run)
    return record.state if record else "damaged"


def is_gptpls(folder: Path) -> bool:
    """Whether a folder is a run or a sweep of gptpl: many programs write a `config.yaml`."""
    if not is_run(folder):
        return is_sweep(folder)
    by_config = has_keys(folder / CONFIG_FILE, parse_yaml, {"run_dir", "model", "trainer"})
    return by_config or has_keys(folder / RUN_FILE, json.loads, {"command", "versions"})


def foreign_files(folder: Path, use: DiskUse) -> list[str]:
    """The files of a run's or a sweep's folder that, by their names, gptpl did not write."""
    runs = set() if is_run(folder) else {run.name for run in trials(folder)}

    def own(name: str) -> bool:
        first, _, rest = name.partition("/")
        if is_run(folder) or first in runs:
            return bool(_OWN.fullmatch(rest if first in runs else name))
        return bool(_OWN_OF_SWEEP.fullmatch(name))

    return [name for name in use.files if not own(name)]


def rest_of(folder: Path) -> Path:
    """Where a folder lies while it is removed: next to it, hidden, so that no command takes it for a run."""
    return folder.with_name(f".{folder.name}.removed")


def rests_below(folder: Path) -> list[Path]:
    """The folders below a folder whose removal was interrupted."""
    hidden = sorted(path for path in folder.rglob(".?*.removed") if path.is_dir() and not path.is_symlink())
    return [path.with_name(path.name.removeprefix(".").removesuffix(".removed")) for path in hidden]


def remove_folder(folder: Path) -> None:
    """Remove a folder: others see all of it or nothing, and a second call completes an interrupted one."""
    hidden = rest_of(folder)
    if hidden.is_dir():
        shutil.rmtree(hidden)
    if folder.is_dir():
        folder.rename(hidden)
        shutil.rmtree(hidden)


def needless_checkpoints(use: DiskUse) -> Mapping[str, int]:
    """The checkpoints other than `best.ckpt`, with their bytes, links before the files that they point at."""
    best = f"{CHECKPOINT_FOLDER}/{BEST.removesuffix('ckpt')}"  # and its parts, where it is sharded
    return {name: size for name, size in use.checkpoints.items() if not name.startswith(best)}


def remove_checkpoints(run: Path, use: DiskUse) -> None:
    """Remove them one after the other: an interrupted removal leaves whole files."""
    for name in needless_checkpoints(use):
        (run / name).unlink(missing_ok=True)


def dependents(doomed: Sequence[Path], among: Iterable[Path]) -> list[tuple[RunRecord, Path]]:
    """The runs among others that started from weights in a doomed folder, with the weights' file."""
    folders = [folder.resolve() for folder in doomed]

    def goes(path: Path) -> bool:
        return any(path.is_relative_to(folder) for folder in folders)

    kept = [run for full, run in {run.resolve(): run for run in among}.items() if not goes(full)]
    found = []
    for record in filter(None, map(_readable, kept)):
        place = record.entry("start", "checkpoint") or record.entry("start", "path")
        if isinstance(place, str) and goes(Path(place)):
            found.append((record, Path(place)))
    return found


def _readable(run: Path) -> RunRecord | None:
    try:
        return read_run(run)
    except (RunError, OSError):
        return None
