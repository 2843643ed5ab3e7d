"""Checkpoints that are written while training continues."""

import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from gptpl.callbacks import checkpoints
from gptpl.callbacks.checkpoints import BestCheckpoint, DurableCheckpointIO, LastCheckpoint
from gptpl.callbacks.stopping import RunStopped, StopAtBoundary
from gptpl.checkpoints import files
from gptpl.checkpoints.files import CheckpointFolder, snapshot, verify, write_checkpoint
from gptpl.checkpoints.format import read_checkpoint
from gptpl.checkpoints.resume_state import state_digest


@pytest.fixture(autouse=True)
def enough_memory(monkeypatch):
    """Also on a machine that has little left."""
    monkeypatch.setattr(checkpoints, "free_memory", lambda device: 1 << 50)


@pytest.fixture
def folder(tmp_path):
    return CheckpointFolder(tmp_path / "checkpoints", keep=99)


@pytest.fixture
def before_writing(monkeypatch) -> Callable[[Callable[[int], None]], None]:
    """`before_writing(act)` calls `act(step)` in the thread that writes, before it begins."""

    def patch(act: Callable[[int], None]) -> None:
        def write(checkpoint: dict[str, Any], path: Path) -> None:
            if path.name.startswith("step-"):
                act(checkpoint["global_step"])
            write_checkpoint(checkpoint, path)

        monkeypatch.setattr(checkpoints, "write_checkpoint", write)

    return patch


def in_background() -> bool:
    return threading.current_thread() is not threading.main_thread()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def last(folder: CheckpointFolder, **settings: Any) -> LastCheckpoint:
    return LastCheckpoint(dirpath=folder.folder, keep=99, **settings)


def is_whole(folder: CheckpointFolder, newest: int) -> bool:
    """Whether every file is, `last.ckpt` is the newest, and nothing else lies there."""
    assert [verify(folder.path(step)) for step in folder.steps()] == [None] * len(folder.steps())
    return (folder.folder / "last.ckpt").resolve() == folder.path(newest) and not list(
        folder.folder.glob(".*")
    )


def test_a_snapshot_makes_the_file_of_its_moment(tmp_path):
    """With memory in common, parts of larger tensors, and what is no tensor; byte for byte."""
    weight = torch.randn(6, 4)
    state: dict[str, Any] = {
        "state_dict": {"embedding": weight, "head": weight, "part": weight[1:3, ::2], "none": torch.empty(0)},
        "states": [{"step": torch.tensor(3.0)}, {"low": torch.ones(5).bfloat16(), "moments": (weight.T, 1)}],
        "random": {"python": [3, list(range(624)), None], "torch": torch.get_rng_state()},
        "scaled": torch.ones(2, requires_grad=True) * 2,
        "weight": torch.nn.Parameter(torch.ones(2)),
    }
    now, later = tmp_path / "now.ckpt", tmp_path / "later.ckpt"
    write_checkpoint(state, now)
    copied = snapshot(state)
    weight.zero_()
    state["states"][0]["step"] += 1
    state["random"]["python"][1].clear()
    state["random"]["torch"].zero_()
    state["states"].append("more")
    state["weight"].data.zero_()
    write_checkpoint(copied, later)
    assert now.read_bytes() == later.read_bytes()
    assert files.snapshot_bytes({"state_dict": state["state_dict"]}) == 6 * 4 * 4


def test_steps_after_the_copy_do_not_reach_the_file(pretraining, folder, before_writing):
    """The files are those of a training that waits, though each is written two steps later."""
    pretraining.fit(waited := last(folder, every_n_steps=3, asynchronous=False))
    expected = {step: state_digest(read_checkpoint(folder.path(step))) for step in folder.steps()}
    assert list(expected) == [3, 6, 9, 12, 15, 18, 20]
    assert waited.saved_step == 20

    def two_steps_later(step: int) -> None:
        if in_background():
            wait_for(lambda: module.trainer.global_step >= step + 2)
            late.append(step)

    late: list[int] = []
    before_writing(two_steps_later)
    module = pretraining.module()
    later = CheckpointFolder(folder.folder.with_name("later"), keep=99)
    pretraining.fit(last(later, every_n_steps=3), module=module)
    assert late == [3, 6, 9, 12, 15, 18]  # the last step is not in the background
    assert {step: state_digest(read_checkpoint(later.path(step))) for step in later.steps()} == expected
    assert is_whole(later, 20)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_no_two_checkpoints_are_written_at_once(pretraining, folder, monkeypatch):
    """Though every step is saved, the best at some of them, too, and the disk is slow."""
    at_once, most = 0, 0

    def slowly(*arguments: Any) -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        time.sleep(0.02)
        write_checkpoint(*arguments)
        at_once -= 1

    monkeypatch.setattr(checkpoints, "write_checkpoint", slowly)
    best = BestCheckpoint(dirpath=folder.folder)
    pretraining.fit(best, last(folder, every_n_steps=1), module=pretraining.module(total_steps=8))
    assert most == 1
    assert folder.steps() == list(range(1, 9))
    assert is_whole(folder, 8)
    assert verify(folder.folder / "best.ckpt") is None


