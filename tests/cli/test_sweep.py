"""`gptpl train -m`: which trials there are, what a sweep leaves, and what is refused before the first one."""

import csv
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from gptpl.sweeps.study import Search, SweepStudy
from gptpl.sweeps.sweep import sort_overrides
from gptpl.sweeps.worker import Worker

pytestmark = pytest.mark.usefixtures("fake_train")

GIVEN = ("model=tiny", "tokenizer=bytes", "hydra.sweep.dir=mine")
TEXT = ("data=text_file", "data.path=my.txt")


@pytest.fixture
def drawn() -> None:
    """Asked for by the tests that look at the report of a sweep."""


@pytest.fixture(autouse=True)
def report_without_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time of a small sweep."""
    if "drawn" not in request.fixturenames:
        page = SimpleNamespace(page="report.html")
        monkeypatch.setattr("gptpl.cli.commands.sweep.report", lambda *args, **settings: page)


@pytest.fixture(scope="module", autouse=True)
def look_often() -> Iterator[None]:
    """A sweep looks at its trials twice a second; these end after a tenth."""
    assert Worker.__init__.__kwdefaults__ is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(Worker.__init__.__kwdefaults__, "poll_seconds", 0.02)
        yield


@pytest.fixture(scope="module")
def finished(command: Any, fake_program: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text and a finished sweep of two trials in `mine`."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "my.txt").write_text("The sea was still. " * 200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gptpl.sweeps.worker.PROGRAM", fake_program)
        outcome = command("sweep", *GIVEN, *TEXT, "seed=1,2", cwd=folder)
    assert outcome.status == 0, outcome.err
    return folder


@pytest.fixture
def sweep_of_two(finished: Path, tmp_path: Path) -> Path:
    """A copy of it in the test's folder."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path / "mine"


