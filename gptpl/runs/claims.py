"""A run's folder, locked: one process trains in it, from before the slow work until the run ends."""

import logging
import os
import re
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from datetime import datetime
from itertools import count
from pathlib import Path

from gptpl.config.groups import default_choices
from gptpl.config.overrides import key_of
from gptpl.errors import InputError
from gptpl.files.durable import locked_folder
from gptpl.files.run_record import (
    CHECKPOINT_FOLDER,
    CONFIG_FILE,
    METRICS_FILE,
    RUN_FILE,
    find_runs,
    read_run_json,
)
from gptpl.runs.listing import runs_folder
from gptpl.training.run_log import is_first_process

FILES_OF_A_RUN = (CONFIG_FILE, RUN_FILE, METRICS_FILE, CHECKPOINT_FOLDER)
"""What the folder of a new run may not hold."""
_TRIES = 100
_MORE_OF_A_RUN = ("train.log", "tensorboard", "evaluations.jsonl", "samples.jsonl", "loss.png")

log = logging.getLogger(__name__)


class RunClaim(AbstractContextManager["RunClaim"]):
    """A run's folder for one process alone, until `release`, the end of a `with`, or of the process.

    When it is released, the folders that were `made` for the run (the outermost first) are removed if they
    are empty, as those of a run that was refused. Child processes neither have the claim nor end it: the
    processes of further devices must not ask for one.

    Raises InputError where another run has the folder, FileNotFoundError where it does not exist.
    """

    def __init__(self, path: Path, *, made: Sequence[Path] = ()) -> None:
        self.path = path
        lock = ExitStack()
        lock.enter_context(locked_folder(path))
        self.release = weakref.finalize(self, _release, lock, made, os.getpid())
        """Release the folder; a second time this does nothing."""

    def __exit__(self, *error: object) -> None:
        self.release()


def _release(lock: ExitStack, made: Sequence[Path], process: int) -> None:
    if os.getpid() == process:  # not a child that began as its copy
        _remove_empty(made)
        lock.close()


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in reversed(folders):
        with suppress(OSError):
            folder.rmdir()


def claim_new_run(run_dir: Path | None, *, name: str, again: bool = False) -> RunClaim:
    """Make and claim the folder of a new run.

    `run_dir` is the folder that was asked for; None: `<name>/<date>_<time>` in `runs_folder()`, numbered from
    the second run of a second on. Raises InputError for a folder that holds a run or that another run has
    claimed, for a file, and for a folder that cannot be written. With `again` what is left there of a run is
    moved into `unfinished_1/` and so on.
    """
    if run_dir is not None:
        path = run_dir.expanduser().absolute()
        while True:
            with suppress(FileNotFoundError):  # removed meanwhile by the run that had it
                claim = RunClaim(path, made=_make(path))
                try:
                    if again:
                        _move_aside(path)
                    _check_free(path)
                except InputError:
                    claim.release()
                    raise
                return claim
    first = runs_folder().absolute() / name / _moment()
    for number in count(1):
        path = first if number == 1 else first.with_name(f"{first.name}_{number}")
        made = [] if path.exists() else _make(path)
        if path in made:
            with suppress(InputError, FileNotFoundError):  # another process was faster
                return RunClaim(path, made=made)
    raise AssertionError("numbers do not end")


AUTO = "auto"
"""The value of `resume` that begins a run, or continues it, by what its folder holds."""


def run_to_continue(overrides: Sequence[str], run: str | None = AUTO) -> tuple[list[str], str | None]:
    """What `resume=auto` comes to: the overrides to resume with, and the run; None: a new run begins.

    Of another `run` than `AUTO` both are as given.

    The same command may be given again and again, by whoever restarts processes: what it gives besides single
    settings (an experiment, a group's choice, a setting added or removed) is left out where the run has been
    started with it. Raises InputError without a `run_dir` that can be looked at.
    """
    if run != AUTO:
        return list(overrides), run
    given = {key_of(each): each.partition("=")[2].strip("'\"") for each in overrides}
    if given.get("run_dir") in (None, "", "null"):
        raise InputError("resume=auto needs run_dir=FOLDER: the run begins there, or continues")
    if "${" in given["run_dir"]:
        raise InputError(
            f"resume=auto needs the folder itself: run_dir={given['run_dir']} is still to be resolved"
        )
    folder = Path(given["run_dir"]).expanduser()
    if not any((folder / CHECKPOINT_FOLDER).glob("step-*.ckpt")):
        return list(overrides), None
    recorded = read_run_json(folder).get("overrides")
    had = recorded if isinstance(recorded, list) else []
    groups = {"experiment", *default_choices("train")}
    kept = []
    for each in overrides:
        whole = each.startswith(("+", "~")) or key_of(each) in groups
        if key_of(each) != "run_dir" and not (whole and each in had):
            kept.append(each)
    named = {target.partition(".")[0] for each in overrides for target in _TARGET.findall(each)}
    if named and "trust" not in given:  # whoever gives a class again trusts it still
        kept.append(f"trust=[{','.join(sorted(named))}]")
    return kept, str(folder)


