"""A corpus that is downloaded: what a user sees when the network or the file is not as it should be."""

import hashlib
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

SMALL = ("train", "model=tiny", "tokenizer=bytes", "trainer=cpu", "trainer.max_epochs=1", "data=the_verdict")
STORY = ("I had always thought Jack rather a cheap genius. " * 200).encode()


class Handler(BaseHTTPRequestHandler):
    """Serves STORY whole, cut short, or not at all, by the address."""

    def do_GET(self) -> None:
        if self.path == "/missing.txt":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(STORY)))
        self.end_headers()
        self.wfile.write(STORY[: len(STORY) // 2] if self.path == "/cut.txt" else STORY)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_address[1]}"
        http.shutdown()
        thread.join()


@pytest.fixture
def download(server, tmp_path, monkeypatch) -> Callable[..., tuple[str, ...]]:
    """The arguments that train on a file of the server; the cache is the test's own."""
    monkeypatch.setenv("GPTPL_CACHE", str(tmp_path.with_name(f"{tmp_path.name}-cache")))
    monkeypatch.setattr("time.sleep", lambda seconds: None)

    def arguments(name: str, sha256: str = hashlib.sha256(STORY).hexdigest()) -> tuple[str, ...]:
        return (
            *SMALL,
            "data=the_verdict",
            f"data.corpus.url={server}/{name}",
            f"data.corpus.sha256={sha256}",
        )

    return arguments


def test_a_download_that_works_is_trained_on(download, gptpl, monkeypatch):
    monkeypatch.setattr("gptpl.runs.fit._fit", lambda run: {})
    outcome = gptpl(*download("the-verdict.txt"))
    assert outcome.status == 0, outcome.err
    assert "data: the_verdict, 1 document" in outcome.err


@pytest.mark.parametrize(
    ("name", "sha256", "words"),
    [
        ("missing.txt", None, ["/missing.txt", "HTTP 404"]),
        ("cut.txt", None, ["/cut.txt", "cut short after"]),
        ("other.txt", "0" * 64, ["/other.txt", "SHA-256", "0" * 64]),
    ],
)
def test_a_download_that_fails(name, sha256, words, download, gptpl, tmp_path):
    outcome = gptpl(*(download(name, sha256) if sha256 else download(name)))
    assert (outcome.status, outcome.out) == (2, "")
    line = outcome.err.splitlines()[-1]
    assert line.startswith("gptpl: error: ")
    assert all(word in line for word in words), line
    assert "put " in line  # the file in its place in the cache
    assert "Traceback" not in outcome.err
    assert list(tmp_path.iterdir()) == []
    assert not list(tmp_path.with_name(f"{tmp_path.name}-cache").rglob("the-verdict.txt"))


def test_a_server_that_does_not_answer(gptpl, monkeypatch, tmp_path):
    monkeypatch.setenv("GPTPL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    outcome = gptpl(*SMALL, "data.corpus.url=http://127.0.0.1:1/a.txt")
    assert outcome.status == 2
    assert "no connection" in outcome.err.splitlines()[-1]
