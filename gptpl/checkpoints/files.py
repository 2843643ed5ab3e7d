"""Checkpoint files: written whole or not at all, verified by hashes; and the folder that keeps a run's."""

import copy
import hashlib
import logging
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import psutil
import torch

from gptpl.errors import InputError
from gptpl.files.durable import record_file, record_sha256, replacement, sha256_of, sync_folder
from gptpl.files.plain import damaged_part, read_plain, tensors_in
from gptpl.files.run_record import BEST, CHECKPOINT_FOLDER, LAST

log = logging.getLogger(__name__)

EXPORTED = "model.ckpt"
"""The file of an export in gptpl's own format."""
_STEP_FILE = re.compile(r"step-(\d+)\.ckpt")
PARTS_KEY = "gptpl_parts"
"""The entry of a sharded checkpoint with the names and SHA-256 of its parts: see `sharded`."""
_TOKEN = re.compile(r"[0-9a-f]{8}")
_CHUNK_BYTES = 1 << 24
_CACHED_BYTES = 1 << 28
"""Bytes that may be in the page cache before they are flushed to the disk."""

# --- one file -------------------------------------------------------------------------------------------


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint, its SHA-256 and its parts, if they exist."""
    path.unlink(missing_ok=True)
    record_file(path).unlink(missing_ok=True)
    _remove_needless(part_files(path))


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that `path` is at every moment the whole old file or the whole new one.

    A temporary file in the same folder is written straight from the tensors, synced, and renamed. The file
    and its SHA-256 cannot be replaced in one rename: meanwhile the record holds the hashes of both files.
    """
    _remove_leftovers(path.parent)
    write_durably(checkpoint, path)
    _remove_needless(part_files(path))  # of what the file was before, or of a save that was interrupted


def write_durably(checkpoint: dict[str, Any], path: Path) -> None:
    """Write one file as `write_checkpoint` does, and touch no other: other machines may be writing theirs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    old: list[str] = []
    try:
        with replacement(path) as temporary:
            new = _write(checkpoint, temporary)
            if path.exists():
                with suppress(OSError):  # a record that cannot be read is replaced
                    old = _recorded(path)
                old = old or [sha256_of(path)]
            record_sha256(path, *old, new)
        sync_folder(path.parent)
        if old:
            record_sha256(path, new)
    except OSError as error:
        error.filename = str(path)
        raise


def _write(checkpoint: dict[str, Any], temporary: Path) -> str:
    """Write and sync the file; return its SHA-256. Raises the OSError that torch would hide."""
    with temporary.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as hasher:
        hashing = _HashingFile(file, hasher)
        try:
            torch.save(checkpoint, hashing)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise hashing.error or error from error
        if hashing.error is not None:
            raise hashing.error
        os.fsync(file.fileno())
    return hashing.sha256.hexdigest()


def snapshot_bytes(checkpoint: dict[str, Any]) -> int:
    """Bytes of memory that a `snapshot` takes."""
    dense = (each for each in tensors_in(checkpoint) if each.layout is torch.strided)
    return sum(storage.nbytes() for storage in {each.untyped_storage() for each in dense})


def snapshot(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A copy on the host, which later changes of tensors, lists and dictionaries do not reach.

    It makes the same file: tensors that share memory, such as tied weights, do so in the copy.
    """
    memory: dict[torch.UntypedStorage, torch.Tensor] = {}
    copies: dict[int, Any] = {}
    for tensor in tensors_in(checkpoint):
        if type(tensor) is torch.Tensor and tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            if storage not in memory:
                flat = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
                memory[storage] = flat.to("cpu", copy=True)
            place = (tensor.storage_offset(), tensor.size(), tensor.stride())
            copied = torch.empty(0, dtype=tensor.dtype).set_(memory[storage].untyped_storage(), *place)
            copies[id(tensor)] = copied.requires_grad_(tensor.requires_grad)
    return copy.deepcopy(checkpoint, copies)


class _HashingFile:
    """What `torch.save` writes to: hashes the bytes, and keeps the first error, which torch would hide.

    Each chunk is hashed while it is written; both release Python's lock. Written pages leave the page cache
    early: nobody reads them soon, and filling gigabytes of new pages took longer than writing them
    (experiments/exact_resume).
    """

    def __init__(self, file: FileIO, hasher: Executor) -> None:
        self.sha256 = hashlib.sha256()
        self.error: OSError | None = None
        self._file = file
        self._hasher = hasher
        self._cached_bytes = 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _CHUNK_BYTES):
            chunk = view[start : start + _CHUNK_BYTES]
            hashed = self._hasher.submit(self.sha256.update, chunk)
            try:
                self._write_chunk(chunk)
            except OSError as error:
                self.error = error
                raise
            finally:
                hashed.result()  # before the next chunk, and before torch reuses the memory
        return len(view)

    def _write_chunk(self, chunk: memoryview) -> None:
        self._cached_bytes += len(chunk)
        while chunk:
            chunk = chunk[self._file.write(chunk) or 0 :]
        if self._cached_bytes >= _CACHED_BYTES and hasattr(os, "posix_fadvise"):
            os.fdatasync(self._file.fileno())
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            self._cached_bytes = 0

    def flush(self) -> None:  # torch calls it; nothing is buffered
        pass


