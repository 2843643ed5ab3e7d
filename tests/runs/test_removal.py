"""Runs removed: all of it, nothing else, and what an interruption leaves."""

import shutil
from pathlib import Path

import pytest

from gptpl.files.run_record import find_runs
from gptpl.runs.listing import disk_use
from gptpl.runs.removal import (
    dependents,
    needless_checkpoints,
    remove_checkpoints,
    remove_folder,
    rest_of,
    rests_below,
)


def test_a_removed_folder_is_gone_and_its_links_point_where_they_did(tmp_path, make_run):
    run, kept = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    (run / "link").symlink_to(kept)
    (run / "file").symlink_to(kept / "config.yaml")
    before = disk_use(kept)
    remove_folder(run)
    assert list(tmp_path.iterdir()) == [kept]
    assert disk_use(kept) == before


def test_an_interrupted_removal_is_out_of_sight_and_can_be_repeated(tmp_path, make_run, monkeypatch):
    run = make_run(tmp_path / "a")

    def interrupted(folder: Path) -> None:
        assert find_runs(tmp_path) == [], "gone before the first file is"
        (folder / "config.yaml").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            remove_folder(run)
    assert not run.exists()
    assert rests_below(tmp_path) == [run]
    assert (rest_of(run) / "metrics.csv").is_file()
    remove_folder(run)
    assert list(tmp_path.iterdir()) == []


def test_a_rest_goes_with_a_new_run_of_the_name(tmp_path, make_run):
    rest_of(make_run(tmp_path / "a")).mkdir()
    (rest_of(tmp_path / "a") / "old").touch()
    remove_folder(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_go_but_the_best(tmp_path, make_run):
    run = make_run(tmp_path / "a")
    before = disk_use(run)
    doomed = needless_checkpoints(before)
    assert next(iter(doomed)) == "checkpoints/last.ckpt"
    assert sum(doomed.values()) == 3_000 + 3_500 + 500 + 2 * 10
    remove_checkpoints(run, before)
    after = disk_use(run)
    assert set(after.checkpoints) == {"checkpoints/best.ckpt", "checkpoints/best.ckpt.sha256"}
    assert before.total - after.total == sum(doomed.values())
    assert set(before.files) - set(after.files) == set(doomed)


def test_runs_that_began_with_another_are_found(tmp_path, make_run):
    first = make_run(tmp_path / "a")
    weights = first / "checkpoints/step-00000004.ckpt"
    second = make_run(tmp_path / "b", start={"init": "run", "checkpoint": str(weights)})
    third = make_run(tmp_path / "c", start={"init": "state_dict", "path": str(tmp_path / "a2/model.pth")})
    damaged = make_run(tmp_path / "d")
    (damaged / "run.json").write_text("{")
    runs = [first, second, third, damaged]
    assert [(run.path, place) for run, place in dependents([first], runs)] == [(second, weights)]
    assert dependents([first, second], runs) == []
    assert dependents([second], runs) == []
