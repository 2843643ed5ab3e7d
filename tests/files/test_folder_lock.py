"""A locked folder, seen from other processes."""

import errno
import logging
import os
import signal
import subprocess
import sys

import pytest

from gptpl.errors import InputError
from gptpl.files.durable import is_locked, locked_folder

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="folders cannot be locked on Windows")
fcntl = pytest.importorskip("fcntl")

HOLD = """
import sys, time
from pathlib import Path
from gptpl.files.durable import locked_folder
with locked_folder(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_locked_until_its_process_ends_however_it_does(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        assert is_locked(tmp_path)
        with pytest.raises(InputError, match=r"another process is training in .*: wait until it has ended"):
            locked_folder(tmp_path).__enter__()
    finally:
        other.send_signal(signal.SIGKILL)
        other.communicate()
    assert not is_locked(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_error_inside_unlocks(tmp_path):
    with pytest.raises(ValueError, match="mine"), locked_folder(tmp_path):
        raise ValueError("mine")
    assert not is_locked(tmp_path)


def test_a_folder_that_is_made_anew_before_it_is_locked_is_locked_itself(tmp_path, monkeypatch):
    """As when its last owner, which had made it, removes it at that moment, and a third process makes it."""
    folder, flock, again = tmp_path / "a", fcntl.flock, [True, False]
    folder.mkdir()

    def flock_late(descriptor: int, how: int) -> None:
        if again:
            folder.rmdir()
            if again.pop(0):
                folder.mkdir()
        flock(descriptor, how)

    monkeypatch.setattr("fcntl.flock", flock_late)
    with pytest.raises(FileNotFoundError), locked_folder(folder):
        pass
    again[:] = [True]
    folder.mkdir()
    with locked_folder(folder):
        monkeypatch.setattr("fcntl.flock", flock)
        assert is_locked(folder)


def test_a_file_system_without_locks_is_said_and_keeps_nobody_out(tmp_path, monkeypatch, caplog):
    def refuse(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    with caplog.at_level(logging.WARNING), locked_folder(tmp_path):
        pass
    assert "cannot be locked" in caplog.text