def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of killed processes, but those of parts: of any machine's processes."""
    for leftover in folder.glob(".*.tmp"):
        if ".part." in leftover.name:
            continue
        process = leftover.stem.rpartition(".")[2].partition("-")[0]
        with suppress(OSError, OverflowError):  # OverflowError: a number that no process can have
            if process.isdecimal() and (int(process) == os.getpid() or not psutil.pid_exists(int(process))):
                leftover.unlink()
                log.info("removed %s, which a killed process had left", leftover)


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint file, such as "is missing"; None: it is as it was written.

    Checked by the SHA-256 recorded next to it; of a file without that, by the CRC-32 that `torch.save` stores
    in the file for each tensor and for the rest of the checkpoint. A file that is replaced meanwhile, as
    best.ckpt is, is checked again: its hash was compared with that of the other one.
    """
    files = (path, record_file(path))
    before = [*map(file_version, files)]
    wrong = _what_is_wrong(path)
    return wrong if wrong is None or [*map(file_version, files)] == before else _what_is_wrong(path)


def file_version(path: Path) -> tuple[int, ...] | None:
    """What tells a file from one that has replaced it; None: there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _what_is_wrong(path: Path) -> str | None:
    try:
        if path.stat().st_size == 0:
            return "is empty"
        recorded = _recorded(path)
        if recorded and sha256_of(path) not in recorded:
            return "is damaged (its SHA-256 is not the recorded one)"
        if not recorded and (part := damaged_part(path)):
            return f"is damaged ({part} does not have its CRC-32)"
        return _wrong_part(path)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _recorded(path: Path) -> list[str]:
    try:
        text = record_file(path).read_text(encoding="ascii", errors="replace")
    except (FileNotFoundError, IsADirectoryError):
        return []
    return re.findall(r"^[0-9a-f]{64}\b", text, re.MULTILINE)


# --- the parts of a sharded checkpoint ------------------------------------------------------------------


def part_file(path: Path, token: str, number: int, of: int) -> Path:
    """The file of a part of a checkpoint; the `token` tells it from those of an earlier save of that name."""
    return path.with_name(f"{path.stem}.{token}-{number}-of-{of}.part")


def part_files(path: Path) -> list[Path]:
    """The files of all parts, finished or not, that were written for a checkpoint of this name."""
    return _part_files(path.parent, re.escape(path.stem))


def _part_files(folder: Path, stem: str) -> list[Path]:
    name = re.compile(
        rf"\.?{stem}\.[0-9a-f]{{8}}-\d+-of-\d+\.part(\.sha256|\.failed)?(\.damaged|\.\d+-\d+\.tmp)?"
    )
    return [file for file in folder.iterdir() if name.fullmatch(file.name)] if folder.is_dir() else []


def _remove_needless(files: Sequence[Path]) -> None:
    """Remove those that belong to no part that any checkpoint of their folder names."""
    if not files:
        return
    needed: set[str] = set()
    for checkpoint in files[0].parent.glob("*.ckpt"):
        with suppress(InputError):
            needed |= {part.name for part in parts_of(read_plain(checkpoint), checkpoint)}
    for file in files:
        part = file.name.partition(".part")[0].removeprefix(".") + ".part"
        if file.suffix != ".damaged" and (part not in needed or file.suffix == ".tmp"):
            file.unlink(missing_ok=True)


def parts_of(checkpoint: Any, path: Path) -> dict[Path, str]:
    """The files of a checkpoint's parts, in order, and the SHA-256 of each; none: it is not sharded.

    Raises InputError for names that gptpl does not give: they are only looked for next to the checkpoint.
    """
    if not isinstance(checkpoint, Mapping) or PARTS_KEY not in checkpoint:
        return {}
    entry = checkpoint[PARTS_KEY] if isinstance(checkpoint[PARTS_KEY], Mapping) else {}
    stem, token = str(entry.get("stem")), str(entry.get("token"))
    hashes = entry["sha256"] if isinstance(entry.get("sha256"), list) else []
    is_name = Path(stem).name == stem != ".." and "\\" not in stem and stem.isprintable()
    if not (is_name and _TOKEN.fullmatch(token) and hashes and all(isinstance(each, str) for each in hashes)):
        raise InputError(
            f"checkpoint={path} is damaged (it names no parts of its own): use another checkpoint"
        )
    named, of = Path(f"{stem}.ckpt"), len(hashes)
    names = [part_file(named, token, number, of).name for number in range(1, of + 1)]
    beside = path if path.with_name(names[0]).exists() else path.resolve()  # or of a link's target
    return {beside.with_name(name): sha256 for name, sha256 in zip(names, hashes, strict=True)}


