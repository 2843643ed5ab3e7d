"""`gptpl runs` on copies of a real run: list, show, diff, tag, note, rm, and bad input of all."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptpl.files.durable import locked_folder


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def first_words(text: str) -> list[str]:
    return [line.split()[0] for line in text.splitlines()]


UNFINISHED: dict[str, Any] = {"finished": None, "steps": None, "tokens_seen": None}

# ------------------------------------------------------------------------------------------------- list


def test_list_is_a_line_a_run_the_newest_first(gptpl, copy, quick):
    copy("runs/b/2", started="2026-02-01T10:00:00+00:00", **UNFINISHED)
    copy("runs/b/1", started="2026-01-01T10:00:00+00:00", **UNFINISHED, failed={"error": "E: x", "step": 3})
    copy("runs/a", started="2026-03-01T10:00:00+00:00")
    outcome = gptpl("runs", "list")
    assert (outcome.status, outcome.err) == (0, "")
    head, *rows, total = outcome.out.splitlines()
    assert head.split("  ")[0] == "run"
    assert [row.split()[:2] for row in rows] == [
        ["runs/a", "finished"],
        ["runs/b/2", "unfinished"],
        ["runs/b/1", "failed"],
    ]
    loss = f"{quick.run.record['metrics']['best_val/loss']:.4f}"
    assert [row.split()[4:7] for row in rows] == [
        ["8/8", loss, "4,096"],
        ["8/8", loss, "4,096"],
        ["3/8", loss, "4,096"],
    ]
    megabytes = sum(map(size_of, [outcome.folder / f"runs/{name}" for name in ("a", "b/1", "b/2")])) / 1e6
    assert total.startswith(f"3 runs, {megabytes:.1f} MB, of which checkpoints ")


def test_list_puts_trials_under_their_sweep(gptpl, copy, tmp_path):
    for number in (0, 10, 9):
        copy(f"runs/sweeps/s/{number}", started=f"2026-02-{number + 1:02}T10:00:00+00:00")
    (tmp_path / "runs/sweeps/s/results.csv").write_text("trial,overrides\n")
    copy("runs/older", started="2026-02-10T12:00:00+00:00")
    copy("runs/newer", started="2026-02-12T10:00:00+00:00")
    lines = gptpl("runs", "list").out.splitlines()
    assert lines[2] == "runs/sweeps/s: sweep of 3 runs"
    names = [line.split()[0] for line in lines[1:-1]]
    assert names == ["runs/newer", "runs/sweeps/s:", "0", "9", "10", "runs/older"]
    flat = first_words(gptpl("runs", "list", "runs/sweeps", "sort=size").out)
    assert set(flat[1:-1]) == {f"runs/sweeps/s/{number}" for number in (0, 9, 10)}


def test_list_sorts_by_loss_and_by_size(gptpl, copy):
    for name, loss in (("a", "4.5"), ("b", "nan"), ("c", "4.25")):
        evaluation = {"step": 8, "tokens_seen": 1, "metrics": {"val/loss": float(loss)}}
        folder = copy(f"runs/{name}")
        (folder / "evaluations.jsonl").write_text(json.dumps(evaluation) + "\n")
        (folder / "metrics.csv").write_text(f"step,val/loss\n8,{loss}\n")
    with (gptpl("runs", "list").folder / "runs/b/train.log").open("a") as log:
        log.write("x" * 5000)
    by_loss = gptpl("runs", "list", "sort=loss").out
    assert first_words(by_loss)[1:-1] == ["runs/c", "runs/a", "runs/b"]
    assert by_loss.splitlines()[3].split()[5] == "-"
    assert first_words(gptpl("runs", "list", "sort=size").out)[1] == "runs/b"


def test_list_as_json_is_an_object_a_line_and_nothing_else(gptpl, copy, tmp_path):
    folder = copy("runs/s/0", started="2026-01-01T10:00:00+00:00")
    (tmp_path / "runs/s/results.csv").write_text("trial,overrides\n")
    damaged = copy("runs/b")
    (damaged / "run.json").write_text("{")
    entries = {
        entry["run"]: entry for entry in map(json.loads, gptpl("runs", "list", "--json").out.splitlines())
    }
    assert set(entries) == {"runs/s/0", "runs/b"}
    entry = entries["runs/s/0"]
    assert (entry["state"], entry["steps"], entry["planned_steps"], entry["sweep"]) == (
        "finished",
        8,
        8,
        "runs/s",
    )
    assert (entry["bytes"], entry["checkpoint_bytes"]) == (size_of(folder), size_of(folder / "checkpoints"))
    assert entries["runs/b"]["state"] == "damaged"
    assert "run.json is damaged" in entries["runs/b"]["error"]
    assert gptpl("runs", "list", "runs/s/0/tensorboard", "--json").out == ""


def test_damaged_runs_do_not_end_the_list(gptpl, copy):
    for name in ("config.yaml", "run.json", "metrics.csv"):
        (copy(f"runs/{name}") / name).write_text("[\n1")
    copy("runs/whole")
    outcome = gptpl("runs", "list")
    assert outcome.status == 0
    states = {line.split()[0]: line.split()[1] for line in outcome.out.splitlines()[1:5]}
    assert states == {
        "runs/config.yaml": "damaged",
        "runs/run.json": "damaged",
        "runs/metrics.csv": "damaged",
        "runs/whole": "finished",
    }
    assert sum(line.startswith("damaged: runs/") for line in outcome.out.splitlines()) == 3


def test_list_of_nothing_says_how_to_make_something(gptpl, tmp_path):
    for folder in ([], ["empty"]):
        (tmp_path / "empty").mkdir(exist_ok=True)
        outcome = gptpl("runs", "list", *folder)
        where = folder[0] if folder else "runs"
        assert (outcome.status, outcome.err) == (0, "")
        assert outcome.out.startswith(f"no runs in {where}: gptpl train experiment=quick makes one")


def test_a_run_given_twice_is_listed_once(gptpl, copy):
    copy("runs/a")
    assert first_words(gptpl("runs", "list", "runs", "runs/a", "runs/../runs").out)[1:-1] == ["runs/a"]


# ------------------------------------------------------------------------------------------------- show


def test_show_says_what_there_is(gptpl, copy, quick):
    folder = copy("runs/a")
    out = gptpl("runs", "show", "runs/a").out
    lines = out.partition("\n\n")[2].partition("\n\n")[0].splitlines()
    facts = dict(re.split("  +", line, maxsplit=1) for line in lines)
    assert facts["state"] == "finished"
    assert facts["command"] == quick.run.record["command"]
    assert facts["data"] == f"tale (SHA-256 {quick.run.record['data']['sha256'][:12]})"
    assert facts["model"] == "2 layers, 4 heads, 64 wide, 64 tokens of context, 120,256 parameters"
    assert facts["started from"] == "random"
    assert (facts["steps"], facts["tokens"]) == ("8 of 8", "4,096")
    assert facts["lowest val loss"] == f"{quick.run.record['metrics']['best_val/loss']:.4f} at step 8"
    assert facts["sample"].startswith("at step 8: [Every effort moves you]")
    assert f"\n  checkpoints/best.ckpt{' ' * 12}" in out
    assert "-> step-00000008.ckpt\n" in out
    assert f"{(folder / 'checkpoints/best.ckpt').stat().st_size / 1000:.1f} kB\n" in out
    assert out.endswith(
        "to train longer: gptpl train resume=runs/a trainer.max_steps=16\n"
        "to generate: gptpl generate checkpoint=runs/a prompt='Every effort moves you'\n"
    )


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"failed": {"error": "OSError: full", "step": 3}}, "failed at step 3: OSError: full"),
        ({"stopped": {"reason": "SIGTERM", "step": 4}}, "stopped at step 4 (SIGTERM)"),
        ({}, "unfinished: it was killed"),
    ],
)
def test_show_says_how_it_ended_and_how_to_go_on(gptpl, copy, entries, words):
    copy("my runs/a", **UNFINISHED, **entries)
    out = gptpl("runs", "show", "my runs/a").out
    assert re.search(rf"^state +{re.escape(words)}$", out, re.MULTILINE)
    assert "\nto resume: gptpl train 'resume=my runs/a'\n" in out


def test_show_names_resumptions_and_first_weights(gptpl, copy, tmp_path):
    start = {
        "init": "run",
        "checkpoint": str(tmp_path / "runs/b/checkpoints/best.ckpt"),
        "parent": {"step": 1200},
    }
    copy("runs/a", start=start, resumed=[{"step": 4, "changes": {"optimizer.lr": 0.1}}, {"step": 6}])
    out = gptpl("runs", "show", "runs/a").out
    assert re.search(
        r"^started from +run \(runs/b/checkpoints/best\.ckpt\) after 1,200 steps$", out, re.MULTILINE
    )
    assert re.search(r"^resumed +at step 4 with optimizer.lr=0.1\nresumed +at step 6$", out, re.MULTILINE)
    assert ", without parts that were killed\n" in out


def test_show_of_a_run_that_has_just_begun(gptpl, copy):
    folder = copy("a")
    for path in folder.iterdir():
        if path.name != "config.yaml":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    with locked_folder(folder):
        assert re.search(r"^state +running$", gptpl("runs", "show", "a").out, re.MULTILINE)
        assert json.loads(gptpl("runs", "list", ".", "--json").out)["state"] == "running"
    outcome = gptpl("runs", "show", "a")
    assert outcome.status == 0
    assert re.search(r"^state +unfinished: it was killed$", outcome.out, re.MULTILINE)
    assert outcome.out.endswith("no checkpoint: it can neither be resumed nor used\n")


def test_show_as_json(gptpl, copy, quick):
    folder = copy("a")
    entry = json.loads(gptpl("runs", "show", "a", "--json").out)
    assert entry["record"] == quick.run.record
    assert entry["losses"]["first"]["step"] == 0
    assert entry["losses"]["lowest"]["val_loss"] == pytest.approx(
        quick.run.record["metrics"]["best_val/loss"]
    )
    assert entry["bytes"] == size_of(folder)
    assert entry["files"]["config.yaml"] == (folder / "config.yaml").stat().st_size
    assert entry["last_sample"] == quick.run.samples[-1]
    assert entry["resume"] == "gptpl train resume=a trainer.max_steps=16"


def test_its_commands_work(gptpl, copy):
    """The one that trains longer, as it is printed."""
    copy("a")
    command = json.loads(gptpl("runs", "show", "a", "--json").out)["resume"]
    outcome = gptpl(*command.split()[1:], "trainer.stop_at_step=9")
    assert outcome.status == 0, outcome.err
    entry = json.loads(gptpl("runs", "show", "a", "--json").out)
    assert (entry["state"], entry["steps"], entry["planned_steps"]) == ("stopped", 9, 16)


# ------------------------------------------------------------------------------------------------- diff


def test_diff_shows_what_differs_side_by_side(gptpl, copy, quick):
    copy("runs/a")
    copy("runs/b", {"optimizer.lr": 0.5, "deterministic": True}, git_commit="f" * 40)
    copy("runs/c", {"trainer.max_time": "00:01:00:00"})
    outcome = gptpl("runs", "diff", "runs/a", "runs/b", "runs/c")
    assert outcome.status == 0
    parts = [
        [re.split("  +", line.strip()) for line in part.splitlines()] for part in outcome.out.split("\n\n")
    ]
    assert parts[0] == [
        ["settings", "a", "b", "c"],
        ["optimizer.lr", "0.003", "0.5", "0.003"],
        ["trainer.max_time", "null", "null", "00:01:00:00"],
        ["deterministic", "false", "true", "false"],
    ]
    mine = re.sub("^([0-9a-f]{12})[0-9a-f]{28}", r"\1", str(quick.run.record["git_commit"]))
    assert parts[1] == [["other differences", "a", "b", "c"], ["git_commit", mine, "f" * 12, mine]]
    assert [row[0] for row in parts[2]] == [
        "results", "state", "steps", "tokens", "lowest val loss", "last val loss", "time",
        "tokens per second", "peak memory",
    ]  # fmt: skip


def test_diff_of_equal_runs_says_so(gptpl, copy):
    copy("a")
    copy("b")
    outcome = gptpl("runs", "diff", "a", "b")
    assert outcome.status == 0
    assert outcome.out.startswith("the same settings\n\nresults  ")
    assert gptpl("runs", "diff", "a", "a").out.startswith("the same settings\n")


def test_diff_writes_long_values_below_one_another(gptpl, copy):
    long = ["x" * 30, "y" * 30]
    copy("a")
    copy("b", {"callbacks.sample_text": {"prompts": long}})
    out = gptpl("runs", "diff", "a", "b").out
    assert f"\ncallbacks.sample_text.prompts\n  a  ['Every effort moves you']\n  b  {long}\n" in out


# ------------------------------------------------------------------------------------- names, tags, notes


def test_runs_have_names_tags_and_notes(gptpl, refused, copy):
    copy("runs/quick/2026-01-01_10-00-00", {"tags": ["baseline"]}, started="2026-01-01T10:00:00+00:00")
    copy("runs/quick/2026-02-01_10-00-00", started="2026-02-01T10:00:00+00:00")
    older, newer = "runs/quick/2026-01-01_10-00-00", "runs/quick/2026-02-01_10-00-00"
    assert gptpl("runs", "show", "latest").out.startswith(f"{newer}\n")
    assert gptpl("runs", "tag", "quick/latest", "+good", "+baseline").out == f"{newer}: good, baseline\n"
    assert gptpl("runs", "tag", "2026-01", "+old", "-baseline").out == f"{older}: old\n"
    assert gptpl("runs", "note", "latest", "the learning\nrate").out == f"{newer}: the learning rate\n"
    assert gptpl("runs", "note", "2026-01").out == f"{older}: no note\n"
    shown = gptpl("runs", "show", "latest").out
    assert re.search(r"^tags +good, baseline\nnotes +the learning rate$", shown, re.MULTILINE)
    head, *rows = gptpl("runs", "list").out.splitlines()
    assert (head.split()[-1], rows[0].split()[-2:], rows[1].split()[-1]) == (
        "tags",
        ["good,", "baseline"],
        "old",
    )
    assert first_words(gptpl("runs", "list", "tag=good", "tag=baseline").out)[1:-1] == [newer]
    assert gptpl("runs", "list", "tag=none").out == "no runs in runs with tag=none\n"
    [entry] = map(json.loads, gptpl("runs", "list", "tag=old", "--json").out.splitlines())
    assert (entry["run"], entry["tags"], entry["notes"]) == (older, ["old"], "")
    assert "could be any of 2 runs" in refused("runs", "show", "quick")
    assert "optimizer" not in gptpl("runs", "diff", "2026-01", "latest").out
    assert gptpl("runs", "rm", "quick/2026-01", "--yes").out.startswith(f"{older}  finished")
    assert "2026-01 is not a run" in refused("runs", "rm", "2026-01", "--yes")


def test_nothing_that_is_shown_acts_on_the_terminal(gptpl, copy, tmp_path):
    name, settings = "runs/a\x1b[31m\u202e", {"seed": 7, "data.note": "\x1b[2J"}
    copy("runs/a", settings, command="gptpl train \x1b]0;x\x07", tags=["\x9bx"], **UNFINISHED)
    (tmp_path / "runs/a").rename(tmp_path / name)
    folder = copy("runs/b")
    (folder / "samples.jsonl").write_text('{"step": 1, "prompt": "\\u001b[2J", "continuation": "\\r\\n"}\n')
    (folder / "notes\x1b[2J.txt").touch()
    (copy("runs/c\x1b") / "config.yaml").write_text("{")
    for words in (
        "list",
        f"show {name}",
        "show runs/b",
        f"diff {name} runs/b",
        f"rm {name} -y",
        "show runs/c\x1b",
    ):
        outcome = gptpl("runs", *words.split())
        assert outcome.status == (2 if "runs/c" in words else 0), outcome.err
        shown = outcome.out + outcome.err
        assert all(letter.isprintable() or letter == "\n" for letter in shown), shown


# ------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("list", "nope"), "nope is not a folder: give one"),
        (("list", "sort=name"), "sort=name is unknown: choose one of date, loss, size"),
        (("list", "sorted=loss"), "gptpl runs list has no setting sorted: did you mean sort?"),
        (("list", "--jsn"), "gptpl runs list has no flag --jsn: did you mean --json?"),
        (("show",), "gptpl runs show takes one run, got 0"),
        (("show", "a", "b"), "gptpl runs show takes one run, got 2"),
        (("show", "nope"), "nope does not exist, and there are no runs in runs: give a run's folder"),
        (("show", "a", "lr=1"), "gptpl runs show has no setting lr: it has no settings, leave it out"),
        (("diff", "a"), "gptpl runs diff takes two runs or more, got 1"),
        (("diff", "nope", "a"), "nope does not exist"),
        (("tag", "+good"), "gptpl runs tag takes one run, got 0: give RUN +TAG"),
        (("note",), "gptpl runs note takes a run and a text"),
        (("rm",), "no run is given: give gptpl runs rm folders"),
        (
            ("rm", "a", "--force"),
            "gptpl runs rm has no flag --force: its flags are --yes, -y, --checkpoints",
        ),
        (("rm", ""), "'' is not a path"),
        (("remove", "a"), "gptpl has no command 'runs remove': choose one of runs list, runs show,"),
        (("lst",), "did you mean runs list?"),
    ],
)
def test_bad_input_is_one_line_with_the_remedy(refused, arguments, words):
    assert words in refused("runs", *arguments)


def test_a_folder_with_a_sign_of_equality_is_a_folder(gptpl, copy):
    copy("lr=1")
    assert gptpl("runs", "show", "lr=1").out.startswith("lr=1\n")


def test_help_of_each_command(gptpl):
    assert "runs rm" in gptpl("runs").out
    for name in ("list", "show", "diff", "tag", "note", "rm"):
        outcome = gptpl("runs", name, "--help")
        assert outcome.out.startswith(f"gptpl runs {name}: ")
        assert f"usage: gptpl runs {name} " in outcome.out


def test_they_come_without_torch_and_hydra(copy):
    folder = copy("runs/a")
    code = (
        "import sys; from gptpl.cli.main import main; a = 'runs/a'\n"
        "for words in (['list'], ['show', a], ['diff', a, a], ['rm', a, '--yes']):\n"
        "    assert not main(['runs', *words])\n"
        "sys.exit(bool({'torch', 'hydra', 'omegaconf', 'lightning'} & set(sys.modules)))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=folder.parent.parent, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    assert not folder.exists()


# --- rm: what it asks, removes, and leaves alone --------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a user with an answer at the terminal."""
    return lambda text: monkeypatch.setattr(sys, "stdin", Terminal(text))


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
