"""What others wrote, read strictly: JSON, and what torch has saved, as plain data and never as code."""

import errno
import json
import pickle
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from gptpl.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

_DAMAGE = (
    *(RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError),
    *(zipfile.BadZipFile, zlib.error),
)
"""What torch raises over a file that is cut short (OSError 22 among them) or has wrong bytes in it."""


def parse_json(text: str, place: str) -> Any:
    """Parse a JSON text; `place` names it in messages, such as "data.jsonl, line 3".

    Raises InputError for broken JSON, NaN and Infinity, lone surrogates, numbers of thousands of digits, and
    nesting that is too deep.
    """

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        value = json.loads(text, parse_constant=refuse)
        if "\\u" in text:  # how a surrogate gets in
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place} is not valid JSON ({error}): correct the file") from error
    return value


def read_plain(path: Path, *, key: str = "") -> Any:
    """Load a file of `torch.save`; its tensors are on the CPU, mapped from the file rather than copied.

    `key` is the setting that named the file, for messages. Raises InputError for a file that is missing,
    unreadable or cut short, that holds code, or whose tensors claim more numbers than it holds.
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
        # What torch wrote before version 1.6 is not a zip file, and cannot be mapped.
        stored = not zipped or _is_stored(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped) if stored else None
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{name} is not a plain checkpoint of tensors and data (it may be cut short or hold"
            " code), it was not loaded: use another checkpoint"
        ) from error
    except _DAMAGE as error:
        raise InputError(
            f"{name} is damaged or cut short ({path.stat().st_size:,} bytes): use another one"
        ) from error
    if not stored:
        raise InputError(f"{name} is compressed, as torch.save never does: use another one")
    for tensor in tensors_in(content):
        plain = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        # A trillion numbers that are all the same one take a few bytes of a file.
        if not plain or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise InputError(
                f"{name} lacks numbers of a tensor of shape {tuple(tensor.shape)}: use another one"
            )
    return content


def _is_stored(path: Path) -> bool:
    """Whether a zip file's parts are not compressed: they could be far larger than the file."""
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
    sizes = sum(part.file_size for part in parts)
    return sizes <= path.stat().st_size and all(part.compress_type == zipfile.ZIP_STORED for part in parts)


def damaged_part(path: Path) -> str | None:
    """The part of a `torch.save` file whose CRC-32 is not the stored one; None: all of them are as written.

    torch stores a CRC-32 with each tensor and with the pickle of all the rest, but does not check them.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip()
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # not a cut file's, but the system's
            raise
        return "the directory of its parts"


def check_sharing(tensors: Iterable["Tensor"], name: str) -> None:
    """Raise InputError where a model's tensors have more than twice the numbers that are stored.

    A head may be the token embedding's matrix; were all weights one matrix, each would get its own memory.
    """
    found = list(tensors)
    stored = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in found)}
    if sum(tensor.nbytes for tensor in found) > 2 * sum(stored.values()):
        raise InputError(f"{name} stores the same numbers for several weights: use another one")


def tensors_in(content: Any) -> list["Tensor"]:
    """All tensors in nested dictionaries and lists, each once."""
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