def _wrong_part(path: Path) -> str | None:
    try:
        content = read_plain(path)
    except InputError:
        return None  # whoever reads it says so
    try:
        parts = parts_of(content, path)
    except InputError:
        return "is damaged (it names no parts of its own)"
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(lambda part: sha256_of(part) if part.is_file() else None, parts)
        for part, found in zip(parts, hashes, strict=True):
            if found != parts[part]:
                what = MISSING_PART if found is None else "does not have its SHA-256"
                return f"is damaged (its part {part.name} {what})"
    return None


MISSING_PART = "is missing: copy it together with the file"


# --- a run's folder -------------------------------------------------------------------------------------


def checkpoint_file(given: str, *, key: str = "checkpoint") -> Path:
    """The file that a setting names: the path itself; in a run's folder `last.ckpt`, else `best.ckpt`.

    In the folder of an export it is `model.ckpt`. Raises InputError for a folder without any of them.
    """
    path = Path(given).expanduser()
    if not path.is_dir():
        return path
    for candidate in (f"{CHECKPOINT_FOLDER}/{LAST}", f"{CHECKPOINT_FOLDER}/{BEST}", EXPORTED):
        if (path / candidate).is_file():
            return path / candidate
    raise InputError(
        f"{key}={given} holds no checkpoints/last.ckpt or best.ckpt: give a run folder or a .ckpt file"
    )


@dataclass(frozen=True, kw_only=True)
class Damaged:
    """A checkpoint that cannot be used, and why: see `verify`."""

    path: Path
    reason: str


@dataclass(frozen=True, kw_only=True)
class GoodCheckpoint:
    """The newest checkpoint that can be used, and the newer ones that cannot."""

    path: Path
    damaged: list[Damaged]


class CheckpointFolder:
    """`step-00000050.ckpt`, the newest `keep` of them by step, and `last.ckpt`, a link to the newest.

    The files' times play no role: a clock may be set back.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        if keep < 1:
            raise InputError(f"callbacks.checkpoint_last.keep must be 1 or more, got {keep}")
        self.folder = folder
        self.keep = keep

    def path(self, step: int) -> Path:
        """The file of a step."""
        return self.folder / f"step-{step:08d}.ckpt"

    def steps(self) -> list[int]:
        """The steps of the existing files, ascending."""
        names = [path.name for path in self.folder.glob("step-*.ckpt")]
        return sorted(int(match[1]) for name in names if (match := _STEP_FILE.fullmatch(name)))

    def settle(self, step: int) -> None:
        """Make `last.ckpt` the file of `step`, which has just been written, and remove the oldest files."""
        with replacement(self.folder / LAST) as link:
            try:
                link.symlink_to(self.path(step).name)
            except (OSError, NotImplementedError):  # Windows, FAT
                os.link(self.path(step), link)
        sync_folder(self.folder)
        for old in [other for other in self.steps() if other != step][: -self.keep + 1 or None]:
            remove_checkpoint(self.path(old))
        _remove_needless(_part_files(self.folder, r"step-\d+"))  # of saves that were not finished

    def newest_good(self) -> GoodCheckpoint | None:
        """The newest file that is whole; None: there are no files. Raises InputError if all are damaged."""
        last = self.folder / LAST
        damaged: list[Damaged] = []
        if last.is_symlink() and not last.exists():
            damaged.append(Damaged(path=self.folder / last.readlink(), reason="is missing"))
        candidates = [self.path(step) for step in reversed(self.steps())]
        if not candidates and last.is_file():
            candidates = [last]  # of format version 1
        for path in candidates:
            reason = verify(path)
            if reason is None:
                return GoodCheckpoint(path=path, damaged=damaged)
            damaged.append(Damaged(path=path, reason=reason))
        if not damaged:
            return None
        others = f", and {len(damaged) - 1} more cannot be used either" if len(damaged) > 1 else ""
        best = self.folder / BEST  # each of the others has just been found damaged
        whole = best if verify(best) is None else None
        new = f"start a new run from init=run init.checkpoint={whole}" if whole else "start a new run"
        raise InputError(f"checkpoint {damaged[0].path} {damaged[0].reason}{others}: restore one, or {new}")


def whole_neighbour(path: Path) -> Path | None:
    """Another checkpoint of the folder that is whole: the best, else the newest."""
    folder = CheckpointFolder(path.parent, keep=1)
    for other in (path.parent / BEST, *(folder.path(step) for step in reversed(folder.steps()))):
        if other.is_file() and other.resolve() != path.resolve() and verify(other) is None:
            return other
    return None


def set_aside(damaged: Sequence[Damaged]) -> None:
    """Rename them to `*.damaged`, so that they neither count as the newest nor are overwritten."""
    for item in damaged:
        for path in (item.path, record_file(item.path), *part_files(item.path)):
            if path.suffix == ".tmp":
                path.unlink(missing_ok=True)
                continue
            with suppress(FileNotFoundError):
                path.replace(path.with_name(f"{path.name}.damaged"))
