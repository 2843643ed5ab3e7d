"""A folder in which one process works at a time."""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gptpl.errors import InputError

if sys.platform != "win32":
    import fcntl

log = logging.getLogger(__name__)

_TRIES, _PAUSE_SECONDS = 5, 0.03
"""`is_locked` holds the lock of a folder for a moment."""


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder, however this one ends; no file is left in it.

    Windows and some network file systems cannot lock a folder: nobody is kept out, with a warning. Raises
    InputError where another process has the folder, FileNotFoundError for a missing one.
    """
    if sys.platform == "win32":
        yield
        return
    descriptor, process = _locked(folder), os.getpid()
    try:
        yield
    finally:
        # Forked children have the descriptor, too: they must neither unlock the folder nor keep it locked.
        if os.getpid() == process:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _locked(folder: Path) -> int:
    """A descriptor of the folder, locked where the file system can."""
    while True:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            _lock(descriptor, folder)
            if os.path.samestat(os.fstat(descriptor), folder.stat()):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the folder was removed and made again before it was locked


def _lock(descriptor: int, folder: Path) -> None:
    for _ in range(_TRIES):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(_PAUSE_SECONDS)
        except OSError as error:
            log.warning("%s cannot be locked (%s): do not train in it twice", folder, error.strerror)
            return
    raise InputError(f"another process is training in {folder}: wait until it has ended, or stop it")


def is_locked(folder: Path) -> bool:
    """Whether another process has the folder now."""
    try:
        with locked_folder(folder):
            return False
    except InputError:
        return True
