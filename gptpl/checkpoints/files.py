"""Checkpoints on disk: written whole or not at all, with their SHA-256, and the folder that keeps a run's."""

import hashlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import psutil
import torch
from lightning.pytorch.plugins.io import CheckpointIO

from gptpl.errors import InputError
from gptpl.files.durable import record_file, replacement, sha256_of, sync_folder, write_atomically
from gptpl.files.plain import read_plain

log = logging.getLogger(__name__)

LAST = "last.ckpt"
EXPORTED = "model.ckpt"
"""What an export in gptpl's own format is called."""
_STEP_FILE = re.compile(r"step-(\d+)\.ckpt")
_CHUNK_BYTES = 1 << 24
_CACHED_BYTES = 1 << 28
"""How much may be in the page cache before it is brought to the disk."""

# --- one file -------------------------------------------------------------------------------------------


class DurableCheckpointIO(CheckpointIO):
    """Lightning's way to the disk, replaced: it copies a checkpoint in memory and may leave half a file."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """See `write_checkpoint`; raises OSError naming `path`, whose old content is kept then."""
        write_checkpoint(checkpoint, Path(path))

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any | None = None, weights_only: bool | None = None
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


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint so that at every moment `path` is the whole old file or the whole new one.

    It is written beside its place, straight from the tensors, synced, and moved into place. Two files cannot
    be replaced in one move: where `path` exists, its record holds both hashes meanwhile.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path.parent)
    record, old = record_file(path), ""
    try:
        with replacement(path) as temporary:
            line = f"{_write(checkpoint, temporary)}  {path.name}\n"
            if path.exists():  # a record is made now where it has none, or it would pass for damaged soon
                old = _text(record) if record.exists() else f"{sha256_of(path)}  {path.name}\n"
            write_atomically(record, old + line, durable=True)
        sync_folder(path.parent)
        if old:
            write_atomically(record, line, durable=True)
    except OSError as error:
        error.filename = str(path)
        raise


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

    def flush(self) -> None:  # nothing waits
        pass


def _remove_leftovers(folder: Path) -> None:
    """Removes what killed processes were writing."""
    for leftover in folder.glob(".*.tmp"):
        process = leftover.stem.rpartition(".")[2].partition("-")[0]  # of its thread
        with suppress(OSError, OverflowError):  # a name that no process has
            if process.isdecimal() and (int(process) == os.getpid() or not psutil.pid_exists(int(process))):
                leftover.unlink()
                log.info("removed %s, which a killed process had left", leftover)


def verify(path: Path) -> str | None:
    """Why a checkpoint is not the one that was written, in words; None: it is, by the SHA-256 beside it.

    Raises FileNotFoundError where no SHA-256 is recorded.
    """
    record = record_file(path)
    try:
        text = _text(record)
    except FileNotFoundError:
        raise
    except OSError as error:
        return f"cannot be checked ({record.name} beside it: {error.strerror})"
    try:
        if path.stat().st_size == 0:
            return "is empty"
        actual = sha256_of(path)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    recorded = [line.split()[0] for line in text.splitlines() if line.split()]
    if not any(re.fullmatch("[0-9a-f]{64}", sha256) for sha256 in recorded):
        return f"cannot be checked ({record.name} beside it holds no SHA-256)"
    return None if actual in recorded else "is damaged (its SHA-256 is not the recorded one)"


def _text(record: Path) -> str:
    return record.read_text(encoding="ascii", errors="replace")


# --- a run's folder -------------------------------------------------------------------------------------


def checkpoint_file(given: str, *, key: str = "checkpoint") -> Path:
    """The file meant by a setting: itself, or of a run's folder `last.ckpt`, else `best.ckpt`.

    Of the folder of an export it is `model.ckpt`. Raises InputError for a folder without any of them.
    """
    path = Path(given).expanduser()
    if not path.is_dir():
        return path
    for candidate in (f"checkpoints/{LAST}", "checkpoints/best.ckpt", EXPORTED):
        if (path / candidate).is_file():
            return path / candidate
    raise InputError(
        f"{key}={given} holds no checkpoints/last.ckpt or best.ckpt: give a run folder or a .ckpt file"
    )


@dataclass(frozen=True, kw_only=True)
class Damaged:
    """A checkpoint that cannot be used, and why, in words that follow its name: "is missing"."""

    path: Path
    reason: str


@dataclass(frozen=True, kw_only=True)
class GoodCheckpoint:
    """The newest checkpoint that can be used."""

    path: Path
    step: int
    """-1 for the only file of an older format, which has no step in its name."""
    damaged: list[Damaged]
    """Newer ones that cannot."""
    unverified: bool
    """Whether no SHA-256 is recorded for it, so that it could only be read."""


class CheckpointFolder:
    """`step-00000050.ckpt`, the newest `keep` of them by step, and `last.ckpt`, a link to the newest.

    The times of the files play no role: a clock may go back.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        if keep < 1:
            raise InputError(f"callbacks.checkpoint_last.keep={keep} keeps no checkpoint: give 1 or more")
        self.folder = folder
        self.keep = keep

    def path(self, step: int) -> Path:
        """The file of a step."""
        return self.folder / f"step-{step:08d}.ckpt"

    def steps(self) -> list[int]:
        """The steps of the files that are there, ascending."""
        names = [path.name for path in self.folder.glob("step-*.ckpt")]
        return sorted(int(match[1]) for name in names if (match := _STEP_FILE.fullmatch(name)))

    def settle(self, step: int) -> None:
        """To be called when the file of `step` is written: `last.ckpt` becomes it, the oldest are removed."""
        _link(self.path(step), self.folder / LAST)
        sync_folder(self.folder)
        for old in [other for other in self.steps() if other != step][: -self.keep + 1 or None]:
            self.path(old).unlink(missing_ok=True)
            record_file(self.path(old)).unlink(missing_ok=True)

    def newest_good(self) -> GoodCheckpoint | None:
        """The newest file that is whole, by its SHA-256; None: there is none. InputError: all are damaged."""
        last = self.folder / LAST
        damaged: list[Damaged] = []
        if last.is_symlink() and not last.exists():
            damaged.append(Damaged(path=self.folder / last.readlink(), reason="is missing"))
        candidates = [(step, self.path(step)) for step in reversed(self.steps())]
        if not candidates and last.is_file():
            candidates = [(-1, last)]  # of an older format
        for step, path in candidates:
            unverified = False
            try:
                reason = verify(path)
            except FileNotFoundError:
                reason, unverified = _unreadable(path), True
            if reason is None:
                return GoodCheckpoint(path=path, step=step, damaged=damaged, unverified=unverified)
            damaged.append(Damaged(path=path, reason=reason))
        if not damaged:
            return None
        others = f", and {len(damaged) - 1} more cannot be used either" if len(damaged) > 1 else ""
        whole = _whole_beside(damaged[0].path)
        new = f"start a new run from init=run init.checkpoint={whole}" if whole else "start a new run"
        raise InputError(f"checkpoint {damaged[0].path} {damaged[0].reason}{others}: restore one, or {new}")


