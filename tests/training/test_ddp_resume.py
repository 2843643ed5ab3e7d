"""Two processes that are stopped and resumed end with the same bits as two that never stopped."""

import csv
import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from gptpl.checkpoints.format import read_checkpoint
from gptpl.checkpoints.resume_state import RESUME_KEY, state_digest

ROOT = Path(__file__).parents[2]
STEPS = 6
TRACE = "gptpl.callbacks.records.StepTrace"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def two_processes(name: str, *overrides: str) -> list[str]:
    """An epoch of 9 batches, two a step and the fifth step one; dropout; evaluations in mid-epoch."""
    return [
        *("experiment=quick", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"),
        *("data.batch_size=16", "trainer.accumulate_grad_batches=2", "model.n_layers=1"),
        *("trainer.max_epochs=2", "scheduler.warmup_steps=2", "eval_every_n_steps=3"),
        *("callbacks.sample_text.max_new_tokens=5", "callbacks.checkpoint_last.every_n_steps=1"),
        *(
            f"run_dir={name}",
            f"+callbacks.trace._target_={TRACE}",
            f"+callbacks.trace.path={name}/steps.jsonl",
        ),
        *overrides,
    ]


def outcome(run_dir: Path) -> dict[str, Any]:
    with (run_dir / "metrics.csv").open(newline="") as file:
        clocked = ("train/tokens_per_second", "train/mfu")
        rows = [{k: v for k, v in row.items() if k not in clocked} for row in csv.DictReader(file)]
    return {
        "state": state_digest(read_checkpoint((run_dir / "checkpoints/last.ckpt").resolve())),
        "steps": [json.loads(line) for line in (run_dir / "steps.jsonl").read_text().splitlines()],
        "rows": rows,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory, gptpl_train) -> Path:
    """Where an unbroken run of two processes is, as `whole`."""
    folder: Path = tmp_path_factory.mktemp("ddp_resume")
    gptpl_train(folder, *two_processes("whole", f"trainer.stop_at_step={STEPS}"), ranks=2)
    return folder


@pytest.fixture(scope="module")
def stopped(folder, gptpl_train) -> Path:
    """The folder of a run of two that has stopped after step 2; its copies are called `stopped`, too."""
    gptpl_train(folder, *two_processes("stopped", "trainer.stop_at_step=2"), ranks=2)
    return folder / "stopped"


@pytest.fixture
def copied(stopped, tmp_path) -> Path:
    """A folder with a copy of it."""
    shutil.copytree(stopped, tmp_path / "stopped", symlinks=True)
    return tmp_path


def test_the_ranks_see_other_batches_and_draw_other_dropout_masks(folder):
    whole = outcome(folder / "whole")
    assert [len(set(step["batches"])) for step in whole["steps"]] == [4, 4, 4, 4, 2, 4]
    checkpoint = read_checkpoint((folder / "whole/checkpoints/last.ckpt").resolve())
    masks = []
    for state in checkpoint[RESUME_KEY]["random"]:
        generator = torch.Generator()
        generator.set_state(state["torch"])
        masks.append(torch.rand(1000, generator=generator) < 0.5)
    assert len(masks) == 2
    assert 400 < int((masks[0] != masks[1]).sum()) < 600


def test_stopped_twice_it_ends_with_the_same_bits(folder, copied, gptpl_train):
    gptpl_train(copied, "resume=stopped", "trainer.stop_at_step=5", ranks=2)
    gptpl_train(copied, "resume=stopped", f"trainer.stop_at_step={STEPS}", ranks=2)
    assert "resuming at step 5 " in (copied / "stopped/train.log").read_text()
    assert outcome(copied / "stopped") == outcome(folder / "whole")


def test_a_signal_to_the_first_process_stops_both_after_the_same_step(folder, copies):
    first = copies(
        *("train", *two_processes("signalled", "trainer.max_epochs=500")),
        cwd=folder, output=folder / "said", GPTPL_CACHE=folder / "cache", PYTHONPATH=ROOT,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while "step 3: " not in first.said:
        assert first.status is None, first.said
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first.send(signal.SIGTERM)
    assert first.wait(60) == 143
    said = first.said
    assert "stopped by SIGTERM after step" in said
    assert "to resume: gptpl train resume=" in said
    assert "Traceback" not in said
    step = json.loads((folder / "signalled/run.json").read_text())["stopped"]["step"]
    assert (folder / "signalled/checkpoints/last.ckpt").resolve().name == f"step-{step:08d}.ckpt"


def test_another_number_of_processes_goes_on_with_the_same_batches(folder, copied, gptpl_train):
    """One process with batches of 32 instead of two with 16: other bits, the same training."""
    one = ("trainer=cpu", "trainer.devices=1")
    more = (*one, "data.batch_size=32", f"trainer.stop_at_step={STEPS}")
    assert "no longer bit-identical" in gptpl_train(copied, "resume=stopped", *more)
    whole, fewer = outcome(folder / "whole"), outcome(copied / "stopped")
    assert [row["train/tokens_seen"] for row in fewer["rows"]] == [
        row["train/tokens_seen"] for row in whole["rows"]
    ]
    for ours, theirs in zip(fewer["rows"], whole["rows"], strict=True):
        if ours["train/loss"]:  # the dropout of one process is another one than that of two
            assert float(ours["train/loss"]) == pytest.approx(float(theirs["train/loss"]), abs=0.05)


def test_other_numbers_of_processes_train_on_the_same_sequences(tmp_path, gptpl_train):
    """Two, then one, then two again, and one that does it all; without dropout, which would differ."""
    own = ("experiment=quick", "model.drop_rate=0", "model.n_layers=1", "scheduler.warmup_steps=2",
           "trainer.max_epochs=2", "trainer.accumulate_grad_batches=2", "eval_every_n_steps=3",
           "~callbacks.sample_text", "callbacks.checkpoint_last.every_n_steps=1")  # fmt: skip
    one = ("trainer.strategy=auto", "trainer.devices=1")
    two = ("trainer.accelerator=cpu", "trainer.strategy=ddp", "trainer.devices=2")
    gptpl_train(
        tmp_path, *own, *two, "data.batch_size=16", "run_dir=parts", "trainer.stop_at_step=3", ranks=2
    )
    said = gptpl_train(tmp_path, "resume=parts", *one, "trainer.stop_at_step=7")
    assert "processes: 2 -> 1, from step 4 (no longer bit-identical" in said
    assert "batches of 32 sequences as before: 16 at a time on each process, 2 times" in said
    gptpl_train(tmp_path, "resume=parts", *two, ranks=2)
    gptpl_train(tmp_path, *own, "trainer=cpu", "data.batch_size=32", "run_dir=whole")
    rows = {}
    for name in ("parts", "whole"):
        with (tmp_path / name / "metrics.csv").open(newline="") as file:
            rows[name] = {row["step"]: row for row in csv.DictReader(file)}
    assert list(rows["parts"]) == list(rows["whole"])
    assert len(rows["whole"]) == 11  # 2 epochs of 9 batches, two a step, and the state before
    for step, row in rows["whole"].items():
        for name in ("train/loss", "val/loss", "train/tokens_seen", "lr"):
            if row[name]:
                assert float(rows["parts"][step][name]) == pytest.approx(float(row[name]), rel=1e-5), step
    checkpoint = read_checkpoint((tmp_path / "parts/checkpoints/last.ckpt").resolve())
    assert checkpoint["gptpl"]["global_batch"] == 32
    assert checkpoint[RESUME_KEY]["batch"] == 9  # counted as the run began
