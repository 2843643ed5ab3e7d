"""Where labelled texts come from: the user's files, and the archive of the SMS Spam Collection."""

import hashlib
import io
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gptpl.data.sources import LabelledFiles, SmsSpam
from gptpl.data.sources.records import Example
from gptpl.errors import InputError

MESSAGES = b'ham\tHello "you\nspam\tWIN, now\n'
READ = [Example(text='Hello "you', label="ham"), Example(text="WIN, now", label="spam")]


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, dict[str, Any]]]:
    """An address, and what it serves: `content`, and how often it was asked for (`times`)."""
    state: dict[str, Any] = {"content": b"", "times": 0}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state["times"] += 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(state["content"])))
            self.end_headers()
            self.wfile.write(state["content"])

        def log_message(self, format: str, *args: Any) -> None:
            pass

    monkeypatch.setenv("GPTPL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/sms+spam+collection.zip", state
        server.shutdown()
        thread.join()


def archive(**members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, content in members.items():
            opened.writestr(name, content)
    return stream.getvalue()


def damaged(content: bytes) -> bytes:
    """Wrong bytes where the packed member is."""
    return content[:60] + bytes(20) + content[80:]


def encrypted(content: bytes) -> bytes:
    """With the flag that says so."""
    directory = content.index(b"PK\x01\x02")
    flagged = bytearray(content)
    flagged[6] |= 1
    flagged[directory + 8] |= 1
    return bytes(flagged)


def spam(url: str, **changes: Any) -> SmsSpam:
    settings = {"url": url, "member": "Messages", "sha256": hashlib.sha256(MESSAGES).hexdigest()}
    return SmsSpam(**(settings | changes))


def test_the_archive_is_fetched_once_and_its_one_file_read(served: Any) -> None:
    url, state = served
    state["content"] = archive(readme=b"no data", Messages=MESSAGES)
    assert spam(url).examples() == {"all": READ}
    assert spam(url).examples() == {"all": READ}
    assert state["times"] == 1


@pytest.mark.parametrize(
    "content, said",
    [
        (b"<html>Sorry</html>", "is not an archive with Messages in it: try again later"),
        (archive(readme=b"x"), "is not an archive with Messages in it"),
        (archive(Messages=b"ham\tother\n"), "holds Messages with SHA-256"),
        (archive(Messages=bytes(1 << 25)), "holds Messages with SHA-256"),  # 32 MiB, of which 16 are read
        (damaged(archive(Messages=MESSAGES * 50)), "is not an archive with Messages in it"),
        (encrypted(archive(Messages=MESSAGES)), "is not an archive with Messages in it"),
    ],
)
def test_a_wrong_archive_is_not_kept(served: Any, content: bytes, said: str) -> None:
    url, state = served
    state["content"] = content
    with pytest.raises(InputError, match=said):
        spam(url).examples()
    state["content"] = archive(Messages=MESSAGES)
    assert spam(url).examples() == {"all": READ}


def test_a_member_in_a_folder_is_kept_by_its_name_alone(served: Any, tmp_path: Path) -> None:
    url, state = served
    state["content"] = archive(**{"../Messages": MESSAGES})
    assert spam(url, member="../Messages").examples() == {"all": READ}
    assert (tmp_path / "cache/Messages").read_bytes() == MESSAGES
    assert not (tmp_path / "Messages").exists()


def test_a_copy_at_hand_needs_no_network(tmp_path: Path) -> None:
    path = tmp_path / "SMSSpamCollection"
    path.write_bytes(MESSAGES)
    assert spam("http://127.0.0.1:9/none.zip", path=str(path)).examples() == {"all": READ}


def test_a_table_of_ones_own_is_another_choice(tmp_path: Path) -> None:
    path = tmp_path / "ok.csv"
    path.write_text("text,label\nhello,ham\n")
    with pytest.raises(InputError, match=r"ok\.csv, line 1 has 1 fields, not 2: .*choose data=labelled$"):
        spam("http://127.0.0.1:9/none.zip", path=str(path)).examples()


def test_one_file_or_a_file_for_each_split(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("body,kind\nx,1\n")
    columns = {"text_column": "body", "label_column": "kind"}
    path = str(tmp_path / "a.csv")
    assert LabelledFiles(path=path, **columns).examples() == {"all": [Example(text="x", label="1")]}
    splits = LabelledFiles(train_path=path, val_path=path, **columns).examples()
    assert list(splits) == ["train", "val"]


def test_settings_that_do_not_go_together() -> None:
    with pytest.raises(InputError, match=r"data\.path is not set: give data\.path=FILE"):
        LabelledFiles().examples()
    with pytest.raises(InputError, match=r"data\.path and data\.val_path are both set: give one"):
        LabelledFiles(path="a", val_path="b").examples()
    with pytest.raises(InputError, match=r"data\.val_path is not set"):
        LabelledFiles(train_path="a").examples()
    with pytest.raises(InputError, match=r"are both 'x': name two"):
        LabelledFiles(path="a", text_column="x", label_column="x")