def _unreadable(path: Path) -> str | None:
    try:
        read_plain(path)
    except InputError as error:
        return str(error).removeprefix(f"{path} ").rpartition(": ")[0]
    return None


def _whole_beside(path: Path) -> Path | None:
    """Another checkpoint of the folder that is whole, by its SHA-256: the best, else the newest."""
    folder = CheckpointFolder(path.parent, keep=1)
    for other in (path.parent / "best.ckpt", *(folder.path(step) for step in reversed(folder.steps()))):
        if other.is_file() and other.resolve() != path.resolve():
            with suppress(FileNotFoundError):
                if verify(other) is None:
                    return other
    return None


@contextmanager
def whole_one_named(path: Path) -> Iterator[None]:
    """Where a checkpoint turns out to be no good, the error names one beside it that is."""
    try:
        yield
    except InputError as error:
        fact, found, _ = str(error).rpartition("use another ")
        whole = _whole_beside(path) if found else None
        if whole is None:
            raise
        raise InputError(f"{fact}use {whole}, which is whole") from error


def set_aside(damaged: Sequence[Damaged]) -> None:
    """Renames them to `*.damaged`, so that they neither count as the newest nor are overwritten."""
    for item in damaged:
        for path in (item.path, record_file(item.path)):
            with suppress(FileNotFoundError):
                path.replace(path.with_name(f"{path.name}.damaged"))


def _link(target: Path, link: Path) -> None:
    """Makes `link` point at a file of its folder, in one move."""
    with replacement(link) as temporary:
        try:
            temporary.symlink_to(target.name)
        except (OSError, NotImplementedError):  # Windows, FAT
            os.link(target, temporary)
