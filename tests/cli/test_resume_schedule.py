"""Overrides of `resume=` that change the training: they are really applied, from the next step on."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

PEAK, FLOOR, WARMUP = 3e-3, 1e-6, 2
RUN = (
    *("train", "experiment=quick", "trainer=cpu", "model.n_layers=1", "model.emb_dim=16", "run_dir=run"),
    *("callbacks.sample_text=null", "callbacks.loss_curve=null", f"scheduler.warmup_steps={WARMUP}"),
    *("eval_every_n_steps=100", "eval_val_batches=1", "eval_train_batches=1", "logger=csv"),
)


def cosine(step: int, total: int, peak: float = PEAK) -> float:
    """The rate of the update after `step` finished ones, of `total` planned."""
    if step < WARMUP:
        return peak * (step + 1) / WARMUP
    angle = math.pi * (step - WARMUP) / (total - 1 - WARMUP)
    return FLOOR + (peak - FLOOR) * (1 + math.cos(angle)) / 2


Lengths = Callable[..., Path]


@pytest.fixture(scope="module")
def stopped(command, tmp_path_factory):
    """A run of 20 planned steps, stopped after 12; and one that went through."""
    folder = tmp_path_factory.mktemp("stopped")
    for name, stop in (("stopped", "12"), ("finished", "null")):
        outcome = command(*RUN, "trainer.max_steps=20", f"trainer.stop_at_step={stop}", cwd=folder)
        assert outcome.status == 0, outcome.err
        (folder / "run").rename(folder / name)
    return folder


@pytest.fixture
def go_on(stopped, tmp_path, gptpl, run_folder):
    """Resumes one of the two runs; its outcome, and its learning rate by step."""

    def resume(name: str, *overrides: str):
        shutil.copytree(stopped / name, tmp_path / "run", symlinks=True)
        outcome = gptpl("train", "resume=run", *overrides)
        assert outcome.status == 0, outcome.err
        run = run_folder(tmp_path / "run")
        return outcome, {int(row["step"]): float(row["lr"]) for row in run.rows if row["lr"]}, run

    return resume


def test_without_a_change_the_schedule_goes_on(go_on):
    _, rates, _ = go_on("stopped")
    assert rates == pytest.approx({step + 1: cosine(step, 20) for step in range(20)})


def test_another_peak_counts_from_the_next_step(go_on):
    outcome, rates, _ = go_on("stopped", "optimizer.lr=1e-3")
    assert "  optimizer.lr: 0.003 -> 0.001, from step 13" in outcome.err
    expected = {s + 1: cosine(s, 20, peak=1e-3 if s >= 12 else PEAK) for s in range(20)}
    assert rates == pytest.approx(expected)


def test_another_decay_reaches_the_optimizer(go_on):
    outcome, _, run = go_on("stopped", "optimizer.weight_decay=0.33", "optimizer.betas=[0.8,0.9]")
    assert "  optimizer.weight_decay: 0.1 -> 0.33, from step 13" in outcome.err
    groups = run.checkpoint("last")["optimizer_states"][0]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.33, 0.0]
    assert [tuple(group["betas"]) for group in groups] == [(0.8, 0.9)] * 2


def test_a_longer_run_holds_the_rate_until_the_new_schedule_is_below(go_on):
    outcome, rates, _ = go_on("stopped", "trainer.max_steps=40")
    held = cosine(12, 20)
    expected = {s + 1: cosine(s, 20) if s < 12 else min(cosine(s, 40), held) for s in range(40)}
    assert rates == pytest.approx(expected)
    after = [rates[step] for step in range(12, 41)]
    assert after == sorted(after, reverse=True)
    assert "learning rate: held at or below " in outcome.err


def test_a_finished_run_that_is_extended_stays_at_its_last_rate(go_on):
    _, rates, run = go_on("finished", "trainer.max_steps=30")
    assert [rates[step] for step in range(21, 31)] == pytest.approx([FLOOR] * 10)
    assert run.record["steps"] == 30


def test_asked_for_it_rises(go_on):
    outcome, rates, _ = go_on("finished", "trainer.max_steps=30", f"optimizer.lr={PEAK}")
    assert [rates[s + 1] for s in range(20, 30)] == pytest.approx([cosine(s, 30) for s in range(20, 30)])
    assert rates[21] > rates[20]
    assert "held" not in outcome.err


def test_the_ceiling_holds_until_a_rate_is_asked_for(go_on, gptpl, tmp_path, run_folder):
    go_on("finished", "trainer.max_steps=30", "trainer.stop_at_step=23")
    for overrides in (["trainer.stop_at_step=26"], [f"optimizer.lr={PEAK}", "trainer.stop_at_step=null"]):
        outcome = gptpl("train", "resume=run", *overrides)
        assert outcome.status == 0, outcome.err
    rates = {int(row["step"]): float(row["lr"]) for row in run_folder(tmp_path / "run").rows if row["lr"]}
    assert [rates[step] for step in range(21, 27)] == pytest.approx([FLOOR] * 6)
    assert [rates[s + 1] for s in range(26, 30)] == pytest.approx([cosine(s, 30) for s in range(26, 30)])


def test_evaluations_go_by_the_new_interval(go_on):
    _, _, run = go_on("stopped", "eval_every_n_steps=3")
    assert [int(row["step"]) for row in run.rows if row["val/loss"]] == [0, 12, 15, 18, 20]


def test_muons_rates_change_one_by_one(gptpl, tmp_path):
    muon = ("optimizer=muon", "trainer.max_steps=20", "trainer.stop_at_step=12")
    assert gptpl(*RUN, *muon).status == 0
    outcome = gptpl("train", "resume=run", "optimizer.muon_lr=5e-3")
    assert outcome.status == 0, outcome.err
    state = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["optimizer_states"][0]
    assert [group["initial_lr"] for group in state["param_groups"]] == [5e-3, PEAK, PEAK]


def test_the_patience_of_early_stopping_can_change(gptpl, tmp_path, run_folder):
    """Which Lightning takes from the checkpoint. After the first evaluation none is an improvement here."""
    early = ("callbacks=[default,early_stopping]", "callbacks.early_stopping.min_delta=99")
    often = ("eval_every_n_steps=1", "trainer.max_steps=20", "callbacks.early_stopping.patience=9")
    outcome = gptpl(*RUN[:6], *RUN[8:], *early, *often, "trainer.stop_at_step=3")
    assert outcome.status == 0, outcome.err
    outcome = gptpl("train", "resume=run", "callbacks.early_stopping.patience=4")
    assert outcome.status == 0, outcome.err
    run = run_folder(tmp_path / "run")
    assert run.record["steps"] == 1 + 4
    assert "finished" in run.record
