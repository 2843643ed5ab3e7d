"""`gptpl train -m`: a run for each combination, a table at the end, and no sweep that dies with one trial."""

import csv
from pathlib import Path

import pytest

from gptpl.cli.build import Run
from gptpl.cli.console import RunLog
from gptpl.cli.sweep import table

RUN_FILES = {"checkpoints", "config.yaml", "loss.png", "metrics.csv", "run.json", "tensorboard", "train.log"}
GIVEN = (
    *("experiment=quick", "trainer=cpu", "trainer.precision=32-true", "scheduler=constant"),
    *("trainer.max_steps=2", "callbacks.sample_text=null"),
)


@pytest.fixture(scope="module")
def swept(command, tmp_path_factory):
    """Two tokenizers by two learning rates, one of which is refused."""
    return command(
        *("train", *GIVEN, "-m", "tokenizer=words,bytes", "optimizer.lr=-1,3e-3"),
        cwd=tmp_path_factory.mktemp("sweep"),
    )


def folder_of(swept) -> Path:
    [folder] = swept.folder.glob("runs/sweeps/*")
    return folder


def results_in(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_trial_that_ran_has_a_folder_of_its_own(swept, run_folder):
    folder = folder_of(swept)
    assert {path.name for path in folder.iterdir()} == {"1", "3", "multirun.yaml", "results.csv"}
    for name, tokenizer in (("1", "words"), ("3", "bytes")):
        run = run_folder(folder / name)
        assert {path.name for path in run.path.iterdir()} == RUN_FILES
        assert run.record["tokenizer"]["name"] == tokenizer
        assert (run.config["optimizer"]["lr"], run.config["run_dir"]) == (3e-3, str(run.path))


def test_the_results_are_sorted_by_validation_loss_with_failures_last(swept, run_folder):
    rows = results_in(folder_of(swept))
    assert [row["trial"] for row in rows] == ["3", "1", "0", "2"]  # fewer bytes than words to guess among
    for row in rows[:2]:
        metrics = run_folder(folder_of(swept) / row["trial"]).record["metrics"]
        assert float(row["val_loss"]) == pytest.approx(metrics["val/loss"], abs=1e-4)
        assert float(row["best_val_loss"]) == pytest.approx(metrics["best_val/loss"], abs=1e-4)
        assert row["error"] == ""
    for row in rows[2:]:
        assert row["val_loss"] == row["best_val_loss"] == ""
        assert row["error"].startswith("InputError: optimizer.lr=-1")
    assert {"tokenizer=bytes", "trainer.max_steps=2"} <= set(rows[0]["overrides"].split())


def test_the_table_on_standard_output_shows_what_differs(swept):
    head, *rows, blank, path = swept.out.splitlines()
    assert head.split() == ["trial", "overrides", "best_val_loss", "val_loss", "error"]
    assert [row.split()[:3] for row in rows] == [
        ["3", "tokenizer=bytes", "optimizer.lr=0.003"],
        ["1", "tokenizer=words", "optimizer.lr=0.003"],
        ["0", "tokenizer=words", "optimizer.lr=-1"],
        ["2", "tokenizer=bytes", "optimizer.lr=-1"],
    ]
    assert "trainer.max_steps" not in swept.out
    assert (blank, path) == ("", str(folder_of(swept) / "results.csv"))


def test_a_sweep_with_a_failed_trial_ends_with_status_1(swept):
    assert swept.status == 1
    assert "trial 0 failed: InputError: optimizer.lr=-1" in swept.err
    assert "Traceback" not in swept.err


@pytest.fixture
def losses(monkeypatch) -> None:
    """Trials that end at once: seed 0 by a lack of memory, 9 without a loss, others with the seed as loss."""

    def fit(run: Run, run_log: RunLog, arguments: list[str]) -> dict[str, float]:
        seed = run.config["seed"]
        if seed == 0:
            raise RuntimeError("out of memory\nin a kernel")
        return {} if seed == 9 else {"val/loss": seed, "best_val/loss": seed / 2}

    monkeypatch.setattr("gptpl.cli.train.fit", fit)


@pytest.mark.usefixtures("losses")
def test_a_sweep_without_failures_ends_with_status_0(gptpl, tmp_path):
    outcome = gptpl("train", "-m", *GIVEN, "seed=5,3,9,4", "hydra.sweep.dir=mine")
    assert outcome.status == 0
    assert [row["trial"] for row in results_in(tmp_path / "mine")] == ["1", "3", "0", "2"]
    assert {path.name for path in tmp_path.iterdir()} == {"mine"}


@pytest.mark.usefixtures("losses")
def test_an_error_of_the_machine_fails_one_trial_only(gptpl):
    outcome = gptpl("train", "-m", *GIVEN, "seed=0,1")
    assert outcome.status == 1
    assert outcome.out.splitlines()[2].split(maxsplit=2)[2] == "RuntimeError: out of memory"
    assert outcome.out.splitlines()[1].split() == ["1", "seed=1", "0.5000", "1.0000"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("trainer.accelerator=cpu", "trainer.devices=2", "seed=1,2"), ["2 devices", "trainer.devices=1"]),
        (("tokenizer=bytes,wrods",), ["tokenizer=wrods", "did you mean words?"]),
        (("seed=1,two",), ["seed=two"]),
        (("optimizer.lrr=1,2",), ["did you mean optimizer.lr?"]),
    ],
)
def test_a_sweep_that_cannot_be_run_is_refused_before_its_first_trial(given, words, refused):
    line = refused("train", "-m", "model=tiny", "tokenizer=bytes", *given)
    assert all(word in line for word in words)


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_only_train_sweeps(command, refused):
    assert f"run gptpl {command} once for each value" in refused(command, "-m", "checkpoint=a,b")


def test_the_columns_of_a_table_are_aligned():
    assert table([["a", "bb", "c"], ["aaa", "", "ccc"]]) == ["a    bb  c", "aaa      ccc"]
