"""The one way in which files come from the network: retried, resumed, checked, never half-written."""

import errno
import logging
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from gptpl.errors import InputError
from gptpl.files.durable import record_file, recorded_sha256, sha256_of, sync_folder

if TYPE_CHECKING:
    import requests

log = logging.getLogger(__name__)

ATTEMPTS = 4
"""Tries in a row that bring nothing new, before giving up."""
TIMEOUT_SECONDS = 30.0
"""Longest silence of the server."""
BACKOFF_SECONDS = 1.0
"""Wait after the first failed try, doubled after each further one."""
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
    folder: Path | None = None,
) -> Path:
    """The file of that address and hash in the cache folder, fetched first when it is not there.

    A file with the right hash is taken as it is, without the network. Where no hash is published, that of the
    first download is recorded in `<filename>.sha256` beside the file, and is the right one from then on.
    Otherwise the bytes go to `<filename>.part`, which an interrupted download leaves behind and the next one
    continues; only the complete file with the right hash is renamed to its final name. Two processes that
    want the same file wait for each other.

    `sha256` is 64 hexadecimal digits; it and `size` (bytes) are None where they are not published. Without
    `filename`, which has no path, it is the last part of the address; without `folder`, it is `cache_dir()`.

    Raises InputError for a file name with a path, no connection, an address that does not exist, a download
    that stays cut short, a wrong size or hash, and a folder or disk that does not take the file.
    """
    name = filename or PurePosixPath(unquote(urlsplit(url).path)).name
    if not name:
        raise InputError(f"the address {url!r} ends in no file name: give the address of a file")
    target = (folder or cache_dir()) / file_name(name)
    wanted = _Download(url=url, published=sha256.lower() if sha256 else None, size=size, target=target)
    try:
        if not wanted.is_complete():
            target.parent.mkdir(parents=True, exist_ok=True)
            wanted.bring()
    except OSError as error:
        raise InputError(
            f"cannot keep {target} ({error.strerror or error}): "
            "make room there, or set GPTPL_CACHE to a folder that can be written"
        ) from error
    return target


def file_name(name: str) -> str:
    """The name itself. Raises InputError for one that would lead out of its folder, on any system."""
    parts = PureWindowsPath(name)  # which knows both slashes, drives and streams (`a:b`)
    if parts.name != name or name in (".", "..") or ":" in name or not name.isprintable():
        raise InputError(f"the file name {name!r} is not a plain name: give one without a folder or drive")
    return name


class _TryAgainError(Exception):
    """A try that failed for a reason which may pass."""


