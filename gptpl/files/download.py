"""The one way in which files come from the network: resumed, retried, checked, never half-written.

The retries are our own: urllib3's `Retry` ends where the body begins, in which long downloads fail.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from gptpl.errors import InputError
from gptpl.files.durable import (
    record_file,
    record_sha256,
    recorded_sha256,
    sha256_of,
    sync_folder,
    write_atomically,
)
from gptpl.text import one_line

if TYPE_CHECKING:
    import requests

log = logging.getLogger(__name__)

ATTEMPTS = 4
"""Requests in a row that bring nothing new before a download fails."""
TIMEOUT_SECONDS = 30.0
"""Longest silence of the server."""
BACKOFF_SECONDS = 1.0
"""Wait after the first failed request, doubled after each further one, or as long as the server asks."""
_LONGEST_WAIT_SECONDS = 300
_CHUNK_BYTES = 1 << 16
TRY_AGAIN_STATUS = frozenset({408, 429, *range(500, 600)})
_LARGE_BYTES = 1 << 26
"""Hashing a file of this size takes about a tenth of a second; the hashes of larger ones are remembered."""


def cache_dir() -> Path:
    """Folder for downloads and encoded corpora: GPTPL_CACHE, else the user's cache; it may not exist yet."""
    if chosen := os.environ.get("GPTPL_CACHE"):
        return Path(chosen).expanduser().absolute()
    import platformdirs

    return platformdirs.user_cache_path("gptpl", appauthor=False)


