"""Writes checkpoints that are whole or not there, with their SHA-256 beside them."""

import hashlib
import logging
import os
import re
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO

from gptpl.files.durable import record_file, sha256_of, sync_folder

log = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 24
_CACHED_BYTES = 1 << 28
"""How much may be in the page cache before it is brought to the disk."""


class DurableCheckpointIO(CheckpointIO):
    """Lightning's way to the disk, replaced: it copies a checkpoint in memory and may leave half a file.

    Here the file is written beside its place, straight from the tensors, synced, and moved into place; every
    file is read with `weights_only=True`.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Writes `path` and `path.sha256`; raises OSError naming `path`, whose old content is kept then."""
        write_checkpoint(checkpoint, Path(path))

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Any | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """The checkpoint, its tensors mapped from the file; raises ValueError for `weights_only=False`."""
        if weights_only is False:
            raise ValueError(f"{path}: weights_only=False would run code from the file")
        checkpoint: dict[str, Any] = torch.load(
            path, map_location=map_location or "cpu", weights_only=True, mmap=True
        )
        return checkpoint

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Removes the file and its SHA-256, where they are."""
        Path(path).unlink(missing_ok=True)
        record_file(Path(path)).unlink(missing_ok=True)


def verify(path: Path) -> str | None:
    """Why a checkpoint is not the one that was written, in words; None: it is, by the SHA-256 beside it.

    Raises FileNotFoundError where no SHA-256 is recorded.
    """
    try:
        record = _text(record_file(path))
    except FileNotFoundError:
        raise
    except OSError as error:
        return f"cannot be checked ({record_file(path).name} beside it: {error.strerror})"
    try:
        if path.stat().st_size == 0:
            return "is empty"
        actual = sha256_of(path)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    recorded = [line.split()[0] for line in record.splitlines() if line.split()]
    if not any(re.fullmatch("[0-9a-f]{64}", sha256) for sha256 in recorded):
        return f"cannot be checked ({record_file(path).name} beside it holds no SHA-256)"
    return None if actual in recorded else "is damaged (its SHA-256 is not the recorded one)"


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint so that at every moment `path` is the whole old file or the whole new one.

    Two files cannot be replaced in one move: where `path` exists, its record holds both hashes meanwhile.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        line = f"{_write(checkpoint, temporary)}  {path.name}\n"
        record = record_file(path)
        old = _recorded(path) if path.exists() else ""
        _write_record(record, old + line)
        temporary.replace(path)
        sync_folder(path.parent)
        if old:
            _write_record(record, line)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _write(checkpoint: dict[str, Any], temporary: Path) -> str:
    """Writes and syncs the file; returns its SHA-256. Raises the OSError that torch would hide."""
    with temporary.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as beside:
        hashing = _HashingFile(file, beside)
        try:
            torch.save(checkpoint, hashing)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise hashing.error or error from error
        if hashing.error is not None:
            raise hashing.error
        os.fsync(file.fileno())
    return hashing.sha256.hexdigest()


class _HashingFile:
    """What `torch.save` writes to: hashes what passes, and keeps the first error, which torch would hide.

    Each chunk is hashed while it is written; both let go of Python's lock. What is on disk leaves the page
    cache at once: nobody is going to read it soon, and filling gigabytes of new pages took longer than
    writing them (experiments/exact_resume).
    """

    def __init__(self, file: FileIO, beside: Executor) -> None:
        self.sha256 = hashlib.sha256()
        self.error: OSError | None = None
        self._file = file
        self._beside = beside
        self._cached_bytes = 0

    def write(self, data: Any) -> int:
        """Writes all of it."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _CHUNK_BYTES):
            chunk = view[start : start + _CHUNK_BYTES]
            hashed = self._beside.submit(self.sha256.update, chunk)
            try:
                self._write_chunk(chunk)
            except OSError as error:
                self.error = error
                raise
            finally:
                hashed.result()  # the next chunk comes after it, and the memory is torch's
        return len(view)

    def _write_chunk(self, chunk: memoryview) -> None:
        self._cached_bytes += len(chunk)
        while chunk:
            chunk = chunk[self._file.write(chunk) or 0 :]
        if self._cached_bytes >= _CACHED_BYTES and hasattr(os, "posix_fadvise"):
            os.fdatasync(self._file.fileno())
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            self._cached_bytes = 0

    def flush(self) -> None:
        """Nothing waits."""


def _write_record(record: Path, text: str) -> None:
    temporary = record.with_name(f".{record.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="ascii", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(record)
        sync_folder(record.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _text(record: Path) -> str:
    return record.read_text(encoding="ascii", errors="replace")


def _recorded(path: Path) -> str:
    """The record of a file that is there; made now where it has none, or it would pass for damaged soon."""
    if record_file(path).exists():
        return _text(record_file(path))
    return f"{sha256_of(path)}  {path.name}\n"


def _remove_leftovers(folder: Path) -> None:
    """Removes what killed processes were writing."""
    for leftover in folder.glob(".*.tmp"):
        process = leftover.suffixes[-2].removeprefix(".") if len(leftover.suffixes) > 1 else ""
        if process.isdecimal() and (int(process) == os.getpid() or not _is_alive(int(process))):
            with suppress(OSError):
                leftover.unlink()
                log.info("removed %s, which a killed process had left", leftover)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # such as that of another user
        return True
    return True
