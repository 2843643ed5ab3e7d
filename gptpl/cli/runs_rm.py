"""`gptpl runs rm`: removes runs, or their checkpoints, after asking."""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gptpl.cli.plain_arguments import parse
from gptpl.cli.readable import bytes_text, count_text, near
from gptpl.cli.runs_list import DEFAULT_FOLDER
from gptpl.cli.text_table import table
from gptpl.errors import InputError
from gptpl.files.folder_lock import is_locked
from gptpl.records.disk import DiskUse, disk_use
from gptpl.records.ownership import foreign_files, is_gptpls
from gptpl.records.removal import (
    BEST,
    dependents,
    needless_checkpoints,
    remove_checkpoints,
    remove_folder,
    rest_of,
)
from gptpl.records.run_record import CONFIG_FILE, RUN_FILE, RunError, find_runs, is_run, read_run
from gptpl.records.sweep_folder import trials

JUST_NOW_SECONDS = 60
"""A run without an end that was written so recently may be running."""


@dataclass(frozen=True, kw_only=True)
class Doomed:
    """A folder to remove, or to remove the checkpoints of: a run, a sweep, or what is left of one of them."""

    path: Path
    runs: list[Path]
    use: DiskUse
    bytes: int
    """What goes."""


def run(arguments: list[str]) -> int:
    """Shows what would go, asks, and removes; returns the exit status."""
    given = parse("runs rm", arguments, flags=["--yes", "-y", "--checkpoints"])
    if not given.paths:
        raise InputError("gptpl runs rm takes runs: give it folders that gptpl runs list shows")
    checkpoints = "--checkpoints" in given.flags
    folders = _removable(given.paths, checkpoints=checkpoints)
    doomed = [_doomed(folder, checkpoints=checkpoints) for folder in folders]
    sure = bool({"--yes", "-y"} & given.flags)
    _check_unused(doomed)
    if sure and not checkpoints:
        _check_own(doomed)
    if not sure and (sys.stdin is None or not sys.stdin.isatty()):
        raise InputError("gptpl runs rm asks first, and there is no terminal to ask on: add --yes to remove")
    print("\n".join([*_table(doomed), *_warnings(doomed, checkpoints=checkpoints)]), flush=True)
    if not any(each.bytes for each in doomed) and checkpoints:
        print("nothing to remove")
        return 0
    if checkpoints:
        print("without these checkpoints they cannot be resumed", flush=True)
    if not sure and not _agreed(_question(doomed, checkpoints=checkpoints)):
        print("nothing was removed")
        return 0
    for each in doomed:
        _remove(each, checkpoints=checkpoints)
    print(f"removed {bytes_text(sum(each.bytes for each in doomed))}")
    return 0


def _removable(paths: list[Path], *, checkpoints: bool) -> list[Path]:
    """The folders, absolute, each once, none that lies in another one of them.

    Raises InputError for a link, and for what is neither a run nor a sweep.
    """
    for path in paths:
        if path.is_symlink():
            raise InputError(f"{path} is a link to {path.readlink()}: give the folder itself")
    full = list(dict.fromkeys(path.resolve() for path in paths))
    for path in full:
        _check_removable(path, checkpoints=checkpoints)
    return [path for path in full if not any(other in path.parents for other in full)]


def _doomed(path: Path, *, checkpoints: bool) -> Doomed:
    """What removing a folder means."""
    if not path.is_dir():
        use = disk_use(rest_of(path))
        return Doomed(path=path, runs=[], use=use, bytes=use.total)
    runs = [path] if is_run(path) else trials(path)
    use = disk_use(path)
    size = sum(sum(needless_checkpoints(disk_use(each)).values()) for each in runs)
    return Doomed(path=path, runs=runs, use=use, bytes=size if checkpoints else use.total)