def remembered_sha256(path: Path, *, known: str | None = None) -> str:
    """The SHA-256 of a file; a large one is read again only after it has changed.

    Its hash, which may be `known` already, is remembered in the cache folder, with its size, inode and the
    times of its last changes.
    """
    place, stat = path.resolve(), path.stat()
    file = [str(place), stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
    memory = cache_dir() / "sha256" / f"{hashlib.sha256(os.fsencode(place)).hexdigest()}.json"
    with suppress(OSError, ValueError, LookupError, TypeError):  # no record, or a damaged one
        remembered = json.loads(memory.read_text(encoding="utf-8"))
        if remembered["file"] == file:
            return str(remembered["sha256"])
    sha256 = known or sha256_of(path)
    if stat.st_size >= _LARGE_BYTES:
        with suppress(OSError):  # the cache may be read-only
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(memory, json.dumps({"file": file, "sha256": sha256}))
    return sha256


def download(
    url: str,
    *,
    sha256: str | None,
    size: int | None = None,
    filename: str | None = None,
    folder: Path | None = None,
) -> Path:
    """The path of a file in the cache, fetched first unless it is there with the right hash.

    The bytes go to `<filename>.part`, which the next call resumes after an interruption; only a complete file
    with the right hash gets its final name. Processes that want the same file wait for one another.

    `sha256` and `size` (bytes) are None where they are not published; the hash of the first download is then
    recorded in `<filename>.sha256`, and is the right one from then on. `filename` None is the last part of
    the address, `folder` None is `cache_dir()`.

    Raises InputError for a file name with a path, an address that cannot be reached, a download that stays
    incomplete, a wrong size or hash, and a folder or disk that cannot take the file.
    """
    name = filename or PurePosixPath(unquote(urlsplit(url).path)).name
    if not name:
        raise InputError(f"the address {url!r} does not end in a file name: give the address of a file")
    target = (folder or cache_dir()) / file_name(name)
    wanted = _Download(url=url, published=sha256.lower() if sha256 else None, size=size, target=target)
    try:
        if not wanted.is_complete():
            target.parent.mkdir(parents=True, exist_ok=True)
            wanted.bring()
    except OSError as error:
        raise InputError(
            f"cannot write {target} ({error.strerror or error}): "
            "make room there, or set GPTPL_CACHE to a folder that can be written"
        ) from error
    return target


def file_name(name: str) -> str:
    """Return the name. Raises InputError for one that would lead out of its folder, on any system."""
    parts = PureWindowsPath(name)  # which knows both slashes, drives and streams (`a:b`)
    if parts.name != name or name in (".", "..") or ":" in name or not name.isprintable():
        raise InputError(f"the file name {name!r} is not a plain name: give one without a folder or drive")
    return name


class _TryAgainError(Exception):
    """A request that failed for a reason that may pass."""

    def __init__(self, reason: str, wait_seconds: int = 0) -> None:
        super().__init__(reason)
        self.wait_seconds = wait_seconds  # what the server asks for


@dataclass(frozen=True, kw_only=True)
class _Download:
    url: str
    published: str | None
    size: int | None
    target: Path

    @property
    def sha256(self) -> str | None:
        """The hash that the file must have: the published one, or that of the first download."""
        return self.published or recorded_sha256(self.target)

    @property
    def part(self) -> Path:
        return self.target.with_name(f"{self.target.name}.part")

    @property
    def received(self) -> int:
        """Bytes in the part file."""
        return self.part.stat().st_size if self.part.exists() else 0

    def is_complete(self) -> bool:
        """Whether the file has its size and hash; the hash of one that was put there by hand is recorded."""
        if not self.target.is_file() or self.size not in (None, self.target.stat().st_size):
            return False
        actual = remembered_sha256(self.target)
        if self.sha256 is None:
            self._record(actual)
        return actual == self.sha256

    def bring(self) -> None:
        """Fetch the file, unless another process does so meanwhile."""
        import filelock

        lock = filelock.FileLock(f"{self.target}.lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            log.info("waiting for another process that downloads %s", self.target)
            lock.acquire()
        try:
            if not self.is_complete():
                self._replace()
        finally:
            lock.release()

    def _replace(self) -> None:
        """Fetch, check and rename to the final name, over a damaged file if there is one."""
        if self.target.exists():
            log.warning("%s has the wrong size or SHA-256: downloading it again", self.target)
        while True:
            resumed = self.received > 0
            self._fetch()
            actual = sha256_of(self.part)
            if self.sha256 in (None, actual):
                break
            self.part.unlink()
            if not resumed:
                recorded = "" if self.published else f" (as recorded in {record_file(self.target)})"
                raise InputError(
                    f"{self.url} has SHA-256 {actual}, not {self.sha256}{recorded}: it has changed there, or"
                    f" on its way; try again later, or put the right one at {self.target}"
                )
            log.warning("%s, resumed from an earlier download, has the wrong hash: starting over", self.part)
        if self.sha256 is None:
            self._record(actual)
        with self.part.open("rb+") as file:
            os.fsync(file.fileno())
        self.part.replace(self.target)
        sync_folder(self.target.parent)
        remembered_sha256(self.target, known=actual)

    def _record(self, sha256: str) -> None:
        log.info("%s: no SHA-256 is published, %s is recorded and holds from now on", self.url, sha256)
        record_sha256(self.target, sha256)

    def _failure(self, reason: str) -> InputError:
        hint = f" (SHA-256 {self.sha256})" if self.sha256 else ""
        return InputError(
            f"cannot download {self.url} ({reason}): check the address and the network, "
            f"or put the file at {self.target}{hint}"
        )

    def _fetch(self) -> None:
        """Complete the part file, in as many requests as make progress and a few more."""
        failures, most = 0, self.received
        log.info("downloading %s to %s", self.url, self.target)
        while True:
            try:
                return self._receive()
            except _TryAgainError as error:
                failures = failures + 1 if self.received <= most else 1
                most = max(most, self.received)
                if failures >= ATTEMPTS:
                    raise self._failure(str(error)) from error
                wait_seconds = max(BACKOFF_SECONDS * 2 ** (failures - 1), error.wait_seconds)
                log.warning("%s: %s; trying again in %g s", self.url, error, wait_seconds)
                time.sleep(wait_seconds)

    def _receive(self) -> None:
        """Send one request. Raises _TryAgainError where the part file is not complete after it."""
        import requests

        headers = {"Accept-Encoding": "identity"}  # compressed bytes could not be resumed
        if self.received:
            headers["Range"] = f"bytes={self.received}-"
        try:
            with requests.get(self.url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS) as response:
                self._append(response)
        except (requests.ConnectionError, requests.Timeout) as error:
            raise _TryAgainError(f"no connection, or no answer for {TIMEOUT_SECONDS:g} s") from error
        except requests.exceptions.ChunkedEncodingError as error:
            raise _TryAgainError(f"cut short after {self.received} bytes") from error
        except requests.RequestException as error:  # an address that is not one, too many redirections
            raise self._failure(one_line(str(error))) from error

    def _append(self, response: "requests.Response") -> None:
        """Write what the server sends to the part file, from the start where it ignores ranges."""
        from tqdm import tqdm

        start, total = self._extent(response)
        if self.size is not None and total not in (None, self.size):
            if start == total:
                self.part.unlink(missing_ok=True)  # it would be in the way of the right one
            raise self._failure(f"it has {total:,} bytes there, not {self.size:,}")
        expected = self.size if total is None else total
        free = shutil.disk_usage(self.target.parent).free
        if expected is not None and expected - start > free:
            raise OSError(errno.ENOSPC, f"{expected - start:,} bytes are needed, {free:,} are free")
        if start and start == total:
            return  # nothing follows the part file: it is complete, or the hash will tell that it is wrong
        with (
            self.part.open("ab" if start else "wb") as file,
            tqdm(
                desc=self.target.name,
                initial=start,
                total=total,
                unit="B",
                unit_scale=True,
                disable=None,  # a bar only on a terminal
            ) as bar,
        ):
            for chunk in response.iter_content(_CHUNK_BYTES):
                file.write(chunk)
                bar.update(len(chunk))
        if expected is not None and self.received != expected:
            raise _TryAgainError(f"cut short after {self.received} of {expected} bytes")

    def _extent(self, response: "requests.Response") -> tuple[int, int | None]:
        """Offset of the first byte that the server sends, and length of the whole file if it tells."""
        status, headers = response.status_code, response.headers
        if status in TRY_AGAIN_STATUS:
            wait = headers.get("Retry-After", "")
            seconds = min(int(wait), _LONGEST_WAIT_SECONDS) if wait.isdecimal() else 0
            raise _TryAgainError(f"HTTP {status} {response.reason}", seconds)
        if status == 416 and self.received:
            return self.received, self.received
        if status == 200:
            length = headers.get("Content-Length", "")
            return 0, int(length) if length.isdecimal() else None
        if status != 206:
            raise self._failure(f"HTTP {status} {response.reason}")
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
        if span is None or int(span[1]) != self.received:
            self.part.unlink(missing_ok=True)
            raise _TryAgainError("the server sent another range than the one asked for")
        return self.received, None if span[2] == "*" else int(span[2])
