"""`gptpl runs rm`: what it asks, what it removes, and what it leaves alone, on copies of a real run."""

import io
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptpl.files.folder_lock import locked_folder

UNFINISHED: dict[str, Any] = {"finished": None, "steps": None, "tokens_seen": None}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a user with an answer at the terminal."""
    return lambda text: monkeypatch.setattr(sys, "stdin", Terminal(text))


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


@pytest.mark.parametrize("text", ["y\n", "Y\n", "yes\n"])
def test_rm_removes_after_a_yes(gptpl, copy, answer, text):
    folder, kept = copy("runs/a"), copy("runs/b")
    size = f"{size_of(folder) / 1e6:.1f} MB"
    answer(text)
    outcome = gptpl("runs", "rm", "runs/a")
    assert outcome.status == 0
    assert outcome.out.splitlines() == [f"runs/a  finished  {size}", f"removed {size}"]
    assert outcome.err == f"remove 1 run, {size}? [y/N] "
    assert list(kept.parent.iterdir()) == [kept]


@pytest.mark.parametrize("text", ["n\n", "\n", "", "maybe\n", "nyes\n"])
def test_rm_removes_nothing_without_a_yes(gptpl, copy, answer, text):
    copies = [copy("runs/a"), copy("runs/b")]
    before = [sorted(folder.rglob("*")) for folder in copies]
    answer(text)
    outcome = gptpl("runs", "rm", "runs/a", "runs/b")
    assert outcome.status == 0
    assert "remove 2 runs, " in outcome.err
    assert outcome.out.endswith("nothing was removed\n")
    assert [sorted(folder.rglob("*")) for folder in copies] == before


def test_rm_asks_on_a_terminal_only(gptpl, refused, copy, monkeypatch):
    folder = copy("a")
    for stdin in (io.StringIO("y\n"), None):
        monkeypatch.setattr(sys, "stdin", stdin)
        assert refused("runs", "rm", "a").endswith("there is no terminal to ask on: add --yes to remove")
    assert gptpl("runs", "rm", "a", "--yes").status == 0
    assert not folder.exists()


def test_rm_warns_of_what_one_may_not_want_to_lose(gptpl, copy, answer):
    folder = copy("runs/a", **UNFINISHED)
    (folder / "notes.txt").touch()
    copy("runs/b", start={"init": "run", "checkpoint": str(folder / "checkpoints/step-00000008.ckpt")})
    answer("n\n")
    out = gptpl("runs", "rm", "runs/a").out
    assert "warning: runs/a was written 0 seconds ago: it may be running\n" in out
    assert "warning: runs/a holds files that gptpl did not write: notes.txt\n" in out
    assert (
        "warning: runs/b started from runs/a/checkpoints/step-00000008.ckpt: it keeps its own weights" in out
    )
    for path in folder.rglob("*"):
        os.utime(path, (1, 1), follow_symlinks=False)
    answer("n\n")
    assert "may be running" not in gptpl("runs", "rm", "runs/a").out
    answer("n\n")
    assert "warning" not in gptpl("runs", "rm", "runs/b").out


def test_rm_of_a_sweep_takes_all_of_it(gptpl, copy, tmp_path):
    copy("runs/s/0")
    copy("runs/s/1")
    (tmp_path / "runs/s/results.csv").write_text("trial,overrides\n")
    outcome = gptpl("runs", "rm", "runs/s", "runs/s/0", "--yes")
    assert outcome.out.startswith("runs/s  sweep of 2 runs  ")
    assert list((tmp_path / "runs").iterdir()) == []


def test_rm_with_yes_removes_no_files_of_others(gptpl, refused, copy, answer, tmp_path):
    folder = copy("runs/a")
    (folder / "notes.txt").write_text("mine")
    assert "holds files that gptpl did not write (notes.txt)" in refused("runs", "rm", "runs/a", "--yes")
    answer("y\n")
    assert "did not write: notes.txt" in gptpl("runs", "rm", "runs/a").out
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize("flags", [("--yes",), ("--yes", "--checkpoints")])
def test_rm_of_a_run_in_training_is_refused(refused, copy, flags):
    with locked_folder(copy("runs/a")):
        assert "a process is training in runs/a: stop it first" in refused("runs", "rm", "runs/a", *flags)


def test_rm_of_checkpoints_leaves_a_model_that_can_be_used(gptpl, copy, answer):
    folder = copy("a")
    kept = {path for path in folder.rglob("*") if "step-" not in path.name and path.name != "last.ckpt"}
    answer("y\n")
    outcome = gptpl("runs", "rm", "a", "--checkpoints")
    assert "\nwithout these checkpoints the runs cannot be resumed\n" in outcome.out
    assert outcome.err.startswith("remove all checkpoints but best.ckpt of 1 run, 1.5 MB? [y/N]")
    assert set(folder.rglob("*")) == kept
    assert gptpl("generate", "checkpoint=a", "prompt=a", "max_new_tokens=1").status == 0
    assert gptpl("runs", "rm", "a", "--checkpoints", "--yes").out.endswith("nothing to remove\n")
    assert "to generate: " in (shown := gptpl("runs", "show", "a").out)
    assert "resume=" not in shown


def test_rm_of_the_only_weights_is_said(gptpl, copy, answer):
    (copy("a") / "checkpoints/best.ckpt").unlink()
    answer("n\n")
    assert (
        "a has no best.ckpt: none of its weights would be left"
        in gptpl("runs", "rm", "a", "--checkpoints").out
    )


def test_an_interrupted_rm_is_shown_and_finished(gptpl, copy, monkeypatch, tmp_path):
    copy("runs/a")

    def full(folder: Path) -> None:
        raise OSError(5, "Input/output error", str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", full)
        outcome = gptpl("runs", "rm", "runs/a", "--yes")
    assert outcome.status == 1
    assert "Input/output error" in outcome.err
    listed = gptpl("runs", "list").out
    assert "no runs in runs" in listed
    assert "half removed: runs/a (" in listed
    assert listed.endswith("gptpl runs rm runs/a removes the rest\n")
    assert gptpl("runs", "rm", "runs/a", "--yes").out.startswith("runs/a  half removed  ")
    assert list((tmp_path / "runs").iterdir()) == []


def test_rm_leaves_alone_what_is_no_run(refused, copy, tmp_path, monkeypatch):
    folder = copy("runs/a")
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "project").mkdir()
    (tmp_path / "project/config.yaml").write_text("port: 80\n")
    (tmp_path / "other").mkdir()
    for name, words in {
        "runs": "runs is not a run but holds 1 run: give those to remove, as in runs/*",
        "link": f"link is a link to {folder}: give the folder itself",
        "project": "project is neither a run nor a sweep of gptpl",
        "other": "other is neither a run nor a sweep of gptpl",
        "nope": "nope is not a run (gptpl runs list shows all in runs; latest is the newest)",
        "runs/a/config.yaml": "runs/a/config.yaml is neither a run nor a sweep",
        ".": "is the folder that you are in, or around it",
        "..": "is the folder that you are in, or around it",
    }.items():
        assert words in refused("runs", "rm", "runs/a", name, "--yes")