def _check_removable(path: Path, *, checkpoints: bool) -> None:
    if Path.cwd().is_relative_to(path):
        raise InputError(f"{path} is the folder that you are in, or around it: change to another one first")
    if not path.exists() and rest_of(path).is_dir() and not checkpoints:
        return
    if not path.is_dir():
        raise InputError(f"{near(path)} is no folder: give one that gptpl runs list shows")
    if is_gptpls(path):
        return
    if is_run(path):
        raise InputError(
            f"{near(path)} is no run of gptpl's ({CONFIG_FILE} is another program's, or damaged like"
            f" {RUN_FILE}), so it is left alone: remove it yourself"
        )
    inside = len(find_runs(path))
    if inside:
        raise InputError(
            f"{near(path)} is no run but holds {count_text(inside, 'run')}: give those to remove, as in"
            f" {near(path)}/*"
        )
    raise InputError(
        f"{near(path)} is neither a run (it has no {CONFIG_FILE}) nor a sweep, so it is left alone:"
        " give a folder that gptpl runs list shows"
    )


def _check_unused(doomed: list[Doomed]) -> None:
    """Raises InputError for a run that a process is training in."""
    for each in doomed:
        for run in each.runs:
            if is_locked(run):
                raise InputError(f"a process is training in {near(run)}: stop it first")


def _check_own(doomed: list[Doomed]) -> None:
    """Raises InputError for a folder with files of others, which nobody is asked about."""
    for each in doomed:
        names = foreign_files(each.path, each.use) if each.path.is_dir() else []
        if names:
            raise InputError(
                f"{near(each.path)} holds files that gptpl did not write ({_some(names)}): move them away, or"
                " leave out --yes and answer"
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _table(doomed: list[Doomed]) -> list[str]:
    rows = [[near(each.path), _kind(each), bytes_text(each.bytes)] for each in doomed]
    return table(rows, right=[2])


def _kind(each: Doomed) -> str:
    if not each.path.is_dir():
        return "half removed"
    if not is_run(each.path):
        return f"sweep of {count_text(len(each.runs), 'run')}"
    try:
        return read_run(each.path).state
    except RunError:
        return "damaged"


def _warnings(doomed: list[Doomed], *, checkpoints: bool) -> Iterator[str]:
    for each in doomed:
        for run in each.runs:
            yield from _warnings_of_run(run, checkpoints=checkpoints)
        if not checkpoints and each.path.is_dir():
            names = foreign_files(each.path, each.use)
            if names:
                yield f"warning: {near(each.path)} holds files that gptpl did not write: {_some(names)}"
    for record, place in dependents([each.path for each in doomed], _other_runs(doomed)):
        if not (checkpoints and place.name == BEST):
            yield (
                f"warning: {near(record.path)} began with {near(place)}: it keeps its own weights, but could"
                " not be started anew"
            )


def _other_runs(doomed: list[Doomed]) -> Iterator[Path]:
    """Those below runs/ and those beside a doomed folder: not all of a disk."""
    if DEFAULT_FOLDER.is_dir():
        yield from find_runs(DEFAULT_FOLDER)
    for parent in {each.path.parent for each in doomed}:
        yield from (child for child in parent.iterdir() if is_run(child))


def _warnings_of_run(run: Path, *, checkpoints: bool) -> Iterator[str]:
    try:
        state = read_run(run).state
    except RunError:
        state = "unfinished"
    use = disk_use(run)
    ago = time.time() - use.newest
    if state == "unfinished" and ago < JUST_NOW_SECONDS:
        yield f"warning: {near(run)} was written {max(ago, 0):.0f} seconds ago: it may be running"
    if checkpoints and f"checkpoints/{BEST}" not in use.files:
        yield f"warning: {near(run)} has no {BEST}: none of its weights would be left"


def _question(doomed: list[Doomed], *, checkpoints: bool) -> str:
    size = bytes_text(sum(each.bytes for each in doomed))
    runs = count_text(sum(max(len(each.runs), not each.path.is_dir()) for each in doomed), "run")
    what = f"all checkpoints but {BEST} of {runs}" if checkpoints else runs
    return f"remove {what}, {size}? [y/N] "


def _agreed(question: str) -> bool:
    print(question, end="", file=sys.stderr, flush=True)
    answer = sys.stdin.readline()
    if not answer.endswith("\n"):
        print(file=sys.stderr)  # after Ctrl-D
    return answer.strip().lower() in ("y", "yes")


def _remove(each: Doomed, *, checkpoints: bool) -> None:
    if not checkpoints:
        remove_folder(each.path)
        return
    for run in each.runs:
        remove_checkpoints(run, disk_use(run))