def results_in(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def starts_in(folder: Path) -> list[Any]:
    path = folder / "starts.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [json.loads(line)["arguments"] for line in lines]


# --- what a sweep leaves --------------------------------------------------------------------------------


def test_a_sweep_leaves_trials_a_table_and_says_what_failed(gptpl, tmp_path, drawn):
    outcome = gptpl("train", "-m", *GIVEN, "seed=5,3,9", "name=9:fail")
    mine = tmp_path / "mine"
    assert outcome.status == 1
    assert starts_in(mine) == [
        ["model=tiny", "tokenizer=bytes", "name=9:fail", f"seed={seed}", f"run_dir={mine / folder}"]
        for folder, seed in (("0", 5), ("1", 3), ("2", 9))
    ]
    assert [(row["trial"], row["overrides"], row["state"]) for row in results_in(mine)] == [
        ("1", "seed=3", "finished"),
        ("0", "seed=5", "finished"),
        ("2", "seed=9", "failed"),
    ]
    assert [row["best_val_loss"] for row in results_in(mine)] == ["3.0000", "5.0000", ""]
    assert results_in(mine)[2]["error"] == "name=fail is refused"
    head, first, *_ = outcome.out.splitlines()
    assert head.split() == ["trial", "overrides", "state", "best_val_loss", "val_loss", "error"]
    assert first.split() == ["1", "seed=3", "finished", "3.0000", "3.0000"]
    assert str(mine / "results.csv") in outcome.out
    assert "[3/3] trial 2: seed=9: failed: name=fail is refused (" in outcome.err
    assert "trials failed: 1; sweep.retry_failed=true tries them again" in outcome.err
    assert "Traceback" not in outcome.err
    assert (mine / "report.html").is_file()

    again = gptpl("train", "-m", *GIVEN, "seed=5,3,9", "name=9:fail", "sweep.retry_failed=true")
    assert again.status == 1
    assert "failed trials tried again: 1" in again.err
    assert [arguments[-1] for arguments in starts_in(mine)] == [f"run_dir={mine / '2'}"]
    assert [row["trial"] for row in results_in(mine)] == ["1", "0", "2"]


def test_gptpl_sweep_is_the_same_command_and_keeps_what_it_knows(gptpl, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / ".sweep.yaml.1-1.tmp").write_text("comm")  # of a start that died early
    outcome = gptpl("sweep", *GIVEN, "seed=1,2", "hydra.launcher.n_jobs=2")
    assert outcome.status == 0, outcome.err
    assert "\ntrial 1: seed=2\n" in outcome.err  # as trials are announced that run side by side
    shutil.rmtree(mine / "0")
    assert gptpl("train", "--multirun", *GIVEN, "seed=1,2").status == 0
    assert len(starts_in(mine)) == 2
    first = results_in(mine)[0]
    assert (first["trial"], first["best_val_loss"]) == ("0", "1.0000")
    assert "not a run folder" in first["error"]


def test_the_same_command_again_finds_its_folder_and_only_what_is_left(gptpl, tmp_path):
    command = ("train", "-m", "model=tiny", "tokenizer=bytes", "seed=1,2", "name=2:kill")
    assert gptpl(*command).status == 1
    [folder] = (tmp_path / "runs/sweeps").iterdir()
    assert folder.name.startswith("2:kill_")
    assert len(starts_in(folder)) == 2
    outcome = gptpl(*command)
    assert outcome.status == 0
    assert "1 of 2 trials have ended before" in outcome.err
    assert "[2/2] trial 1: seed=2: val loss 2.0000 (" in outcome.err  # not the lowest
    assert starts_in(folder) == [[f"resume={folder / '1'}"]]
    assert gptpl(*command).status == 0
    assert starts_in(folder) == []
    assert list((tmp_path / "runs/sweeps").iterdir()) == [folder]


def test_sweeps_go_where_runs_go(gptpl, tmp_path, monkeypatch):
    monkeypatch.setenv("GPTPL_RUNS", str(tmp_path / "scratch"))
    assert gptpl("sweep", "model=tiny", "tokenizer=bytes", "seed=1,2").status == 0
    [folder] = (tmp_path / "scratch/sweeps").iterdir()
    assert len(starts_in(folder)) == 2
    assert not (tmp_path / "runs").exists()
    shown = gptpl("runs", "show", "sweeps/latest").out.splitlines()[0]
    assert shown == str((folder / "1").relative_to(tmp_path))


def test_a_ready_search_draws_its_trials_and_a_given_value_is_not_drawn(gptpl, tmp_path):
    search = ("sweep=regularisation", "sweep.n_trials=2", "sweep.sampler=random", "sweep.seed=4000000000")
    assert gptpl("sweep", *GIVEN, *search, "model.drop_rate=0.2").status == 0
    for arguments in starts_in(tmp_path / "mine"):
        given = dict(argument.split("=") for argument in arguments)
        assert given["model.drop_rate"] == "0.2"
        assert 0.01 <= float(given["optimizer.weight_decay"]) <= 1
    record = yaml.safe_load((tmp_path / "mine/sweep.yaml").read_text())
    assert record["swept"] == {"optimizer.weight_decay": "tag(log, interval(0.01, 1.0))"}
    assert record["sampler"] == "random"


def test_a_folder_of_own_configs_and_own_callbacks_can_be_swept(gptpl, tmp_path):
    (tmp_path / "own/model").mkdir(parents=True)
    (tmp_path / "own/model/mine.yaml").write_text("defaults: [tiny, _self_]\nn_layers: 1\n")
    own = ("-cd", "own", "model=mine,tiny", "callbacks.sample_text.max_new_tokens=1,2")
    assert gptpl("sweep", "tokenizer=bytes", "hydra.sweep.dir=mine", *own).status == 0
    starts = starts_in(tmp_path / "mine")
    assert len(starts) == 4
    assert starts[0][0] == f"--config-dir={tmp_path / 'own'}"
    assert {"model=mine", "callbacks.sample_text.max_new_tokens=1"} <= set(starts[0])


def test_a_sweep_that_others_still_work_on_is_not_done(gptpl, tmp_path):
    command = ("sweep", *GIVEN, "seed=1,2", "name=2:kill")
    gptpl(*command)
    search = Search(sampler="grid", n_trials=None, pruner="none", seed=0)
    with SweepStudy(tmp_path / "mine", {"seed": CategoricalDistribution(("1", "2"))}, search) as other:
        assert [claim.folder for claim in other.abandoned()] == ["1"]
        outcome = gptpl(*command)
    assert outcome.status == 1
    assert "trials that another process is running: 1" in outcome.err


def test_ctrl_c_leaves_a_table_a_report_and_says_what_is_left(gptpl, tmp_path, monkeypatch, drawn):
    def moved(self: Any, running: Any) -> None:
        if not sent and [trial.step for trial in running] == [20]:
            sent.append(signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    sent: list[int] = []
    monkeypatch.setattr("gptpl.cli.commands.sweep.Progress.moved", moved)
    search = ("sweep=random", "sweep.n_trials=5", "model.n_layers=int(interval(1,9))", "name=slow")
    outcome = gptpl("sweep", *GIVEN, *search)
    assert outcome.status == 130
    assert "trials left: 5; run the same command again to continue" in outcome.err
    [row] = results_in(tmp_path / "mine")
    assert (row["state"], row["error"]) == ("interrupted", "stopped by SIGTERM")
    assert "stopped by SIGTERM" in (tmp_path / "mine/report.md").read_text()
    assert "Traceback" not in outcome.err


# --- sorting the arguments ------------------------------------------------------------------------------


def test_arguments_are_sorted_into_the_sweeps_own_the_shared_and_the_swept():
    given = sort_overrides(
        [
            *("seed=1", "sweep=tpe", "sweep.n_trials=3", "hydra/launcher=ray", "hydra.sweep.dir=a,b"),
            *(
                "optimizer.lr=tag(log,interval(1e-5,1e-2))",
                "model.n_layers=int(interval(1,4))",
                "name=a,'b c'",
            ),
            *(
                "data.path=a (1).txt",
                "callbacks=[default,early_stopping]",
                "model=glob(gpt2_*)",
                "c=range(1,4)",
            ),
        ]
    )
    assert given.own == ["sweep=tpe", "sweep.n_trials=3", "hydra/launcher=ray", "hydra.sweep.dir=a,b"]
    assert given.shared == ["seed=1", "data.path=a (1).txt", "callbacks=[default,early_stopping]"]
    assert given.swept == {
        "optimizer.lr": FloatDistribution(1e-5, 1e-2, log=True),
        "model.n_layers": IntDistribution(1, 4),
        "name": CategoricalDistribution(("a", "'b c'")),
        "model": CategoricalDistribution(("gpt2_large", "gpt2_medium", "gpt2_small", "gpt2_xl")),
        "c": CategoricalDistribution(("1", "2", "3")),
    }


def test_text_is_text_in_a_sweep_too():
    given = sort_overrides(
        ["seed=1,2", "data.response_marker=a, b", "notes=x, y (z)", "data.train_path=a (1).csv"]
    )
    assert list(given.swept) == ["seed"]
    assert given.shared == ["data.response_marker=a, b", "notes=x, y (z)", "data.train_path=a (1).csv"]


# --- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("tokenizer=bytes,wrods",), ["tokenizer=wrods", "did you mean words?"]),
        (("seed=1,two",), ["seed=two"]),
        (("optimizer.lrr=1,2",), ["did you mean optimizer.lr?"]),
        (("optimizer.lr=interval(1,2)",), ["optimizer.lr=interval(1.0, 2.0)", "sweep=tpe"]),
        (("seed=1",), ["nothing to sweep over", "optimizer.lr=1e-4,4e-4"]),
        (("seed=1,2,1",), ["seed=1,2,1 has 1 twice"]),
        (("seed=1,2", "run_dir=x"), ["run_dir=x in a sweep", "hydra.sweep.dir"]),
        (("seed=1,2", "resume=x"), ["resume=x in a sweep", "leave -m out"]),
        (("seed=1,2", "sweep=tpee"), ["sweep=tpee is unknown: did you mean tpe?"]),
        (("seed=1,2", "sweep.sampler=bayes"), ["sweep.sampler must be one of grid, random, tpe, got bayes"]),
        (("seed=1,2", "sweep.n_trials=3"), ["sweep.n_trials=3, but the grid has 2", "sweep=random"]),
        (("seed=1,2", "sweep=random", "sweep.n_trials=0"), ["sweep.n_trials must be 1 or more, got 0"]),
        (("seed=1,2", "sweep.trials=3"), ["sweep.trials", "gptpl sweep"]),
        (("seed=1,2", "hydra/launcher=proceses"), ["hydra/launcher=proceses", "did you mean processes?"]),
        (("seed=1,2", "hydra/launcher=basic"), ["hydra/launcher=basic", "joblib, processes, ray, slurm"]),
        (("seed=1,2", "hydra.launcher.n_jobs=0"), ["hydra.launcher.n_jobs must be 1 or more here, got 0"]),
        (("seed=1,2", "--cfg", "job"), ["leave -m out"]),
        (("seed=1,2", "seed=3"), ["seed is given twice"]),
        (("seed=shuffle(1,2)",), ["leave out shuffle", "sweep=random"]),
        (("seed=glob(*)",), ["seed=glob(*)", "no config group"]),
        (("seed=1,2", "hydra.launcher.n_jobs=1,2"), ["hydra.launcher.n_jobs=1,2", "one value"]),
        (("seed=1,2", "sweep=tpe,random"), ["sweep=tpe,random", "one value"]),
        (("seed=1,2", "hydra.run.dir=x"), ["hydra.run.dir=x has no meaning in a sweep"]),
        (("seed=1,2", "hydra/sweeper=optuna"), ["hydra/sweeper=optuna", "sweep=grid"]),
        (("seed=1,2", "hydra.launcher.n_job=2"), ["did you mean hydra.launcher.n_jobs?"]),
        (("seed=1,2", "sweep.metric=val/lss"), ["monitor=val/lss", "val/loss"]),
        (("seed=1,2", "sweep=random", "sweep.seed=-1"), ["sweep.seed must be 0 or more, got -1"]),
        (("seed=1,2", "data=text_file", "data.path=missing.txt"), ["missing.txt"]),
    ],
)
def test_a_sweep_that_cannot_be_run_is_refused_before_its_first_trial(given, words, refused):
    line = refused("train", "-m", *(each for each in GIVEN if each.partition("=")[0] not in given[0]), *given)
    assert all(word in line for word in words), line


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_only_train_sweeps(command, refused):
    assert f"run gptpl {command} once for each value" in refused(command, "-m", "checkpoint=a,b")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("seed=1,2,3",), "seed: 1,2 there, 1,2,3 here"),
        (
            ("seed=1,2", "model.n_layers=1"),
            "tokenizer=bytes there, data.path=my.txt data=text_file model.n_layers=1",
        ),
        (("seed=1,2", "sweep=random"), "sampler: grid there, random here"),
    ],
)
def test_the_folder_of_another_sweep_is_refused(refused, sweep_of_two, given, words):
    line = refused("sweep", *GIVEN, *TEXT, *given)
    assert "holds another sweep" in line
    assert words in line


