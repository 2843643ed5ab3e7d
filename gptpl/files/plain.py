"""Reading what torch has saved, as plain data and tensors: never as code."""

import pickle
from pathlib import Path
from typing import Any

from gptpl.errors import InputError

_DAMAGE = (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError)
"""What torch raises over a file that is cut short (OSError 22 among them) or has wrong bytes in it."""


def read_plain(path: Path, *, key: str = "") -> Any:
    """What a file of `torch.save` holds, its tensors on the CPU and mapped from the file rather than copied.

    `key` is the setting that named the file, for messages.

    Raises:
        InputError: no such file, not readable, cut short, or holding code.
    """
    import torch

    name = f"{key}={path}" if key else str(path)
    if not path.is_file():
        raise InputError(f"{name} does not exist: give a run folder or a .ckpt file")
    try:
        path.open("rb").close()
    except OSError as error:
        raise InputError(f"{name} cannot be read ({error.strerror}): check its permissions") from error
    try:
        # What torch wrote before version 1.6 is no zip file, and cannot be mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=_begins_as_zip(path))
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{name} is not a plain checkpoint of tensors and data (it may be cut short or hold"
            " code): it was not loaded; use another checkpoint"
        ) from error
    except _DAMAGE as error:
        raise InputError(
            f"{name} is damaged or cut short ({path.stat().st_size:,} bytes): use another one"
        ) from error


def _begins_as_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"
