"""`gptpl train` as a process that gets signals, runs out of time, meets NaN, and finds its files damaged."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from gptpl.checkpoints.files import verify
from gptpl.checkpoints.format import HEADER_KEY, read_checkpoint
from gptpl.checkpoints.resume_state import state_digest
from gptpl.training import language_model

TRAIN = (
    *("train", "experiment=quick", "trainer=cpu", "callbacks.sample_text=null", "callbacks.loss_curve=null"),
    *("eval_val_batches=1", "eval_train_batches=1", "model.emb_dim=16", "model.n_layers=1"),
)


def wait_until_it_trains(process: Any) -> None:
    deadline = time.monotonic() + 120
    while "step 20: " not in process.said:
        assert process.status is None, process.said
        assert time.monotonic() < deadline
        time.sleep(0.02)


def last_step(run: Path) -> int:
    match = re.fullmatch(r"step-(\d+)\.ckpt", (run / "checkpoints/last.ckpt").resolve().name)
    assert match
    return int(match[1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_saves_says_how_to_continue_and_gives_an_honest_status(tmp_path, gptpl, copies):
    given = (*TRAIN, "run_dir=my run", "trainer.max_epochs=1000")
    process = copies(*given, cwd=tmp_path, output=tmp_path / "err")
    wait_until_it_trains(process)
    process.send(signal.SIGINT)
    assert process.wait(60) == 130
    run, err = tmp_path / "my run", process.said
    step = last_step(run)
    assert step >= 20
    assert "Ctrl-C: stopping after this step" in err
    assert f"stopped by Ctrl-C after step {step}" in err
    assert err.endswith(f": gptpl train 'resume={run}'\n")
    assert "Traceback" not in err
    record = json.loads((run / "run.json").read_text())
    assert record["stopped"] == {"reason": "Ctrl-C", "step": step}
    assert "finished" not in record
    with (run / "metrics.csv").open(newline="") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == list(range(step + 1))

    outcome = gptpl("train", f"resume={run}", f"trainer.stop_at_step={step + 2}")
    assert outcome.status == 0, outcome.err
    assert f"resuming at step {step} " in outcome.err
    assert last_step(run) == step + 2


@pytest.fixture
def at_step(monkeypatch):
    """Changes what a step does: `at_step(5, change)` hands its loss to `change`, in every session."""
    original = language_model.LanguageModelingModule.training_step

    def patch(steps: int | Sequence[int], change: Callable[[Any], Any]) -> None:
        chosen = [steps] if isinstance(steps, int) else steps

        def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
            loss = original(self, batch, batch_idx)
            return change(loss) if self.trainer.global_step + 1 in chosen else loss

        monkeypatch.setattr(language_model.LanguageModelingModule, "training_step", training_step)

    return patch


def sending(*numbers: int) -> Callable[[Any], Any]:
    """Sends signals to this process."""

    def send(loss: Any) -> Any:
        for number in numbers:
            os.kill(os.getpid(), number)
        return loss

    return send


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGUSR1", 138)])
def test_other_signals_do_the_same(tmp_path, gptpl, at_step, name, status):
    at_step(3, sending(getattr(signal, name)))
    outcome = gptpl(*TRAIN, "run_dir=run", "trainer.max_epochs=1")
    assert outcome.status == status
    assert f"{name}: stopping after this step" in outcome.err
    assert f"stopped by {name} after step 3" in outcome.err
    assert last_step(tmp_path / "run") == 3
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["stopped"] == {"reason": name, "step": 3}


def test_a_second_ctrl_c_does_not_wait_for_the_step(tmp_path, gptpl, at_step):
    at_step(3, sending(signal.SIGINT, signal.SIGINT))
    # A shell that runs the tests in the background lets them ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        outcome = gptpl(*TRAIN, "run_dir=run", "trainer.max_epochs=1")
    finally:
        signal.signal(signal.SIGINT, before)
    assert outcome.status == 130
    assert outcome.err.splitlines()[-1] == "gptpl: error: interrupted"
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_the_time_is_over(tmp_path, gptpl, monkeypatch):
    monkeypatch.setattr("gptpl.callbacks.stopping.duration", lambda text: timedelta(seconds=0.1))
    outcome = gptpl(*TRAIN, "run_dir=run", "trainer.max_epochs=1000", "trainer.max_time=00:00:00:01")
    assert outcome.status == 0, outcome.err
    step = last_step(tmp_path / "run")
    assert f"stopped by trainer.max_time=00:00:00:01 after step {step}" in outcome.err
    assert 0 < step < 39_000
    # The next session has as much time again.
    outcome = gptpl("train", "resume=run")
    assert outcome.status == 0, outcome.err
    assert last_step(tmp_path / "run") > step


# --- numbers that are none ------------------------------------------------------------------------------


TO_STEP_6 = ("trainer.max_steps=6", "scheduler.warmup_steps=1")


@pytest.fixture
def nan_at(at_step):
    """Makes the loss of some steps NaN."""
    return lambda *steps: at_step(steps, lambda loss: loss * float("nan"))


def test_a_loss_that_is_no_number_stops_the_run_with_a_report(tmp_path, gptpl, nan_at):
    nan_at(25)
    outcome = gptpl(*TRAIN, "run_dir=run", "trainer.max_epochs=1")
    assert outcome.status == 1
    assert "error: the loss or the gradient of step 25 is not finite" in outcome.err
    assert f"gptpl train resume={tmp_path / 'run'} 'skip_steps=[25]'" in outcome.err
    assert "Traceback" not in outcome.err
    assert last_step(tmp_path / "run") == 24
    report = (tmp_path / "run/nonfinite_step_25.txt").read_text()
    good = f"last good checkpoint: {tmp_path / 'run/checkpoints/step-00000024.ckpt'}"
    assert report.startswith(f"{good}\nstep 25: epoch 0, batch 25 on; gradient norm nan\n")
    assert f"error: {good}\n" in outcome.err
    assert "blocks.0.attn.qkv.weight: " in report
    assert "batch 25 of the epoch: loss " in report
    failed = json.loads((tmp_path / "run/run.json").read_text())["failed"]
    assert failed["step"] == 24
    assert failed["error"].startswith("NonFiniteError: the loss or the gradient of step 25 is not finite")
    outcome = gptpl("train", "resume=run", "skip_steps=[25]")
    assert outcome.status == 0, outcome.err
    assert "  skip_steps: [] -> [25], from step 25" in outcome.err
    assert last_step(tmp_path / "run") == 39
    assert not {"failed", "stopped"} & json.loads((tmp_path / "run/run.json").read_text()).keys()


def test_rolling_back_skips_the_step_and_finishes(tmp_path, gptpl, nan_at):
    nan_at(2, 5)
    outcome = gptpl(*TRAIN, "run_dir=run", *TO_STEP_6, "on_nonfinite=rollback")
    assert outcome.status == 0, outcome.err
    assert "rolled back to step 1; step 2 will be skipped" in outcome.err
    assert "rolled back to step 4; step 5 will be skipped" in outcome.err
    assert last_step(tmp_path / "run") == 6
    assert "skip_steps:\n- 2\n- 5\n" in (tmp_path / "run/config.yaml").read_text()
    assert "finished" in json.loads((tmp_path / "run/run.json").read_text())
    with (tmp_path / "run/metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == [str(step) for step in range(7)]
    assert [row["step"] for row in rows if row["train/loss"] == "nan"] == ["2", "5"]


def test_rolling_back_gives_up_when_no_step_is_good(tmp_path, gptpl, nan_at):
    nan_at(*range(2, 7))
    outcome = gptpl(*TRAIN, "run_dir=run", *TO_STEP_6, "on_nonfinite=rollback")
    assert outcome.status == 1
    assert "steps 2 to 4 were not finite either: the weights are the reason, not a batch" in outcome.err


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("on_nonfinite=ignore", "on_nonfinite=ignore: must be 'stop' or 'rollback'; see gptpl train --help"),
        ("skip_steps=[0]", "skip_steps=[0]: optimizer steps are counted from 1"),
    ],
)
def test_other_answers_to_them_are_refused(refused, setting, says):
    assert refused(*TRAIN, "run_dir=run", setting) == says


# --- checkpoints that are damaged -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(command, tmp_path_factory):
    """A run with checkpoints of steps 4 and 8, stopped at 8; copy it before changing anything in it."""
    folder = tmp_path_factory.mktemp("interrupted")
    length = ("trainer.max_steps=12", "scheduler.warmup_steps=2")
    every = ("callbacks.checkpoint_last.every_n_steps=4", "trainer.stop_at_step=8")
    outcome = command(*TRAIN, "run_dir=run", *length, *every, cwd=folder)
    assert outcome.status == 0, outcome.err
    whole = command(*TRAIN, "run_dir=whole", *length, cwd=folder)
    assert whole.status == 0, whole.err
    return folder


@pytest.fixture
def run(interrupted, tmp_path) -> Path:
    return Path(shutil.copytree(interrupted / "run", tmp_path / "run", symlinks=True))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [flip, Path.unlink])
def test_a_damaged_newest_is_named_and_the_one_before_is_used(run, gptpl, interrupted, damage):
    newest = run / "checkpoints/step-00000008.ckpt"
    damage(newest)
    outcome = gptpl("train", "resume=run")
    assert outcome.status == 0, outcome.err
    [line] = [
        line for line in outcome.err.splitlines() if line.startswith(f"warning: checkpoint {newest} is ")
    ]
    assert line.endswith(": resuming from step 4 instead")
    whole = read_checkpoint((interrupted / "whole/checkpoints/last.ckpt").resolve())
    resumed = read_checkpoint((run / "checkpoints/last.ckpt").resolve())
    assert state_digest(resumed) == state_digest(whole)
    assert (run / "checkpoints/step-00000008.ckpt.damaged").exists() == (damage is not Path.unlink)
    assert verify((run / "checkpoints/last.ckpt").resolve()) is None


def test_code_in_place_of_a_checkpoint_is_not_run(run, refused, tmp_path):
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    newest = run / "checkpoints/step-00000008.ckpt"
    torch.save({"state_dict": Evil()}, newest)
    newest.with_name(f"{newest.name}.sha256").unlink()
    line = refused("train", "resume=run", "trainer.stop_at_step=5")
    assert "code" in line
    assert f"use {newest.with_name('step-00000004.ckpt')}, which is whole" in line
    assert not (tmp_path / "ran").exists()


def test_all_damaged_is_refused(run, refused):
    for step in (4, 8):
        flip(run / f"checkpoints/step-{step:08d}.ckpt")
    line = refused("train", "resume=run")
    assert line.startswith(f"checkpoint {run}/checkpoints/step-00000008.ckpt is damaged")
    assert "1 more cannot be used either" in line


def test_an_older_format_is_refused_to_resume_and_still_generates(run, refused, gptpl):
    path = run / "checkpoints/step-00000008.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint[HEADER_KEY]["format_version"] = 1
    del checkpoint["gptpl_resume"]
    for file in (run / "checkpoints").iterdir():
        file.unlink()
    torch.save(checkpoint, run / "checkpoints/last.ckpt")
    line = refused("train", "resume=run")
    assert "last.ckpt has format version 1, " in line
    assert "init=run" in line
    assert gptpl("generate", "checkpoint=run", "max_new_tokens=3").status == 0


def test_damaged_weights_are_found_by_generate_and_evaluate(run, refused):
    flip(run / "checkpoints/step-00000008.ckpt")
    for command in ("generate", "evaluate"):
        line = refused(command, "checkpoint=run")
        assert "last.ckpt is damaged (its SHA-256 is not the recorded one)" in line


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounting takes root")
def test_a_full_disk_ends_the_run_with_a_line_and_the_checkpoint_before(tmp_path, gptpl):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"mount: {mounted.stderr.decode().strip()}")
    try:
        small = ("callbacks.checkpoint_last.every_n_steps=1", "callbacks.checkpoint_last.keep=9")
        outcome = gptpl(*TRAIN, "run_dir=disk/run", "trainer.max_epochs=1", "logger=csv", *small)
        assert outcome.status == 1
        assert "No space left on device" in outcome.err.splitlines()[-1]
        assert "make room there" in outcome.err.splitlines()[-1]
        run = disk / "run"
        step = last_step(run)
        assert step >= 1
        assert verify((run / "checkpoints/last.ckpt").resolve()) is None
        assert not list(run.rglob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
        outcome = gptpl("train", f"resume={run}", f"trainer.stop_at_step={step + 2}")
        assert outcome.status == 0, outcome.err
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
