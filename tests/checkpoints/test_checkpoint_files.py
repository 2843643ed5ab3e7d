"""Which checkpoints a run keeps, and which one it goes on from when some are damaged."""

import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from gptpl.checkpoints.files import CheckpointFolder, Damaged, set_aside, verify, write_checkpoint
from gptpl.errors import InputError
from gptpl.files.durable import record_file


def write(folder: CheckpointFolder, *steps: int) -> None:
    for step in steps:
        write_checkpoint({"step": step, "weight": torch.full((1000,), float(step))}, folder.path(step))
        folder.settle(step)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path) -> None:
    path.unlink()


class Canary:
    """A pickle that makes a file when it is loaded as code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def replace_by_code(path: Path) -> None:
    torch.save({"weight": Canary(path.parent / "ran")}, path)


@pytest.fixture
def folder(tmp_path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "checkpoints", keep=2)


def names(folder: CheckpointFolder) -> list[str]:
    return sorted(path.name for path in folder.folder.iterdir() if ".sha256" not in path.name)


@pytest.mark.parametrize(
    ("keep", "kept"), [(1, [40]), (2, [30, 40]), (3, [20, 30, 40]), (9, [10, 20, 30, 40])]
)
def test_the_newest_are_kept(tmp_path, keep, kept):
    folder = CheckpointFolder(tmp_path, keep=keep)
    write(folder, 10, 20, 30, 40)
    assert folder.steps() == kept
    assert {path.name for path in tmp_path.glob("*.sha256")} == {f"step-{s:08d}.ckpt.sha256" for s in kept}
    assert (tmp_path / "last.ckpt").resolve() == folder.path(40)
    assert (tmp_path / "last.ckpt").readlink() == Path("step-00000040.ckpt")  # the folder can be moved


def test_steps_beyond_eight_digits_are_in_order(folder):
    write(folder, 99_999_999, 100_000_000)
    assert folder.steps() == [99_999_999, 100_000_000]


def test_a_clock_that_goes_back_changes_nothing(folder):
    write(folder, 10, 20)
    os.utime(folder.path(20), (0, 0))
    write(folder, 30)
    os.utime(folder.path(30), (1, 1))
    assert folder.steps() == [20, 30]
    good = folder.newest_good()
    assert good is not None
    assert (good.path, good.damaged) == (folder.path(30), [])


DAMAGE = {
    cut: "is damaged (its SHA-256 is not the recorded one)",
    flip: "is damaged (its SHA-256 is not the recorded one)",
    empty: "is empty",
    remove: "is missing",
    replace_by_code: "is damaged (its SHA-256 is not the recorded one)",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_behind_a_damaged_newest_comes_the_one_before(folder, damage):
    write(folder, 10, 20)
    damage(folder.path(20))
    good = folder.newest_good()
    assert good is not None
    assert good.path == folder.path(10)
    assert good.damaged == [Damaged(path=folder.path(20), reason=DAMAGE[damage])]
    assert not (folder.folder / "ran").exists()


@pytest.mark.parametrize(
    ("damage", "reason"), [(cut, "is damaged (the dir"), (flip, "is damaged (archive"), (empty, "is empty")]
)
def test_without_a_record_the_file_is_checked_by_its_own_hashes(folder, damage, reason):
    write(folder, 10, 20)
    record_file(folder.path(20)).unlink()
    good = folder.newest_good()
    assert good is not None
    assert (good.path, good.damaged) == (folder.path(20), [])
    damage(folder.path(20))
    good = folder.newest_good()
    assert good is not None
    assert good.path == folder.path(10)
    (damaged,) = good.damaged
    assert damaged.path == folder.path(20)
    assert damaged.reason.startswith(reason)


def test_what_the_system_refuses_is_not_called_damaged(folder, monkeypatch):
    write(folder, 10)
    path = folder.path(10)

    def refused(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", refused)  # of the record
        assert verify(path) == "cannot be read (Permission denied)"
    record_file(path).unlink()
    monkeypatch.setattr(zipfile.ZipFile, "testzip", refused)
    assert verify(path) == "cannot be read (Permission denied)"


def test_all_damaged_is_an_error_that_names_the_newest(folder):
    write(folder, 10, 20)
    for step in (10, 20):
        flip(folder.path(step))
    with pytest.raises(
        InputError,
        match=rf"^checkpoint {folder.path(20)} is damaged .*, and 1 more cannot be used either: restore",
    ):
        folder.newest_good()


def test_none_at_all(folder):
    assert folder.newest_good() is None


def test_the_only_file_of_an_older_format(folder):
    folder.folder.mkdir()
    torch.save({"weight": torch.zeros(1)}, folder.folder / "last.ckpt")
    good = folder.newest_good()
    assert good is not None
    assert (good.path, good.damaged) == (folder.folder / "last.ckpt", [])


def test_damaged_ones_are_set_aside_and_count_no_more(folder):
    write(folder, 10, 20)
    flip(folder.path(20))
    good = folder.newest_good()
    assert good is not None
    set_aside(good.damaged)
    assert names(folder) == ["last.ckpt", "step-00000010.ckpt", "step-00000020.ckpt.damaged"]
    write(folder, 15)  # earlier than the damaged one, which must not push it out
    assert folder.steps() == [10, 15]
    write(folder, 20)
    assert verify(folder.path(20)) is None
    assert names(folder)[-1] == "step-00000020.ckpt.damaged"


def test_a_missing_one_needs_no_setting_aside(folder):
    set_aside([Damaged(path=folder.path(3), reason="is missing")])


def test_where_there_are_no_symbolic_links_it_is_a_hard_link(folder, monkeypatch):
    def no_links(self: Path, target: Any) -> None:
        raise OSError("symbolic links need a privilege")

    monkeypatch.setattr(Path, "symlink_to", no_links)
    write(folder, 10, 20)
    last = folder.folder / "last.ckpt"
    assert not last.is_symlink()
    assert last.samefile(folder.path(20))


@pytest.mark.parametrize("keep", [0, -1])
def test_keeping_none_is_refused(tmp_path, keep):
    with pytest.raises(
        InputError, match=rf"^callbacks\.checkpoint_last\.keep must be 1 or more, got {keep}$"
    ):
        CheckpointFolder(tmp_path, keep=keep)
