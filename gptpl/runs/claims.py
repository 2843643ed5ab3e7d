"""A run's folder, claimed: one process trains in it, from before the slow work until the run ends."""

import os
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from datetime import datetime
from itertools import count
from pathlib import Path

from gptpl.errors import InputError
from gptpl.files.folder_lock import locked_folder
from gptpl.files.run_record import CONFIG_FILE, METRICS_FILE, RUN_FILE
from gptpl.runs.listing import CHECKPOINT_FOLDER, runs_folder

OF_A_RUN = (CONFIG_FILE, RUN_FILE, METRICS_FILE, CHECKPOINT_FOLDER)
"""What no folder of a new run may hold."""

_TRIES = 100


class RunClaim(AbstractContextManager["RunClaim"]):
    """A run's folder for one process alone, until `release`, the end of a `with`, or of the process.

    Whatever ends the process ends the claim, and no file tells of it. A folder that was made for the run and
    is empty when it is released, as that of a run that was refused, is removed again, with those around it
    that were made for it (`made`, the outermost first). Child processes neither have the claim nor end it:
    the processes of a run that train on further devices must not ask for one.

    Raises InputError where another run has the folder, FileNotFoundError where it is not there.
    """

    def __init__(self, path: Path, *, made: Sequence[Path] = ()) -> None:
        self.path = path
        lock = ExitStack()
        lock.enter_context(locked_folder(path))
        self._end = weakref.finalize(self, _release, lock, made, os.getpid())

    def release(self) -> None:
        """Gives the folder free; a second time this does nothing."""
        self._end()

    def __exit__(self, *error: object) -> None:
        self.release()


def claim_new_run(run_dir: Path | None, *, name: str, root: Path | None = None) -> RunClaim:
    """Makes and claims the folder of a new run, at once and before anything slow.

    `run_dir` is the folder that was asked for; None: `<root>/<name>/<date>_<time>`, with a number behind it
    for the second run that begins in a second. Raises InputError for a folder that holds a run or that
    another run has claimed, for a file, and for what cannot be written.
    """
    if run_dir is not None:
        return _claimed(run_dir.expanduser().absolute())
    first = (root or runs_folder()).absolute() / name / _moment()
    for number in count(1):
        path = first if number == 1 else first.with_name(f"{first.name}_{number}")
        made = [] if path.exists() else _make(path)
        if path in made:
            try:
                return RunClaim(path, made=made)
            except (InputError, FileNotFoundError):
                continue  # somebody was told its name
    raise AssertionError("numbers do not end")


def _moment() -> str:
    return datetime.now().astimezone().strftime("%Y-%m-%d_%H-%M-%S")


def _claimed(run_dir: Path) -> RunClaim:
    for _ in range(_TRIES):
        made = _make(run_dir)
        try:
            claim = RunClaim(run_dir, made=made)
        except FileNotFoundError:
            continue  # the one that had it has just removed it
        if held := [name for name in OF_A_RUN if (run_dir / name).exists()]:
            claim.release()
            if CONFIG_FILE in held:
                raise InputError(
                    f"run_dir={run_dir} holds a run already: continue it with resume={run_dir}, or choose"
                    " another"
                )
            raise InputError(f"run_dir={run_dir} holds what is left of a run ({held[0]}): choose another")
        if not os.access(run_dir, os.W_OK | os.X_OK):
            claim.release()
            raise InputError(f"run_dir={run_dir} cannot be written: choose a folder you may write to")
        return claim
    raise InputError(f"run_dir={run_dir} is made and removed by other processes: choose another")


def _make(path: Path) -> list[Path]:
    """Makes a folder, where there is none, and those around it; returns those made, outermost first."""
    made: list[Path] = []
    for _ in range(_TRIES):
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        try:
            for folder in reversed(missing):
                try:
                    folder.mkdir()
                    made.append(folder)
                except FileExistsError:
                    continue  # another process made it; a file is seen below
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
    raise InputError(f"run_dir={path} cannot be made: choose a folder you may write to")


def _release(lock: ExitStack, made: Sequence[Path], process: int) -> None:
    if os.getpid() == process:  # and not a child that began as its copy
        _remove_empty(made)
        lock.close()


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in reversed(folders):
        try:
            folder.rmdir()
        except OSError:
            return


# --- which process ----------------------------------------------------------------------------------------

PROCESS_RUN_DIR = "GPTPL_RUN_DIR"
"""Tells the processes that Lightning starts for other devices which folder the first one chose."""


def is_worker_process() -> bool:
    """Whether this process trains for a further device of a run whose first process is another one.

    By the ranks that Lightning's launcher, torchrun and SLURM set. The folder alone says nothing: anybody may
    have exported it.
    """
    for name in ("RANK", "SLURM_PROCID"):
        if os.environ.get(name, "").isdigit() and (name == "RANK" or "SLURM_NTASKS" in os.environ):
            return int(os.environ[name]) > 0
    ranks = [os.environ.get(name, "0") for name in ("LOCAL_RANK", "NODE_RANK")]
    return any(rank not in ("", "0") for rank in ranks)


def process_run_dir() -> Path | None:
    """The folder that the first process chose, in the processes that it started; None in a first process."""
    given = os.environ.get(PROCESS_RUN_DIR)
    return Path(given) if given and is_worker_process() else None
