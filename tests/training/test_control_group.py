"""Limits as the kernel writes them, in a tree of files of our own."""

from pathlib import Path

import pytest

from gptpl.training import costs

MB = 2**20


def group(folder: Path, *, limit: str, used: int, droppable: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {droppable}\nactive_file 7\n")


@pytest.fixture
def own(tmp_path):
    """Says that the process is in a/b."""
    path = tmp_path / "own"
    path.write_text("1:name=systemd:/other\n0::/a/b\n")
    return path


def test_the_tightest_limit_on_the_way_up_holds(tmp_path, own):
    root = tmp_path / "groups"
    group(root / "a", limit=str(100 * MB), used=70 * MB)
    group(root / "a" / "b", limit=str(60 * MB), used=10 * MB)
    assert costs.container_free_bytes(root, own) == 30 * MB


def test_files_that_can_be_dropped_are_free(tmp_path, own):
    root = tmp_path / "groups"
    group(root / "a" / "b", limit=str(100 * MB), used=70 * MB, droppable=50 * MB)
    assert costs.container_free_bytes(root, own) == 80 * MB


def test_a_container_sees_its_own_group_as_the_root(tmp_path, own):
    own.write_text("0::/\n")
    group(tmp_path / "groups", limit=str(100 * MB), used=70 * MB)
    assert costs.container_free_bytes(tmp_path / "groups", own) == 30 * MB


def test_nothing_is_free_above_the_limit(tmp_path, own):
    group(tmp_path / "groups" / "a" / "b", limit=str(10 * MB), used=20 * MB)
    assert costs.container_free_bytes(tmp_path / "groups", own) == 0


def test_without_a_limit_there_is_none(tmp_path, own):
    root = tmp_path / "groups"
    group(root / "a" / "b", limit="max", used=MB)
    assert costs.container_free_bytes(root, own) is None
    assert costs.container_free_bytes(tmp_path / "none", own) is None
    assert costs.container_free_bytes(root, tmp_path / "none") is None
    own.write_text("4:memory:/docker/abc\n")  # version 1
    assert costs.container_free_bytes(root, own) is None


def test_the_largest_batch_is_asked_for_what_the_container_may_have(monkeypatch):
    monkeypatch.setattr(costs, "container_free_bytes", lambda: 3 * MB)
    assert costs.free_memory("cpu") == 3 * MB
    monkeypatch.setattr(costs, "container_free_bytes", lambda: 2**60)
    assert MB < costs.free_memory("cpu") < 2**60
