"""Loggers that go back to a checkpoint: the files of a resumed run against those of an unbroken one."""

import io
import json
import logging
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gptpl.errors import InputError
from gptpl.training.loggers import MetricsCSVLogger, ResumableLogger, RunTensorBoardLogger

LAST_STEP = 12
Points = dict[str, list[tuple[int, Any]]]


def log_step(logger: Logger, step: int) -> None:
    """What is logged at the end of a step: one number that no decimal writes out, and a late one."""
    late = {"train/late": step / 3} if step > 4 else {}
    logger.log_metrics({"train/loss": math.sqrt(step), **late}, step=step)
    logger.save()


def log_evaluation(logger: Logger, step: int) -> None:
    """What follows every third step, behind the checkpoint of that step."""
    if step % 3 == 0:
        logger.log_metrics({f"val/loss_{'early' if step < 6 else 'late'}": -math.sqrt(step)}, step=step)
        logger.save()
    if step % 3 == 0 and isinstance(logger, RunTensorBoardLogger):
        if step == 3:
            logger.log_hyperparams({"lr": 0.1}, {"best_val/loss": 0.5}, step=step)
        logger.experiment.add_text("sample", f"step {step}", global_step=step)
        logger.experiment.add_image("loss", np.full((3, 4, 4), step, dtype=np.uint8), step)


def saved(logger: Any) -> dict[str, Any]:
    """The position, with all that it describes on disk: what a checkpoint asks for."""
    logger.sync()
    position: dict[str, Any] = logger.position()
    return position


def train(logger: Any, steps: Sequence[int], *, save_at: int | None = None) -> dict[str, Any]:
    """Logs these steps, and gives the position of one of them as a checkpoint gives it back."""
    position: dict[str, Any] = {}
    for step in steps:
        log_step(logger, step)
        if step == save_at:
            position = through_a_checkpoint(saved(logger))
        log_evaluation(logger, step)
    return position


def resume(logger: Any, position: dict[str, Any], *, at: int, to: int = LAST_STEP) -> None:
    """The evaluation of the step that the checkpoint is of, and what comes after it."""
    logger.return_to(position)
    log_evaluation(logger, at)
    train(logger, range(at + 1, to + 1))
    logger.finalize("success")


def through_a_checkpoint(position: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(position, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def csv_logger(folder: Path, **options: Any) -> MetricsCSVLogger:
    return MetricsCSVLogger(save_dir=str(folder), **options)


def tensorboard_logger(folder: Path) -> RunTensorBoardLogger:
    return RunTensorBoardLogger(save_dir=str(folder))


def points(folder: Path) -> Points:
    """What TensorBoard's reader finds: the steps and values of each tag, in the order of reading."""
    everything = dict.fromkeys(("scalars", "images", "tensors"), 0)
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance=everything).Reload()
    tags = events.Tags()
    found: Points = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags["scalars"]}
    found |= {tag: [(e.step, e.encoded_image_string) for e in events.Images(tag)] for tag in tags["images"]}
    found |= {
        tag: [(e.step, e.tensor_proto.string_val[0]) for e in events.Tensors(tag)] for tag in tags["tensors"]
    }
    found |= {tag: [] for tag in events.summary_metadata if tag.startswith("_hparams_/")}
    return found


@pytest.fixture
def set_clock(monkeypatch) -> Callable[[float], None]:
    real = time.time
    return lambda shift: monkeypatch.setattr(time, "time", lambda: real() + shift)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    """The folder of a run with both loggers that nothing stopped."""
    folder: Path = tmp_path_factory.mktemp("unbroken")
    for logger in (csv_logger(folder), tensorboard_logger(folder)):
        train(logger, range(1, LAST_STEP + 1))
        logger.finalize("success")
    return folder


@pytest.fixture
def run(tmp_path) -> Path:
    return tmp_path / "run"


@pytest.mark.parametrize("make", [csv_logger, tensorboard_logger])
def test_both_loggers_have_positions(make, tmp_path):
    assert isinstance(make(tmp_path), ResumableLogger)


