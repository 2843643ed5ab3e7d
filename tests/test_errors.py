"""What is said of the system's errors: the remedy is that of the error, and not another."""

import errno
from pathlib import Path

import pytest

from gptpl.errors import os_error_text
from gptpl.text import one_line


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "make room there"),
        (errno.EACCES, "check the permissions"),
        (errno.EROFS, "give a folder elsewhere"),
        (errno.ENOENT, "check the path"),
        (errno.EMFILE, "ulimit -n"),
        (errno.ECONNREFUSED, "check the network"),
        (errno.ECHILD, "check that file or device"),
    ],
)
def test_the_remedy_is_chosen_by_the_errors_number(number: int, remedy: str) -> None:
    text = os_error_text(OSError(number, "Something\nbad", "a/b.txt"))
    assert text.startswith("Something bad (a/b.txt): ")
    assert remedy in text
    assert ("make room" in text) == (number == errno.ENOSPC)


def test_a_message_is_one_line_of_what_can_be_printed() -> None:
    assert one_line("a\n b\x1b[2J\x07 \u202e c\u00e9\t \u4e2d") == "a b\ufffd[2J\ufffd \ufffd c\u00e9 \u4e2d"


def test_real_errors(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="directory") as missing:
        (tmp_path / "none").read_text()
    assert os_error_text(missing.value) == (
        f"No such file or directory ({tmp_path}/none): check the path, then run the command again"
    )
    with pytest.raises(OSError, match="directory") as folder:
        tmp_path.read_text()
    assert os_error_text(folder.value).endswith("give a file, not a folder, then run the command again")
    assert os_error_text(OSError("no number, no name")).startswith("no number, no name: check that")