def test_a_folder_that_is_no_sweeps_is_refused(refused, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("mine")
    assert "exists and is not a sweep" in refused("sweep", *GIVEN, "seed=1,2")


def test_a_damaged_record_is_named(refused, sweep_of_two):
    (sweep_of_two / "sweep.yaml").write_text("command: [")
    assert "sweep.yaml is damaged" in refused("sweep", *GIVEN, *TEXT, "seed=1,2")


def test_trials_of_other_data_or_code_are_not_mixed_unless_asked_to(
    gptpl, refused, sweep_of_two, tmp_path, monkeypatch
):
    (tmp_path / "my.txt").write_text("The sea was wild. " * 200)
    line = refused("sweep", *GIVEN, *TEXT, "seed=1,2")
    assert "were made with other code or data" in line
    assert "my.txt" in line
    assert "git_commit: " not in line
    monkeypatch.setattr("gptpl.sweeps.sweep.git_commit", lambda: "abc")
    assert "git_commit: " in refused("sweep", *GIVEN, *TEXT, "seed=1,2")
    assert gptpl("sweep", *GIVEN, *TEXT, "seed=1,2", "sweep.mix=true").status == 0
    assert len(starts_in(sweep_of_two)) == 2  # of the sweep itself: nothing was left to do


# --- the real thing -------------------------------------------------------------------------------------


@pytest.mark.hosts
def test_a_trial_of_two_processes_is_the_run_that_it_would_be_alone(gptpl, tmp_path, run_folder, monkeypatch):
    """Other parameters on the second rank would give another loss than both batches in one process do."""
    monkeypatch.setattr("gptpl.sweeps.worker.PROGRAM", (sys.executable, "-m", "gptpl", "train"))
    given = (
        *("experiment=quick", "callbacks=checkpoint_last", "scheduler=constant", "trainer.max_steps=3"),
        *("model.n_layers=1", "model.drop_rate=0", "trainer.accelerator=cpu"),
    )
    search = ("sweep=random", "sweep.n_trials=1", "optimizer.lr=interval(1e-3,1e-2)", "hydra.sweep.dir=mine")
    outcome = gptpl("sweep", *given, "trainer=ddp", "trainer.devices=2", "data.batch_size=8", *search)
    assert outcome.status == 0, outcome.err
    trial = run_folder(tmp_path / "mine/0")
    lr = trial.config["optimizer"]["lr"]
    assert 1e-3 < lr < 1e-2
    outcome = gptpl("train", *given, f"optimizer.lr={lr}", "data.batch_size=16", "run_dir=alone")
    assert outcome.status == 0, outcome.err
    alone = run_folder(tmp_path / "alone").record["metrics"]
    assert trial.record["metrics"]["val/loss"] == pytest.approx(alone["val/loss"], abs=1e-6)
    [row] = results_in(tmp_path / "mine")
    assert (row["state"], row["val_loss"]) == ("finished", f"{alone['val/loss']:.4f}")