@pytest.mark.parametrize("saved", range(1, LAST_STEP + 1))
def test_a_resumed_table_is_the_unbroken_one_to_the_byte(unbroken, run, saved):
    """Whether it was killed at once or much later, when the file was already rewritten."""
    first = csv_logger(run, flush_every_n_steps=2)
    position = train(first, range(1, LAST_STEP + 1), save_at=saved)
    resume(csv_logger(run), position, at=saved)
    assert (run / "metrics.csv").read_bytes() == (unbroken / "metrics.csv").read_bytes()


def test_returning_brings_back_the_table_of_the_position(run):
    """The columns and the last row's later numbers go, too."""
    logger = csv_logger(run, flush_every_n_steps=1000)
    train(logger, range(1, 3))
    assert not (run / "metrics.csv").exists()
    log_step(logger, 3)
    position = saved(logger)
    then = (run / "metrics.csv").read_bytes()
    assert len(then.splitlines()) == 1 + 3
    log_evaluation(logger, 3)
    train(logger, range(4, 9))
    logger.finalize("failed")
    assert (run / "metrics.csv").read_bytes() != then
    csv_logger(run).return_to(position)
    assert (run / "metrics.csv").read_bytes() == then


def test_a_position_before_the_first_number_empties_the_table(run):
    position = saved(csv_logger(run))
    assert not run.exists()
    train(logger := csv_logger(run), range(1, 4))
    logger.finalize("failed")
    resumed = csv_logger(run)
    resumed.return_to(position)
    resumed.log_metrics({"a": 0.5}, step=0)
    resumed.finalize("success")
    assert (run / "metrics.csv").read_text().splitlines() == ["step,a", "0,0.5"]


@pytest.mark.parametrize(
    "junk",
    [
        b"",
        b"\x00\xff\xfe\x80" * 50,
        b"step,a\n1,0.5\n2,0.2",  # torn: 0.25
        b"step,a,b\n1,0.5,1\n2,0.2\n",
        b"step,a\n1,0.5\nx,0.5\n",
        b"step,a\n1,\x00\x01\n",
        b"a,b\n1,2\n",
        b"step,a\n\n1,0.5\n",
        b'step,a\n1,"0.5\n',
    ],
)
def test_a_broken_table_is_named_and_can_be_moved_away(run, junk, caplog):
    position = train(csv_logger(run), range(1, 6), save_at=5)
    path = run / "metrics.csv"
    path.write_bytes(junk)
    with pytest.raises(InputError, match="move it away") as error:
        csv_logger(run).return_to(position)
    assert str(path) in str(error.value)
    assert path.read_bytes() == junk
    with pytest.raises(InputError, match="move it away"):  # a new run's, before it trains
        csv_logger(run).return_to({})
    path.rename(run / "elsewhere")
    with caplog.at_level(logging.WARNING):
        resume(csv_logger(run), position, at=5, to=6)
    assert f"{path} lacks 4 rows" in caplog.text
    assert [line.split(",")[0] for line in path.read_text().splitlines()] == ["step", "5", "6"]


def test_a_folder_in_the_place_of_the_table_is_named(run):
    position = train(csv_logger(run), range(1, 6), save_at=5)
    (run / "metrics.csv").unlink()
    (run / "metrics.csv").mkdir()
    with pytest.raises(InputError, match=r"metrics\.csv"):
        csv_logger(run).return_to(position)


@pytest.mark.parametrize("saved", [1, 3, 5, 6, LAST_STEP])
@pytest.mark.parametrize("shift", [0, -86_400, 86_400])
def test_tensorboard_shows_every_point_once_and_in_order(unbroken, run, saved, shift, set_clock):
    """Resumed in the same second (a smaller process number sorts first as well), or with another clock."""
    position = train(tensorboard_logger(run), range(1, LAST_STEP + 1), save_at=saved)
    set_clock(shift)
    resume(tensorboard_logger(run), position, at=saved)
    expected = points(unbroken)
    # TensorBoard's fast server drops what it has read at an event's step or beyond: the order counts.
    assert points(run) == expected
    assert [step for step, _ in expected["train/loss"]] == list(range(1, LAST_STEP + 1))
    assert [step for step, _ in expected["sample/text_summary"]] == [3, 6, 9, 12]
    assert len(expected["loss"]) == 4
    assert any("session_start_info" in tag for tag in expected)