# --- an end of training while a checkpoint is being written -----------------------------------------------


class Fails(L.Callback):
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 4:
            raise ZeroDivisionError


@pytest.mark.parametrize(
    ("ending", "raised", "steps"),
    [(StopAtBoundary(stop_at_step=3), RunStopped, [3]), (Fails(), ZeroDivisionError, [3, 4])],
)
def test_the_file_is_whole_when_control_returns(pretraining, folder, before_writing, ending, raised, steps):
    written: list[int] = []

    def slowly(step: int) -> None:
        time.sleep(0.3)
        written.append(step)

    before_writing(slowly)
    with pytest.raises(raised):
        pretraining.fit(last(folder, every_n_steps=3), ending)
    assert written == folder.steps() == steps
    assert is_whole(folder, steps[-1])


# --- disks that do not take it ------------------------------------------------------------------------------


@pytest.fixture
def full_at_6(folder, before_writing) -> list[int]:
    """Lets the first write of step 6 fail; the steps that are tried."""
    tried: list[int] = []

    def write(step: int) -> None:
        tried.append(step)
        if step == 6 and tried.count(6) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder.path(6)))

    before_writing(write)
    return tried


FULL = r"No space left on device: '.*step-00000006\.ckpt'"


def test_an_error_in_the_background_ends_training_after_the_next_step(pretraining, folder, full_at_6, logged):
    """The step that it ends with finds room again."""
    with pytest.raises(OSError, match=FULL):
        pretraining.fit(last(folder, every_n_steps=3))
    assert full_at_6 in ([3, 6, 7], [3, 6, 8])
    assert folder.steps() == [3, full_at_6[-1]]
    assert is_whole(folder, full_at_6[-1])
    assert not [line for line in logged() if "could not be saved" in line]


def test_a_stop_does_not_hide_the_error(pretraining, folder, full_at_6):
    with pytest.raises(OSError, match=FULL):
        pretraining.fit(last(folder, every_n_steps=3), StopAtBoundary(stop_at_step=6))
    assert full_at_6 == [3, 6, 6]
    assert is_whole(folder, 6)


def test_the_error_does_not_hide_another(pretraining, folder, before_writing, logged):
    def fail(step: int) -> None:
        if step == 3:
            wait_for(lambda: module.trainer.state.status == "interrupted")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder.path(3)))

    before_writing(fail)
    module = pretraining.module()
    with pytest.raises(ZeroDivisionError):
        pretraining.fit(last(folder, every_n_steps=3), Fails(), module=module)
    errors = [line for line in logged() if "could not be saved" in line]
    assert errors == [
        f"a checkpoint could not be saved: [Errno 28] No space left on device: '{folder.path(3)}'"
    ]
    assert folder.steps() == [4]


# --- memory that is short, a process that is killed ---------------------------------------------------------


def test_without_memory_for_a_copy_training_waits(pretraining, folder, before_writing, monkeypatch, logged):
    """Said once."""
    background: list[bool] = []
    before_writing(lambda step: background.append(in_background()))
    monkeypatch.setattr(checkpoints, "free_memory", lambda device: 1000)
    pretraining.fit(last(folder, every_n_steps=3), module=pretraining.module(total_steps=10))
    assert background == [False] * 4
    assert is_whole(folder, 10)
    assert len([line for line in logged() if line.startswith("memory is short for a copy")]) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
def test_killed_while_it_writes_the_checkpoint_before_stays(folder, monkeypatch):
    def save(step: int) -> DurableCheckpointIO:
        io = DurableCheckpointIO()
        with io.in_background(lambda: folder.settle(step)):
            io.save_checkpoint({"weight": torch.full((1000,), float(step))}, folder.path(step))
        return io

    save(1).finish()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        original = files._HashingFile._write_chunk

        def half(self: Any, chunk: memoryview) -> None:
            original(self, chunk[: len(chunk) // 2])
            os.write(writing, b".")
            time.sleep(60)

        monkeypatch.setattr(files._HashingFile, "_write_chunk", half)
        save(2).finish()
        os._exit(0)
    assert os.read(reading, 1) == b"."
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(list(folder.folder.glob(".*.tmp"))) == 1
    good = folder.newest_good()
    assert good is not None
    assert good.path == folder.path(1)
    assert good.damaged == []
    save(2).finish()
    assert folder.steps() == [1, 2]
    assert is_whole(folder, 2)
