"""The one way in which files come from the network: retried, resumed, checked, never half-written."""

import errno
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from gptpl.errors import InputError
from gptpl.files.durable import record_file, recorded_sha256, sha256_of, sync_folder

if TYPE_CHECKING:
    import requests

log = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 16
_TRY_AGAIN_STATUS = frozenset({408, 429, *range(500, 600)})


def cache_dir() -> Path:
    """Folder for downloads and encoded corpora: GPTPL_CACHE, else the user's cache; it may not exist yet."""
    if chosen := os.environ.get("GPTPL_CACHE"):
        return Path(chosen).expanduser().absolute()
    import platformdirs

    return platformdirs.user_cache_path("gptpl", appauthor=False)


def download(
    url: str,
    *,
    sha256: str | None,
    size: int | None = None,
    filename: str | None = None,
    cache_dir: str | Path | None = None,
    attempts: int = 4,
    timeout_seconds: float = 30.0,
    backoff_seconds: float = 1.0,
) -> Path:
    """The file of that address and hash in the cache folder, fetched first when it is not there.

    A file with the right hash is taken as it is, without the network. Where no hash is published, that of the
    first download is recorded in `<filename>.sha256` beside the file, and is the right one from then on.
    Otherwise the bytes go to
    `<filename>.part`, which an interrupted download leaves behind and the next one continues; only the
    complete file with the right hash is renamed to its final name. Two processes that want the same file
    wait for each other.

    Args:
        url: http(s) address.
        sha256: hash of the file, 64 hexadecimal digits; None: not published.
        size: bytes of the file; None: not published.
        filename: name in the cache folder, without a path; None: the last part of the address.
        cache_dir: folder; None: `cache_dir()`.
        attempts: tries in a row that bring nothing new, before giving up.
        timeout_seconds: longest silence of the server.
        backoff_seconds: wait after the first failed try, doubled after each further one.

    Raises:
        InputError: a file name with a path, no connection, an address that does not exist, a download that
            stays cut short, a wrong size or hash, a folder or disk that does not take the file.
    """
    target = _target(url, filename, cache_dir)
    source = _Source(
        url=url,
        published=sha256.lower() if sha256 else None,
        size=size,
        target=target,
        attempts=attempts,
        timeout_seconds=timeout_seconds,
        backoff_seconds=backoff_seconds,
    )
    try:
        if not source.is_complete():
            source.target.parent.mkdir(parents=True, exist_ok=True)
            with _locked(source.target):
                if not source.is_complete():  # another process may have brought it meanwhile
                    _replace(source)
    except OSError as error:
        raise InputError(
            f"cannot keep {source.target} ({error.strerror or error}): "
            "make room there, or set GPTPL_CACHE to a folder that can be written"
        ) from error
    return source.target


@dataclass(frozen=True, kw_only=True)
class _Source:
    url: str
    published: str | None
    size: int | None
    target: Path
    attempts: int
    timeout_seconds: float
    backoff_seconds: float

    @property
    def sha256(self) -> str | None:
        """The hash that the file must have: the published one, or what was recorded of the first download."""
        return self.published or recorded_sha256(self.target)

    @property
    def part(self) -> Path:
        """Where the bytes go until they are complete."""
        return self.target.with_name(f"{self.target.name}.part")

    @property
    def received(self) -> int:
        """Bytes in the part file."""
        return self.part.stat().st_size if self.part.exists() else 0

    def is_complete(self) -> bool:
        """Whether the file is there, with its size and hash; one put there by hand is recorded."""
        if not self.target.is_file() or self.size not in (None, self.target.stat().st_size):
            return False
        actual = sha256_of(self.target)
        if self.sha256 is None:
            self.remember(actual)
        return actual == self.sha256

    def remember(self, sha256: str) -> None:
        """Records the hash of a file whose hash nobody published."""
        log.info("%s: no SHA-256 is published, %s is recorded and holds from now on", self.url, sha256)
        record_file(self.target).write_text(f"{sha256}  {self.target.name}\n", encoding="ascii")

    def failure(self, reason: str) -> InputError:
        hint = f" (SHA-256 {self.sha256})" if self.sha256 else ""
        return InputError(
            f"cannot download {self.url} ({reason}): check the address and the network, "
            f"or put the file by hand at {self.target}{hint}"
        )


class _TryAgainError(Exception):
    """A try that failed for a reason which may pass."""


def _target(url: str, filename: str | None, folder: str | Path | None) -> Path:
    name = filename or PurePosixPath(unquote(urlsplit(url).path)).name
    if not name:
        raise InputError(f"the address {url!r} ends in no file name: give the address of a file")
    return (cache_dir() if folder is None else Path(folder).expanduser()) / file_name(name)


