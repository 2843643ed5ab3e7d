"""metrics.csv read back with the standard library's reader, and where TensorBoard's files lie."""

import csv
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.utilities import rank_zero_only

from gptpl.training.loggers import MetricsCSVLogger, RunTensorBoardLogger


@pytest.fixture
def make(tmp_path):
    def build(**options: Any) -> MetricsCSVLogger:
        return MetricsCSVLogger(save_dir=str(tmp_path / "run"), **options)

    return build


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "metrics.csv"


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def log_steps(logger: MetricsCSVLogger, steps: range) -> None:
    """As the Trainer does, which asks the logger to save after every step."""
    for step in steps:
        logger.log_metrics({"train/loss": 1 / step}, step=step)
        logger.save()


def test_what_is_logged_at_one_step_is_one_row(make, path):
    logger = make()
    logger.log_metrics({"val/loss": 5.5}, step=0)
    logger.log_metrics({"train/loss": 5.0, "lr": 1e-4, "epoch": 0}, step=1)
    logger.log_metrics({"val/loss": 4.5, "train/loss": 4.75}, step=1)
    logger.finalize("success")
    assert table(path) == [
        {"step": "0", "val/loss": "5.5", "train/loss": "", "lr": ""},
        {"step": "1", "val/loss": "4.5", "train/loss": "4.75", "lr": "0.0001"},
    ]


def test_rows_are_in_the_order_of_steps_and_columns_grow_to_the_right(make, path):
    logger = make()
    logger.log_metrics({"b": 1.0}, step=10)
    logger.log_metrics({"a": 2.0}, step=2)
    logger.log_metrics({"c": 3.0}, step=10)
    logger.finalize("success")
    assert path.read_text().splitlines() == ["step,b,a,c", "2,,2.0,", "10,1.0,,3.0"]
    resumed = make()
    resumed.log_metrics({"d": 4.0, "c": 5.0}, step=3)
    resumed.finalize("success")
    assert path.read_text().splitlines() == ["step,b,a,c,d", "2,,2.0,,", "3,,,5.0,4.0", "10,1.0,,3.0,"]


def test_numbers_come_back_to_the_last_digit(make, path):
    values = {"a": 0.1 + 0.2, "b": 1e-300, "c": float("nan"), "d": float("inf")}
    logger = make()
    logger.log_metrics(values, step=1)
    logger.finalize("success")
    (row,) = table(path)
    assert [repr(float(row[name])) for name in values] == [repr(value) for value in values.values()]


def test_an_existing_file_is_kept_and_extended(make, path):
    log_steps(first := make(), range(1, 4))
    first.finalize("success")
    before = table(path)

    second = make()
    second.log_metrics({"train/loss": 9.0, "val/loss": 8.0}, step=3)
    second.log_metrics({"val/loss": 7.0}, step=4)
    second.finalize("success")
    after = table(path)
    assert [row["train/loss"] for row in after] == [row["train/loss"] for row in before[:2]] + ["9.0", ""]
    assert [row["val/loss"] for row in after] == ["", "", "8.0", "7.0"]


def test_a_logger_that_logs_nothing_writes_nothing(make, path):
    make().finalize("success")
    assert not path.parent.exists()
    log_steps(first := make(), range(1, 4))
    first.finalize("success")
    stamp = path.stat().st_mtime_ns, path.stat().st_ino
    make().finalize("success")
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == stamp


def test_the_file_is_written_now_and_then_and_a_kill_loses_only_the_rest(make, path):
    """Without `finalize`, as after a kill."""
    logger = make(flush_every_n_steps=10)
    log_steps(logger, range(1, 10))
    assert not path.exists()
    log_steps(logger, range(10, 36))
    assert [int(row["step"]) for row in table(path)] == list(range(1, 31))


def test_a_long_run_does_not_write_the_file_over_and_over(make, path, monkeypatch):
    """Writing thousands of rows every 2 steps would take longer than training: at 600 it slows down."""
    writes: list[Any] = []
    replace = os.replace

    def noting(source: Any, target: Any) -> None:
        writes.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", noting)
    log_steps(make(flush_every_n_steps=2), range(1, 601))
    assert len(writes) < 250  # not 300
    assert len(table(path)) > 590


def test_a_crash_while_writing_leaves_the_old_file(make, path, monkeypatch):
    """The new text is made beside it and moved."""
    logger = make()
    log_steps(logger, range(1, 4))
    logger.finalize("success")
    before = path.read_text()

    def power_cut(source: Any, target: Any) -> None:
        assert len(table(Path(source))) == 5  # whole before it is moved
        raise OSError("power cut")

    monkeypatch.setattr(os, "replace", power_cut)
    log_steps(logger, range(4, 6))
    with pytest.raises(OSError, match="power cut"):
        logger.finalize("failed")
    assert path.read_text() == before
    monkeypatch.undo()
    logger.finalize("success")
    assert len(table(path)) == 5
    assert [file.name for file in path.parent.iterdir()] == ["metrics.csv"]


def test_only_the_first_process_writes(make, path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = make(flush_every_n_steps=1)
    log_steps(logger, range(1, 4))
    logger.finalize("success")
    assert not path.exists()


def test_a_run_that_fails_keeps_its_numbers(pretraining):
    """Lightning finalises its loggers when training is broken off."""
    module = pretraining.module()
    step = module.training_step

    def fail_at_step_8(batch: Any, batch_idx: int) -> Any:
        if module.trainer.global_step == 8:
            raise RuntimeError("out of memory")
        return step(batch, batch_idx)

    module.training_step = fail_at_step_8
    with pytest.raises(RuntimeError, match="out of memory"):
        pretraining.fit(module=module)
    assert list(pretraining.column("train/loss")) == list(range(1, 9))
    assert list(pretraining.column("val/loss")) == [0, 3, 6]


def test_tensorboard_writes_into_one_folder_of_the_run(tmp_path):
    for value in (1.0, 2.0):
        logger = RunTensorBoardLogger(save_dir=str(tmp_path))
        assert Path(logger.log_dir) == tmp_path / "tensorboard"
        logger.log_metrics({"val/loss": value}, step=1)
        logger.finalize("success")
    folders = {file.parent for file in tmp_path.rglob("*") if file.is_file()}
    assert folders == {tmp_path / "tensorboard"}
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def log_to_tensorboard(folder: Path) -> None:
    """In a process that has imported neither TensorBoard nor TensorFlow, and finds one that ends it."""
    for name in list(sys.modules):
        if {"tensorboard", "tensorflow", "event_file"} & set(name.split(".")):
            del sys.modules[name]
    sys.path.insert(0, str(folder))
    logger = RunTensorBoardLogger(save_dir=str(folder))
    logger.log_metrics({"loss": 1.0}, step=1)
    logger.save()


def test_an_installed_tensorflow_is_not_imported(tmp_path: Path) -> None:
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('tensorflow is imported')")
    process = multiprocessing.get_context("fork").Process(target=log_to_tensorboard, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert list(tmp_path.glob("tensorboard/events.*"))
