"""Files that are whole or absent, the hashes next to them, results kept as they come, folders with a lock."""

import hashlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from gptpl.errors import InputError
from gptpl.text import shortened

if sys.platform != "win32":
    import fcntl

log = logging.getLogger(__name__)


def check_new(path: Path, key: str = "output") -> None:
    """Raise InputError for a path that exists, or whose folder does not; `key` is the setting that has it."""
    if path.exists():
        raise InputError(f"{key}={path} is there already: give a new name, or remove it")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{key}={path} is in a folder that does not exist: make it first")


@contextmanager
def replacement(path: Path) -> Iterator[Path]:
    """A temporary path in the folder of `path`, which it replaces at the end; on failure it is removed.

    A reader sees the file as it was or as it is. Of several processes that write it, the last one wins.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_file(path: Path, *, durable: bool = False) -> Iterator[BinaryIO]:
    """A `replacement`, opened for bytes; `durable`: it survives a power cut."""
    with replacement(path) as temporary, temporary.open("wb") as file:
        yield file
        if durable:
            file.flush()
            os.fsync(file.fileno())
    if durable:
        sync_folder(path.parent)


def write_atomically(path: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Write a `new_file`; text as UTF-8, line ends as they are."""
    with new_file(path, durable=durable) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


def append_durably(path: Path, text: str) -> None:
    """Append UTF-8 text in one write; it is on disk when this returns."""
    with path.open("a", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def json_lines(values: Iterable[Any]) -> str:
    """A line of JSON for each value."""
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def sync_folder(folder: Path) -> None:
    """Let a rename survive a power cut; Windows has no such call for folders."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def share(folder: Path) -> None:
    """Give a temporary folder, which only its owner may read, and its files the permissions of new ones."""
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~umask)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record_file(path: Path) -> Path:
    """The file with the hash of a file, in the form that `sha256sum --check` reads."""
    return path.with_name(f"{path.name}.sha256")


def record_sha256(path: Path, *hashes: str) -> None:
    """Write the `record_file` of a file: one hash, or while the file is being replaced both files'."""
    text = "".join(f"{sha256}  {path.name}\n" for sha256 in hashes)
    write_atomically(record_file(path), text, durable=True)


def recorded_sha256(path: Path) -> str | None:
    """The hash in the `record_file` of a file, if there is one."""
    try:
        words = record_file(path).read_text(encoding="ascii", errors="replace").split()
    except FileNotFoundError:
        return None
    return words[0] if words else None


class PartialResults:
    """A list of JSON values that come one by one, and become the file `output` when it is complete.

    Until then they are in `<output>.partial`, JSON Lines, below a line with the `settings` they depend on.
    What was added is on disk, also after a power cut; a torn last line is dropped.

    Raises InputError where `output` exists, and for a `.partial` that is damaged or of other settings.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any]) -> None:
        self.output = output
        self.path = output.with_name(output.name + ".partial")
        check_new(output)
        settings = json.loads(json.dumps(settings))  # as they will be read
        self.values: list[Any] = []
        if self.path.exists():
            self.values = self._found(settings)
        else:
            write_atomically(self.path, json_lines([{"settings": settings}]), durable=True)

    def _found(self, wanted: Mapping[str, Any]) -> list[Any]:
        """The values of an earlier process; the file is cut behind its last whole line."""
        whole = self.path.read_bytes().rpartition(b"\n")[0]
        try:
            header, *values = map(json.loads, whole.decode("utf-8").split("\n"))
            settings = header["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.path} is damaged: remove it to start over") from error
        for name in sorted(settings.keys() | wanted.keys()):
            if settings.get(name) != wanted.get(name):
                old, new = (json.dumps(each.get(name), ensure_ascii=False) for each in (settings, wanted))
                raise InputError(
                    f"{self.path} was started with {name}={shortened(old, 40)}, not {shortened(new, 40)}:"
                    " remove it, or give another output="
                )
        os.truncate(self.path, len(whole) + 1)
        return values

    def add(self, values: Sequence[Any]) -> None:
        """Append values; they are on disk when this returns."""
        append_durably(self.path, json_lines(values))
        self.values += values

    def finish(self) -> None:
        """Write all values to the output, a JSON list, and remove the partial file."""
        text = json.dumps(self.values, ensure_ascii=False, indent=4) + "\n"
        write_atomically(self.output, text, durable=True)
        self.path.unlink()


# --- a folder in which one process works at a time ------------------------------------------------------

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