def file_name(name: str) -> str:
    """The name itself. Raises InputError for one that would lead out of its folder, on any system."""
    parts = PureWindowsPath(name)  # which knows both slashes, drives and streams (`a:b`)
    if parts.name != name or name in (".", "..") or ":" in name or not name.isprintable():
        raise InputError(f"the file name {name!r} is not a plain name: give one without a folder or drive")
    return name


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    import filelock

    lock = filelock.FileLock(f"{target}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        log.info("waiting for another process that downloads %s", target)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _replace(source: _Source) -> None:
    """Fetch, check, and put the file in its place, over a damaged one if there is one."""
    if source.target.exists():
        log.warning("%s has not the right size or SHA-256: fetching it anew", source.target)
    resumed = source.received > 0
    _fetch(source)
    actual = sha256_of(source.part)
    if source.sha256 not in (None, actual) and resumed:
        log.warning("%s, continued from an earlier download, has the wrong hash: starting anew", source.part)
        source.part.unlink()
        _fetch(source)
        actual = sha256_of(source.part)
    if source.sha256 not in (None, actual):
        source.part.unlink()
        recorded = "" if source.published else f" (as recorded in {record_file(source.target)})"
        raise InputError(
            f"{source.url} has SHA-256 {actual}, not {source.sha256}{recorded}: the file changed there or on"
            f" its way; try again later, or put the right one by hand at {source.target}"
        )
    if source.sha256 is None:
        source.remember(actual)
    with source.part.open("rb+") as file:
        os.fsync(file.fileno())
    source.part.replace(source.target)
    sync_folder(source.target.parent)


def _fetch(source: _Source) -> None:
    """Bring the part file to its full length, in as many tries as make progress and a few more."""
    failures, most = 0, source.received
    log.info("downloading %s to %s", source.url, source.target)
    while True:
        try:
            _receive(source)
            return
        except _TryAgainError as error:
            failures = failures + 1 if source.received <= most else 1
            most = max(most, source.received)
            if failures >= source.attempts:
                raise source.failure(str(error)) from error
            wait_seconds = source.backoff_seconds * 2 ** (failures - 1)
            log.warning("%s: %s; trying again in %g s", source.url, error, wait_seconds)
            time.sleep(wait_seconds)


def _receive(source: _Source) -> None:
    """One request. Raises _TryAgainError when the part file is not complete after it."""
    import requests

    headers = {"Accept-Encoding": "identity"}  # compressed bytes could not be resumed
    if source.received:
        headers["Range"] = f"bytes={source.received}-"
    try:
        with requests.get(
            source.url, headers=headers, stream=True, timeout=source.timeout_seconds
        ) as response:
            # 416: nothing comes after the part file. It is complete, or it fits no more: the hash will tell.
            if response.status_code != 416 or not source.received:
                _write(source, response)
            elif source.size not in (None, source.received):
                received = source.received
                source.part.unlink()  # it would stand in the way of the right one
                raise source.failure(f"it has {received:,} bytes there, not {source.size:,}")
    except (requests.ConnectionError, requests.Timeout) as error:
        reason = f"no connection, or no answer for {source.timeout_seconds:g} s"
        raise _TryAgainError(reason) from error
    except requests.exceptions.ChunkedEncodingError as error:
        raise _TryAgainError(f"cut short after {source.received} bytes") from error
    except requests.RequestException as error:  # an address that is none, too many redirections
        raise source.failure(" ".join(str(error).split())) from error


def _write(source: _Source, response: "requests.Response") -> None:
    """Append what the server sends to the part file, or begin it anew where the server ignores ranges."""
    from tqdm import tqdm

    start, total = _extent(source, response)
    _check_size(source, start, total)
    with (
        source.part.open("ab" if start else "wb") as file,
        tqdm(
            desc=source.target.name,
            initial=start,
            total=total,
            unit="B",
            unit_scale=True,
            disable=None,  # a bar only where somebody watches: standard error is a terminal
        ) as bar,
    ):
        for chunk in response.iter_content(_CHUNK_BYTES):
            file.write(chunk)
            bar.update(len(chunk))
    expected = source.size if total is None else total
    if expected is not None and source.received != expected:
        raise _TryAgainError(f"cut short after {source.received} of {expected} bytes")


def _check_size(source: _Source, start: int, total: int | None) -> None:
    """Refuses, before a byte is written, a file of another size, and one that the disk has no room for."""
    if source.size is not None and total not in (None, source.size):
        raise source.failure(f"it has {total:,} bytes there, not {source.size:,}")
    length = source.size if total is None else total
    free = shutil.disk_usage(source.target.parent).free
    if length is not None and length - start > free:
        raise OSError(errno.ENOSPC, f"{length - start:,} bytes are to come, {free:,} are free")


def _extent(source: _Source, response: "requests.Response") -> tuple[int, int | None]:
    """Offset of the first byte that the server sends, and length of the whole file if it says so."""
    status = response.status_code
    if status in _TRY_AGAIN_STATUS:
        raise _TryAgainError(f"HTTP {status} {response.reason}")
    if status == 200:
        length = response.headers.get("Content-Length", "")
        return 0, int(length) if length.isdecimal() else None
    if status != 206:
        raise source.failure(f"HTTP {status} {response.reason}")
    span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if span is None or int(span[1]) != source.received:
        source.part.unlink(missing_ok=True)
        raise _TryAgainError("the server sent another range than the one asked for")
    return source.received, None if span[2] == "*" else int(span[2])
