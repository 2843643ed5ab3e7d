"""Downloads from a local server that misbehaves in every way a real one does."""

import hashlib
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gptpl.errors import InputError
from gptpl.files import download as module
from gptpl.files.download import cache_dir, download, remembered_sha256
from gptpl.files.durable import sha256_of

DATA = b"".join(hashlib.sha256(bytes([n % 251, n // 251])).digest() for n in range(10_000))  # 320,000 bytes
SHA256 = hashlib.sha256(DATA).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves DATA at any address. `script` holds what to do with the next requests; then all is well."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.data = DATA
        self.script: list[Callable[[Handler], None]] = []
        self.always: Callable[[Handler], None] = Handler.serve
        self.ranges: list[str | None] = []  # the Range header of each request
        self.midway: Callable[[], object] = lambda: None  # called when half of a file is sent
        self.released = threading.Event()  # set at the end of a test: ends every wait

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/folder/story.txt?raw=1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay silent when a client hangs up."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.ranges.append(self.headers["Range"])
        script = self.server.script
        (script.pop(0) if script else self.server.always)(self)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def serve(self, *, ranges: bool = True, cut_at: int | None = None, length: bool = True) -> None:
        data = self.server.data
        asked = self.headers["Range"] if ranges else None
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        if start >= len(data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            self.end_headers()
            return
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        if length:
            self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        rest = data[start:] if cut_at is None else data[start : start + cut_at]
        self.wfile.write(rest[: len(rest) // 2])
        self.server.midway()
        self.wfile.write(rest[len(rest) // 2 :])

    def serve_without_ranges(self) -> None:
        self.serve(ranges=False)

    def serve_without_length(self) -> None:
        self.serve(length=False)

    def cut(self) -> None:
        self.serve(cut_at=70_000)

    def cut_without_ranges(self) -> None:
        self.serve(ranges=False, cut_at=70_000)

    def serve_wrong_range(self) -> None:
        self.send_response(206)
        self.send_header("Content-Range", f"bytes 0-{len(DATA) - 1}/{len(DATA)}")
        self.end_headers()
        self.wfile.write(DATA)

    def fall_silent(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(DATA)))
        self.end_headers()
        self.wfile.write(DATA[:100_000])
        self.server.released.wait(20)


def status(code: int) -> Callable[[Handler], None]:
    return lambda handler: handler.send_error(code)


def busy(retry_after: str) -> Callable[[Handler], None]:
    def answer(handler: Handler) -> None:
        handler.send_response(503)
        handler.send_header("Retry-After", retry_after)
        handler.end_headers()

    return answer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "*")
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.released.set()
        running.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BACKOFF_SECONDS", 0.0)


@pytest.fixture
def fetch(server: Server, tmp_path: Path) -> Callable[..., Path]:
    """`download` of the server's file to `tmp_path`."""

    def fetch_file(**changes: Any) -> Path:
        settings: dict[str, Any] = {"url": server.url, "sha256": SHA256, "folder": tmp_path}
        return download(**settings | changes)

    return fetch_file


def one_line(raised: pytest.ExceptionInfo[InputError]) -> str:
    message = str(raised.value)
    assert "\n" not in message
    return message


# ------------------------------------------------------------------------------ when all is well


def test_a_file_is_fetched_once(fetch: Callable[..., Path], server: Server, tmp_path: Path) -> None:
    path = fetch()
    assert path == tmp_path / "story.txt"
    assert path.read_bytes() == DATA
    assert fetch(sha256=SHA256.upper()) == path
    assert server.ranges == [None]
    assert {file.name for file in tmp_path.iterdir()} <= {"story.txt", "story.txt.lock"}


def test_the_final_name_never_holds_half_a_file(
    fetch: Callable[..., Path], server: Server, tmp_path: Path
) -> None:
    seen: list[bool] = []
    server.midway = lambda: seen.append((tmp_path / "story.txt").exists())
    server.script = [Handler.cut]
    fetch()
    assert seen == [False, False]


def test_a_file_put_there_by_hand_needs_no_network(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_bytes(DATA)
    path = download("http://host.invalid/x.txt", sha256=SHA256, filename="mine.txt", folder=tmp_path)
    assert path == tmp_path / "mine.txt"


def test_the_cache_folder_can_be_chosen(
    fetch: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTPL_CACHE", str(tmp_path / "a" / "b"))
    assert cache_dir() == tmp_path / "a" / "b"
    assert fetch(folder=None) == tmp_path / "a" / "b" / "story.txt"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GPTPL_CACHE", "~/c")
    assert cache_dir() == tmp_path / "c"


def test_without_a_choice_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", None):
        if value is None:
            monkeypatch.delenv("GPTPL_CACHE")
        else:
            monkeypatch.setenv("GPTPL_CACHE", value)
        assert cache_dir().is_absolute()
        assert "gptpl" in cache_dir().parts


def test_a_server_that_tells_no_length_is_believed(fetch: Callable[..., Path], server: Server) -> None:
    server.script = [Handler.serve_without_length]
    assert fetch().read_bytes() == DATA


def test_importing_the_module_loads_nothing_heavy() -> None:
    code = (
        "import sys, gptpl.files.download\n"
        "print({'requests', 'tqdm', 'torch', 'filelock'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ------------------------------------------------------------------------------ resuming


def test_what_an_earlier_download_left_is_continued(
    fetch: Callable[..., Path], server: Server, tmp_path: Path
) -> None:
    (tmp_path / "story.txt.part").write_bytes(DATA[:123_456])
    assert fetch().read_bytes() == DATA
    assert server.ranges == ["bytes=123456-"]
    assert not (tmp_path / "story.txt.part").exists()


def test_a_connection_cut_more_often_than_there_are_attempts_is_fine_while_bytes_arrive(
    fetch: Callable[..., Path], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ATTEMPTS", 2)
    server.script = [Handler.cut] * 4
    assert fetch().read_bytes() == DATA
    assert server.ranges[0] is None
    assert len(set(server.ranges)) == 5  # each continues where the one before it ended


def test_a_server_that_ignores_ranges_starts_again(
    fetch: Callable[..., Path], server: Server, tmp_path: Path
) -> None:
    (tmp_path / "story.txt.part").write_bytes(DATA[:123_456])
    server.script = [Handler.serve_without_ranges]
    assert fetch().read_bytes() == DATA
    assert len(server.ranges) == 1


def test_a_server_that_sends_another_range_is_not_believed(
    fetch: Callable[..., Path], server: Server, tmp_path: Path
) -> None:
    (tmp_path / "story.txt.part").write_bytes(DATA[:123_456])
    server.script = [Handler.serve_wrong_range]
    assert fetch().read_bytes() == DATA
    assert server.ranges == ["bytes=123456-", None]


@pytest.mark.parametrize(
    "left", [DATA, DATA + b"more", b"another file" * 1000], ids=["all", "too much", "other"]
)
def test_a_part_file_that_leaves_nothing_to_fetch_or_does_not_fit(
    fetch: Callable[..., Path], tmp_path: Path, left: bytes
) -> None:
    (tmp_path / "story.txt.part").write_bytes(left)
    assert fetch().read_bytes() == DATA


# ------------------------------------------------------------------------------ trouble that passes


@pytest.mark.parametrize("code", [408, 429, 500, 503])
def test_a_server_in_trouble_is_asked_again(
    fetch: Callable[..., Path], server: Server, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    server.script = [status(code), status(code)]
    assert fetch().read_bytes() == DATA
    assert caplog.text.count(f"HTTP {code}") == 2


def test_the_wait_doubles_or_is_what_the_server_asks_for(
    fetch: Callable[..., Path], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setattr(module, "ATTEMPTS", 7)
    asked = [busy(value) for value in ("7", "86400", "soon")]
    server.script = [status(500), status(500), *asked, status(500)]
    monkeypatch.setattr(module, "BACKOFF_SECONDS", 0.5)
    fetch()
    assert waits == [0.5, 1.0, 7, 300, 8.0, 16.0]


def test_a_damaged_cached_file_is_reported_and_replaced(
    fetch: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "story.txt").write_bytes(DATA[:-1])
    assert fetch().read_bytes() == DATA
    assert [(record.levelno, str(tmp_path / "story.txt") in record.message) for record in caplog.records] == [
        (logging.WARNING, True)
    ]


def test_two_processes_share_one_download(server: Server, tmp_path: Path) -> None:
    server.midway = lambda: server.released.wait(0.5)  # long enough for the second to come
    code = (
        "import pathlib, sys; from gptpl.files.download import download\n"
        "print(download(sys.argv[1], sha256=sys.argv[2], folder=pathlib.Path(sys.argv[3])))"
    )
    command = [sys.executable, "-c", code, server.url, SHA256, str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [process.communicate(timeout=60)[0].strip() for process in both]
    assert answers == [str(tmp_path / "story.txt")] * 2
    assert (tmp_path / "story.txt").read_bytes() == DATA
    assert len(server.ranges) == 1


# ------------------------------------------------------------------------------ trouble that stays


def test_a_wrong_hash_names_both_and_leaves_nothing(
    fetch: Callable[..., Path], server: Server, tmp_path: Path
) -> None:
    server.data = b"another file"
    with pytest.raises(InputError) as raised:
        fetch()
    message = one_line(raised)
    for part in (server.url, SHA256, hashlib.sha256(server.data).hexdigest(), str(tmp_path / "story.txt")):
        assert part in message
    assert not list(tmp_path.glob("story.txt")) + list(tmp_path.glob("*.part"))


def test_a_wrong_hash_does_not_touch_the_file_that_is_there(
    fetch: Callable[..., Path], server: Server, tmp_path: Path
) -> None:
    (tmp_path / "story.txt").write_bytes(b"the user's own")
    server.data = b"another file"
    with pytest.raises(InputError):
        fetch()
    assert (tmp_path / "story.txt").read_bytes() == b"the user's own"


@pytest.mark.parametrize(
    ("behaviour", "reason", "requests"),
    [
        (status(404), "HTTP 404", 1),
        (status(403), "HTTP 403", 1),
        (status(204), "HTTP 204", 1),
        (status(416), "HTTP 416", 1),
        (status(500), "HTTP 500", 3),
        (Handler.cut_without_ranges, "cut short after", 3),
        (Handler.fall_silent, "no answer for 0.2 s", 3),
    ],
    ids=["404", "403", "204", "416", "500", "cut", "silent"],
)
def test_a_failure_names_address_path_and_reason(
    fetch: Callable[..., Path],
    server: Server,
    tmp_path: Path,
    behaviour: Callable[[Handler], None],
    reason: str,
    requests: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "ATTEMPTS", 3)
    monkeypatch.setattr(module, "TIMEOUT_SECONDS", 0.2)
    server.always = behaviour
    with pytest.raises(InputError) as raised:
        fetch()
    message = one_line(raised)
    for part in (server.url, reason, str(tmp_path / "story.txt"), SHA256):
        assert part in message
    assert len(server.ranges) == requests
    assert not (tmp_path / "story.txt").exists()


def test_without_a_network_the_message_says_where_to_put_the_file(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/story.txt"
        with pytest.raises(InputError) as raised:
            download(url, sha256=SHA256, folder=tmp_path)
    message = one_line(raised)
    for part in (url, "no connection", f"put the file at {tmp_path / 'story.txt'}"):
        assert part in message


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/", "http://127.0.0.1:1", "story.txt", "ftp://a.b/story.txt"]
)
def test_an_address_that_is_none(url: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        download(url, sha256=SHA256, folder=tmp_path)
    assert url in one_line(raised)
    assert "cannot write" not in one_line(raised)


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "a/b", "..", ".", "C:x", r"C:\x", r"..\x", r"a\b", "a:b", "a\0b", "a\x1b[2J"],
)
def test_a_file_name_with_a_path_is_refused_before_anything_is_asked(
    name: str, fetch: Callable[..., Path], server: Server, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    with pytest.raises(InputError, match="is not a plain name: give one without a folder or drive") as raised:
        fetch(filename=name, folder=folder)
    assert one_line(raised).isprintable()
    assert not server.ranges
    assert sorted(tmp_path.rglob("*")) == []


def test_an_address_whose_last_part_is_a_path_in_disguise(server: Server, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a plain name"):
        download(f"http://127.0.0.1:{server.server_port}/..%5Cx", sha256=None, folder=tmp_path)
    assert not server.ranges


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_one_line(fetch: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "story.txt.part").symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"No space left on device.*GPTPL_CACHE") as raised:
        fetch()
    assert str(tmp_path / "story.txt") in one_line(raised)
    assert not (tmp_path / "story.txt").exists()


def test_a_folder_that_cannot_be_made_is_one_line(fetch: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="GPTPL_CACHE") as raised:
        fetch(folder=tmp_path / "file" / "cache")
    assert os.fspath(tmp_path / "file") in one_line(raised)


def test_a_disk_with_too_little_room_is_found_out_before_a_byte_is_written(
    fetch: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=len(DATA) - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match=r"320,000 bytes are needed, 319,999 are free.*make room") as raised:
        fetch()
    one_line(raised)
    assert not (tmp_path / "story.txt.part").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=len(DATA)))
    assert fetch().read_bytes() == DATA


# ------------------------------------------------------------- sizes, and hashes that nobody published


def test_a_size_that_is_not_the_published_one_is_refused(
    fetch: Callable[..., Path], server: Server, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"it has 320,000 bytes there, not 7") as raised:
        fetch(size=7)
    one_line(raised)
    assert not (tmp_path / "story.txt").exists()
    assert fetch(size=len(DATA)).read_bytes() == DATA


def test_the_published_size_stands_in_for_one_that_the_server_does_not_tell(
    fetch: Callable[..., Path], server: Server
) -> None:
    server.always = Handler.serve_without_length
    with pytest.raises(InputError, match=r"it has 320,000 bytes there, not 320,001"):
        fetch(size=len(DATA) + 1, sha256=None)


def test_a_cached_file_of_another_size_is_fetched_anew(fetch: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_bytes(DATA[:-1])
    assert fetch(sha256=None, size=len(DATA)).read_bytes() == DATA


def test_without_a_published_hash_the_first_one_is_recorded_and_holds(
    fetch: Callable[..., Path], server: Server, tmp_path: Path
) -> None:
    path = fetch(sha256=None)
    assert (tmp_path / "story.txt.sha256").read_text() == f"{SHA256}  story.txt\n"
    server.data = DATA[::-1]
    assert fetch(sha256=None).read_bytes() == DATA, "it is there"
    path.write_bytes(b"damaged")
    with pytest.raises(InputError, match=rf"not {SHA256} \(as recorded in .*story\.txt\.sha256\)"):
        fetch(sha256=None)
    server.data = DATA
    assert fetch(sha256=None).read_bytes() == DATA


def test_a_download_without_a_hash_is_continued_too(fetch: Callable[..., Path], server: Server) -> None:
    server.script = [Handler.cut]
    assert fetch(sha256=None).read_bytes() == DATA
    assert len(server.ranges) == 2


# ------------------------------------------------------------- hashes of large files, remembered


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """The files whose bytes are hashed, in order; every file counts as a large one."""
    paths: list[Path] = []

    def counted(path: Path) -> str:
        paths.append(path)
        return sha256_of(path)

    monkeypatch.setattr(module, "sha256_of", counted)
    monkeypatch.setattr(module, "_LARGE_BYTES", 0)
    monkeypatch.setenv("GPTPL_CACHE", str(tmp_path / "cache"))
    return paths


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A file put there by hand, long ago."""
    path = tmp_path / "story.txt"
    path.write_bytes(DATA)
    os.utime(path, (1e9, 1e9))
    return path


def test_a_download_is_hashed_once(fetch: Callable[..., Path], hashed: list[Path], tmp_path: Path) -> None:
    fetch()
    fetch()
    assert hashed == [tmp_path / "story.txt.part"]


def test_a_read_only_cache_costs_the_memory_alone(
    fetch: Callable[..., Path], hashed: list[Path], large: Path, tmp_path: Path
) -> None:
    (tmp_path / "cache").touch()  # nothing can be written below it
    assert (fetch(), fetch()) == (large, large)
    assert hashed == [large] * 2


def changed(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


def test_a_large_file_is_hashed_once_and_again_when_it_has_changed(
    fetch: Callable[..., Path], server: Server, hashed: list[Path], large: Path
) -> None:
    for _ in range(3):
        assert fetch() == large
    assert hashed == [large]
    os.utime(large)
    fetch()
    assert hashed == [large] * 2, "another time: hashed again, and unchanged"
    fetch()
    assert hashed == [large] * 2
    assert server.ranges == []


@pytest.mark.parametrize("way", ["in place", "replaced", "in place, with the time of before"])
def test_a_large_file_that_was_changed_is_still_refused(
    fetch: Callable[..., Path], server: Server, hashed: list[Path], large: Path, tmp_path: Path, way: str
) -> None:
    fetch()
    fetch()
    if way == "replaced":
        (tmp_path / "new").write_bytes(changed(DATA))
        os.utime(tmp_path / "new", (1e9, 1e9))
        (tmp_path / "new").replace(large)
    else:
        large.write_bytes(changed(DATA))
        if "before" in way:
            os.utime(large, (1e9, 1e9))
    server.always = status(404)
    with pytest.raises(InputError, match="HTTP 404"):
        fetch()
    assert hashed == [large] * 2


def test_a_hash_is_remembered_for_its_own_file_and_a_damaged_record_is_ignored(
    hashed: list[Path], large: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_bytes(changed(DATA))
    os.utime(other, (1e9, 1e9))
    assert remembered_sha256(large) == SHA256 != remembered_sha256(other)
    [first, second] = (tmp_path / "cache/sha256").iterdir()
    for text in ("", "[]", '{"file": 1}', first.read_text()):
        second.write_text(text)
        first.write_text(text)
        assert (remembered_sha256(large), remembered_sha256(other)) == (
            SHA256,
            hashlib.sha256(changed(DATA)).hexdigest(),
        )
