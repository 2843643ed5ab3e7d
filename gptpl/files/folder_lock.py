"""A folder that one process at a time works in."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gptpl.errors import InputError

if sys.platform != "win32":
    import fcntl

log = logging.getLogger(__name__)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Keeps other processes out of the folder, however this one ends; it leaves no file there.

    Where a folder cannot be locked (Windows, some network file systems) that is said, and nobody is kept out.
    Raises InputError where another process has the folder.
    """
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another process is training in {folder}: wait until it has ended, or stop it"
            ) from None
        except OSError as error:
            log.warning("%s cannot be locked (%s): do not train in it twice", folder, error.strerror)
        yield
    finally:
        os.close(descriptor)


def is_locked(folder: Path) -> bool:
    """Whether another process has the folder now."""
    try:
        with locked_folder(folder):
            return False
    except InputError:
        return True