def test_a_run_resumed_twice_and_back_to_the_older_checkpoint(unbroken, run, set_clock):
    first = train(tensorboard_logger(run), range(1, 8), save_at=4)
    second_run = tensorboard_logger(run)
    second_run.return_to(first)
    log_evaluation(second_run, 4)
    set_clock(-5)
    second = train(second_run, range(5, 11), save_at=7)
    assert len(second["files"]) == 2
    resume(tensorboard_logger(run), second, at=7)
    assert points(run) == points(unbroken)
    resume(tensorboard_logger(run), first, at=4)
    assert points(run) == points(unbroken)


def test_what_was_logged_is_in_the_file_when_it_was_synced(run):
    """No thread and no buffer holds anything back; the sizes are those of the files."""
    logger = tensorboard_logger(run)
    for step in range(1, 101):
        log_step(logger, step)
        logger.experiment.add_text("long", "x" * 10_000, global_step=step)
    position = logger.position()
    logger.sync()
    sizes = {path.name: path.stat().st_size for path in (run / "tensorboard").glob("*tfevents*")}
    assert position == {"files": sizes}
    found = points(run)
    assert len(found["train/loss"]) == len(found["long/text_summary"]) == 100


@pytest.mark.parametrize("change", ["missing", "shorter"])
def test_lost_points_are_a_warning(run, change, caplog):
    position = train(tensorboard_logger(run), range(1, LAST_STEP + 1), save_at=6)
    (path,) = (run / "tensorboard").glob("*tfevents*")
    if change == "missing":
        path.unlink()
    else:
        os.truncate(path, 300)
    with caplog.at_level(logging.WARNING):
        resume(tensorboard_logger(run), position, at=6)
    assert f"{path} is {change}" in caplog.text
    assert [step for step, _ in points(run)["train/loss"]][-6:] == list(range(7, LAST_STEP + 1))


def test_a_record_of_other_files_reaches_none_outside_the_folder(run, caplog):
    run.mkdir()
    outside = run / "events.out.tfevents.1"
    outside.write_bytes(b"12345")
    tensorboard_logger(run).return_to({"files": {"../events.out.tfevents.1": 2, str(outside): 2}})
    assert outside.read_bytes() == b"12345"
    assert "missing" in caplog.text


@pytest.mark.parametrize("make", [csv_logger, tensorboard_logger])
def test_other_ranks_have_no_position_and_change_nothing(make, run, monkeypatch):
    position = train(make(run), range(1, 10), save_at=3)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    make(run).return_to({})
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert make(run).position() == {}
    make(run).return_to(position)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("make", [csv_logger, tensorboard_logger])
def test_a_position_is_synced_to_disk(make, run, monkeypatch):
    """The files and, because they are new or renamed, their folder."""
    log_step(logger := make(run), 1)
    synced: set[int] = set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))
    logger.sync()
    (path,) = [path for path in run.rglob("*") if "tfevents" in path.name or path.name == "metrics.csv"]
    assert {path.stat().st_ino, path.parent.stat().st_ino} <= synced


def log_and_die(run: Path) -> None:
    """Log 8 steps, with the positions after the sixth in a file; then be killed."""
    loggers: list[Any] = [csv_logger(run), tensorboard_logger(run)]
    for step in range(1, 9):
        for logger in loggers:
            log_step(logger, step)
        if step == 6:
            (run / "positions").write_text(json.dumps([saved(logger) for logger in loggers]))
        for logger in loggers:
            log_evaluation(logger, step)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_killed_process_has_left_everything_up_to_the_position(unbroken, run):
    process = multiprocessing.get_context("fork").Process(target=log_and_die, args=(run,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    table, events = json.loads((run / "positions").read_text())
    resume(csv_logger(run), table, at=6)
    resume(tensorboard_logger(run), events, at=6)
    assert (run / "metrics.csv").read_bytes() == (unbroken / "metrics.csv").read_bytes()
    assert points(run) == points(unbroken)