_TARGET = re.compile(r"_target_['\"]?\s*[=:]\s*['\"]?(\w[\w.]*)")


_ASIDE = "unfinished_"


def _move_aside(run_dir: Path) -> None:
    """Move what a run of gptpl's that has saved nothing has left into a folder of its own."""
    if any((run_dir / CHECKPOINT_FOLDER).glob("*.ckpt")):
        raise InputError(
            f"run_dir={run_dir} holds checkpoints that were not there a moment ago: run the command again"
        )
    record = read_run_json(run_dir)
    if not {"started", "versions", "overrides"} <= record.keys():
        return  # a folder that gptpl does not know, which `_check_free` looks at
    aside = next(path for n in count(1) if not (path := run_dir / f"{_ASIDE}{n}").exists())
    aside.mkdir()
    for name in (*FILES_OF_A_RUN, *_MORE_OF_A_RUN):
        if (run_dir / name).exists():
            (run_dir / name).rename(aside / name)
    log.warning("%s held a run that had not saved anything yet: it is now in %s", run_dir, aside)


def _moment() -> str:
    return datetime.now().astimezone().strftime("%Y-%m-%d_%H-%M-%S")


def _check_free(run_dir: Path) -> None:
    held = [name for name in FILES_OF_A_RUN if (run_dir / name).exists()]
    if {CONFIG_FILE, RUN_FILE} <= set(held):
        raise InputError(
            f"run_dir={run_dir} holds a run already: continue it with resume={run_dir}, or choose another"
        )
    if held:
        raise InputError(
            f"run_dir={run_dir} holds {held[0]}, of a run or of another program: choose another folder"
        )
    found = find_runs(run_dir, depth=2)
    if runs := [run for run in found if not run.name.startswith(_ASIDE)]:
        raise InputError(
            f"run_dir={run_dir} holds runs ({runs[0].relative_to(run_dir)}): a run has its own folder, give"
            f" run_dir={run_dir}/NAME"
        )
    if not os.access(run_dir, os.W_OK | os.X_OK):
        raise InputError(f"run_dir={run_dir} cannot be written: choose a folder you may write to")


def _make(path: Path) -> list[Path]:
    """Make a folder and those around it where they do not exist; returns those made, outermost first."""
    made: list[Path] = []
    for _ in range(_TRIES):
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        try:
            for folder in reversed(missing):
                with suppress(FileExistsError):  # another process made it; a file is refused below
                    folder.mkdir()
                    made.append(folder)
        except FileNotFoundError:
            continue  # another process removed the folder around it, which was empty again
        except OSError as error:
            _remove_empty(made)
            raise InputError(
                f"run_dir={path} cannot be made ({error.strerror}): choose a folder you may write to"
            ) from error
        if path.is_dir():
            return made
        if os.path.lexists(path):
            raise InputError(f"run_dir={path} is a file: give a folder")
    raise InputError(f"run_dir={path} is made and removed by other processes: choose another")


# --- which process --------------------------------------------------------------------------------------

PROCESS_RUN_DIR = "GPTPL_RUN_DIR"
"""Tells the processes that Lightning starts for other devices which folder the first one chose."""
PROCESS_CHECKPOINT = "GPTPL_CHECKPOINT"
"""Tells them the checkpoint that it resumes from, so that they need not verify it again."""


def process_run_dir() -> Path | None:
    """The folder that the first process chose, in the processes that it started; None in a first process.

    There PROCESS_RUN_DIR says nothing: anybody may have exported it.
    """
    given = os.environ.get(PROCESS_RUN_DIR)
    return Path(given) if given and not is_first_process() else None


def process_checkpoint(folder: Path) -> Path | None:
    """The checkpoint in `folder` that the first process resumes from, in the processes that it started."""
    given = Path(os.environ.get(PROCESS_CHECKPOINT, ""))
    return given if given.parent == folder and not is_first_process() else None
