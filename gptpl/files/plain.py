"""Reading what torch has saved, as plain data and tensors: never as code."""

import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptpl.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

_DAMAGE = (
    *(RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError),
    zipfile.BadZipFile,
)
"""What torch raises over a file that is cut short (OSError 22 among them) or has wrong bytes in it."""


def read_plain(path: Path, *, key: str = "") -> Any:
    """What a file of `torch.save` holds, its tensors on the CPU and mapped from the file rather than copied.

    `key` is the setting that named the file, for messages.

    Raises:
        InputError: no such file, not readable, cut short, holding code, or less than it claims.
    """
    import torch

    name = f"{key}={path}" if key else str(path)
    if not path.is_file():
        raise InputError(f"{name} does not exist: give a run folder or a .ckpt file")
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
    except OSError as error:
        raise InputError(f"{name} cannot be read ({error.strerror}): check its permissions") from error
    try:
        if zipped and not _is_stored(path):
            raise InputError(f"{name} is packed otherwise than torch.save packs: use another one")
        # What torch wrote before version 1.6 is no zip file, and cannot be mapped.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{name} is not a plain checkpoint of tensors and data (it may be cut short or hold"
            " code), it was not loaded: use another checkpoint"
        ) from error
    except _DAMAGE as error:
        raise InputError(
            f"{name} is damaged or cut short ({path.stat().st_size:,} bytes): use another one"
        ) from error
    for tensor in tensors_in(content):
        plain = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        # A tensor of a trillion numbers takes a few bytes of a file if all of them are the same one.
        if not plain or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise InputError(
                f"{name} holds a tensor that claims to be {tuple(tensor.shape)} and is not: use another one"
            )
    return content


def check_sharing(tensors: Iterable["Tensor"], name: str) -> None:
    """Raises InputError where a model's tensors are more than twice the numbers that are stored.

    A head may be the token embedding's matrix; where all weights are one, each gets memory of its own.
    """
    found = list(tensors)
    stored = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in found)}
    if sum(tensor.nbytes for tensor in found) > 2 * sum(stored.values()):
        raise InputError(f"{name} holds weights that are one another's numbers: use another one")


def tensors_in(content: Any) -> list["Tensor"]:
    """All tensors in dictionaries and lists in one another, each once."""
    import torch

    found, seen, waiting = [], set(), [content]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, list | tuple | set):
            waiting += value
    return found


def _is_stored(path: Path) -> bool:
    """Whether the parts of a zip file lie in it as they are: packed ones could be far larger than it."""
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
    sizes = sum(part.file_size for part in parts)
    return sizes <= path.stat().st_size and all(part.compress_type == zipfile.ZIP_STORED for part in parts)