@dataclass(frozen=True, kw_only=True)
class _Download:
    url: str
    published: str | None
    size: int | None
    target: Path

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
            self._remember(actual)
        return actual == self.sha256

    def bring(self) -> None:
        """Fetches the file, unless another process does so meanwhile."""
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

    def _remember(self, sha256: str) -> None:
        log.info("%s: no SHA-256 is published, %s is recorded and holds from now on", self.url, sha256)
        record_file(self.target).write_text(f"{sha256}  {self.target.name}\n", encoding="ascii")

    def _failure(self, reason: str) -> InputError:
        hint = f" (SHA-256 {self.sha256})" if self.sha256 else ""
        return InputError(
            f"cannot download {self.url} ({reason}): check the address and the network, "
            f"or put the file by hand at {self.target}{hint}"
        )

    def _replace(self) -> None:
        """Fetches, checks, and puts the file in its place, over a damaged one if there is one."""
        if self.target.exists():
            log.warning("%s has not the right size or SHA-256: fetching it anew", self.target)
        resumed = self.received > 0
        self._fetch()
        actual = sha256_of(self.part)
        if self.sha256 not in (None, actual) and resumed:
            log.warning(
                "%s, continued from an earlier download, has the wrong hash: starting anew", self.part
            )
            self.part.unlink()
            self._fetch()
            actual = sha256_of(self.part)
        if self.sha256 not in (None, actual):
            self.part.unlink()
            recorded = "" if self.published else f" (as recorded in {record_file(self.target)})"
            raise InputError(
                f"{self.url} has SHA-256 {actual}, not {self.sha256}{recorded}: the file changed there or on"
                f" its way; try again later, or put the right one by hand at {self.target}"
            )
        if self.sha256 is None:
            self._remember(actual)
        with self.part.open("rb+") as file:
            os.fsync(file.fileno())
        self.part.replace(self.target)
        sync_folder(self.target.parent)

    def _fetch(self) -> None:
        """Brings the part file to its full length, in as many tries as make progress and a few more."""
        failures, most = 0, self.received
        log.info("downloading %s to %s", self.url, self.target)
        while True:
            try:
                self._receive()
                return
            except _TryAgainError as error:
                failures = failures + 1 if self.received <= most else 1
                most = max(most, self.received)
                if failures >= ATTEMPTS:
                    raise self._failure(str(error)) from error
                wait_seconds = BACKOFF_SECONDS * 2 ** (failures - 1)
                log.warning("%s: %s; trying again in %g s", self.url, error, wait_seconds)
                time.sleep(wait_seconds)

    def _receive(self) -> None:
        """One request. Raises _TryAgainError when the part file is not complete after it."""
        import requests

        headers = {"Accept-Encoding": "identity"}  # compressed bytes could not be resumed
        if self.received:
            headers["Range"] = f"bytes={self.received}-"
        try:
            with requests.get(self.url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS) as response:
                # 416: nothing comes after the part file. It is complete, or fits no more: the hash will tell.
                if response.status_code != 416 or not self.received:
                    self._write(response)
                elif self.size not in (None, self.received):
                    received = self.received
                    self.part.unlink()  # it would stand in the way of the right one
                    raise self._failure(f"it has {received:,} bytes there, not {self.size:,}")
        except (requests.ConnectionError, requests.Timeout) as error:
            raise _TryAgainError(f"no connection, or no answer for {TIMEOUT_SECONDS:g} s") from error
        except requests.exceptions.ChunkedEncodingError as error:
            raise _TryAgainError(f"cut short after {self.received} bytes") from error
        except requests.RequestException as error:  # an address that is none, too many redirections
            raise self._failure(" ".join(str(error).split())) from error

    def _write(self, response: "requests.Response") -> None:
        """Appends what the server sends to the part file, or begins it anew where it ignores ranges."""
        from tqdm import tqdm

        start, total = self._extent(response)
        if self.size is not None and total not in (None, self.size):
            raise self._failure(f"it has {total:,} bytes there, not {self.size:,}")
        expected = self.size if total is None else total
        free = shutil.disk_usage(self.target.parent).free
        if expected is not None and expected - start > free:
            raise OSError(errno.ENOSPC, f"{expected - start:,} bytes are to come, {free:,} are free")
        with (
            self.part.open("ab" if start else "wb") as file,
            tqdm(
                desc=self.target.name,
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
        if expected is not None and self.received != expected:
            raise _TryAgainError(f"cut short after {self.received} of {expected} bytes")

    def _extent(self, response: "requests.Response") -> tuple[int, int | None]:
        """Offset of the first byte that the server sends, and length of the whole file if it says so."""
        status = response.status_code
        if status in _TRY_AGAIN_STATUS:
            raise _TryAgainError(f"HTTP {status} {response.reason}")
        if status == 200:
            length = response.headers.get("Content-Length", "")
            return 0, int(length) if length.isdecimal() else None
        if status != 206:
            raise self._failure(f"HTTP {status} {response.reason}")
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if span is None or int(span[1]) != self.received:
            self.part.unlink(missing_ok=True)
            raise _TryAgainError("the server sent another range than the one asked for")
        return self.received, None if span[2] == "*" else int(span[2])
