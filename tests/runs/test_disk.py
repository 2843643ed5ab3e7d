"""What folders take on disk, against what the system says of each file."""

import os
from pathlib import Path

from gptpl.runs.listing import disk_use


def test_sizes_are_those_of_the_system(tmp_path, make_run):
    run = make_run(tmp_path / "run")
    use = disk_use(run)
    paths = [Path(at) / name for at, _, names in os.walk(run) for name in names]
    sizes = {path.relative_to(run).as_posix(): path.stat().st_size for path in paths if not path.is_symlink()}
    assert use.files == sizes | {"checkpoints/last.ckpt": 0}
    assert use.total == sum(sizes.values())
    assert sum(use.checkpoints.values()) == 1_000 + 3_000 + 3_500 + 500 + 3 * 10
    assert use.newest == max(path.lstat().st_mtime for path in paths)


def test_a_file_with_two_names_counts_once(tmp_path):
    """As `last.ckpt`, where links cannot be made."""
    (tmp_path / "a").write_bytes(b"x" * 100)
    os.link(tmp_path / "a", tmp_path / "b")
    assert disk_use(tmp_path).total == 100


def test_links_are_not_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/large").write_bytes(b"x" * 100)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/folder").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "run/file").symlink_to(tmp_path / "elsewhere/large")
    assert disk_use(tmp_path / "run").files == {"file": 0, "folder": 0}


def test_what_is_not_there_takes_nothing(tmp_path):
    use = disk_use(tmp_path / "nowhere")
    assert (use.files, use.total, use.newest) == ({}, 0, 0)
