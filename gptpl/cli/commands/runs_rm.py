"""Remove runs, or only their checkpoints, after asking.

usage: gptpl runs rm RUN... [--checkpoints] [--yes]

examples:
  gptpl runs rm quick/2026-11-21_14-51-09         # a run, by name or folder
  gptpl runs rm runs/sweeps/quick_1a2b3c4d --yes  # a whole sweep, without asking
  gptpl runs rm RUN --checkpoints                 # keep best.ckpt, and with it the model

flags:
  --checkpoints   remove what is needed to resume, most of the size; best.ckpt and everything else stay
  --yes, -y       do not ask; needed where there is no terminal

Only folders of runs and sweeps are removed. Their sizes are shown first, with warnings about files that gptpl
did not write, other runs that started from these weights, and runs that may still be running. Links are
removed, not what they point at. The same command completes an interrupted removal.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from gptpl.cli.arguments import parse_plain
from gptpl.errors import InputError
from gptpl.files.run_record import BEST
from gptpl.runs.listing import find_run, runs_folder
from gptpl.runs.removal import Removal, plan_removal, rest_of, some, warnings
from gptpl.text import bytes_text, count_text, near, one_line, table


def run(arguments: list[str]) -> int:
    """Shows what would be removed, asks, and removes; returns the exit status."""
    given = parse_plain("runs rm", arguments, flags=["--yes", "-y", "--checkpoints"])
    if not given.paths:
        raise InputError("no run is given: give gptpl runs rm folders, or names that gptpl runs list shows")
    checkpoints_only = "--checkpoints" in given.flags
    removals = plan_removal([_meant(path) for path in given.paths], checkpoints_only=checkpoints_only)
    sure = bool({"--yes", "-y"} & given.flags)
    for each in removals if sure else ():  # nobody is asked
        if each.foreign:
            raise InputError(
                f"{near(each.path)} holds files that gptpl did not write ({some(each.foreign)}): move them"
                " away, or leave out --yes and answer"
            )
    if not sure and (sys.stdin is None or not sys.stdin.isatty()):
        raise InputError("gptpl runs rm asks first, and there is no terminal to ask on: add --yes to remove")
    rows = [[near(each.path), each.kind, bytes_text(each.bytes)] for each in removals]
    notes = [one_line(f"warning: {warning}") for warning in warnings(removals)]
    print("\n".join([*table(rows, right=[2]), *notes]), flush=True)
    size = sum(each.bytes for each in removals)
    if checkpoints_only and not size:
        print("nothing to remove")
        return 0
    if checkpoints_only:
        print("without these checkpoints the runs cannot be resumed", flush=True)
    if not sure and not _agreed(removals, size):
        print("nothing was removed")
        return 0
    for each in removals:
        each.remove()
    print(f"removed {bytes_text(size)}")
    return 0


def _meant(path: Path) -> Path:
    """The folder, as given or below `runs/`, which may be a sweep's; else the run with that name."""
    for folder in (path, runs_folder() / path):
        if folder.is_symlink() or folder.exists() or rest_of(folder.absolute()).is_dir():
            return folder
    return find_run(path)


def _agreed(removals: Sequence[Removal], size: int) -> bool:
    runs = count_text(sum(max(len(each.runs), each.half_done) for each in removals), "run")
    what = f"all checkpoints but {BEST} of {runs}" if removals[0].checkpoints_only else runs
    print(f"remove {what}, {bytes_text(size)}? [y/N] ", end="", file=sys.stderr, flush=True)
    answer = sys.stdin.readline()
    if not answer.endswith("\n"):
        print(file=sys.stderr)  # after Ctrl-D
    return answer.strip().lower() in ("y", "yes")
