"""Run folders written by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CONFIG = """\
name: mine
run_dir: {folder}
resume: null
seed: 1
model: {{n_layers: 2, emb_dim: 8}}
optimizer: {{_target_: gptpl.training.optimizers.adamw, _partial_: true, lr: {lr}}}
trainer: {{max_steps: 4, max_epochs: 5}}
callbacks: {{loss_curve: {{path: {folder}/loss.png}}, early_stopping: {{patience: {patience}}}}}
"""
METRICS = "step,eval/train_loss,val/loss,train/tokens_seen\n0,5.5,5.6,\n2,4.0,{loss},200\n4,3.0,4.6,400\n"
RECORD: dict[str, Any] = {
    "command": "gptpl train",
    "started": "2026-01-01T10:00:00+00:00",
    "finished": "2026-01-01T10:01:00+00:00",
    "versions": {"torch": "2.0"},
    "git_commit": "a" * 40,
    "hardware": {"cpu_threads": 2, "gpus": []},
    "data": {"name": "tale", "sha256": "b" * 64},
    "start": {"init": "random"},
    "planned_steps": 4,
    "steps": 4,
    "tokens_seen": 400,
    "seconds": 60.0,
}
FILES = {
    "checkpoints/best.ckpt": 1_000,
    "checkpoints/best.ckpt.sha256": 10,
    "checkpoints/step-00000002.ckpt": 3_000,
    "checkpoints/step-00000002.ckpt.sha256": 10,
    "checkpoints/step-00000004.ckpt": 3_500,
    "checkpoints/step-00000004.ckpt.sha256": 10,
    "checkpoints/step-00000003.ckpt.damaged": 500,
    "tensorboard/events.out.tfevents.1.vm.2.0": 700,
    "tensorboard/hparams.yaml": 3,
    "loss.png": 800,
    "train.log": 90,
    "samples.jsonl": 0,
    "nonfinite_step_3.txt": 5,
}
"""Further files with their sizes in bytes."""

MakeRun = Callable[..., Path]


def write_run(
    folder: Path, *, lr: float = 0.001, patience: int = 3, loss: float = 4.5, **entries: Any
) -> Path:
    """A finished run of 4 steps; `entries` go into its run.json, None leaves one out."""
    for name, size in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x" * size)
    (folder / "checkpoints/last.ckpt").symlink_to("step-00000004.ckpt")
    (folder / "config.yaml").write_text(CONFIG.format(folder=folder, lr=lr, patience=patience))
    (folder / "metrics.csv").write_text(METRICS.format(loss=loss))
    record = {name: value for name, value in (RECORD | entries).items() if value is not None}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def make_run() -> MakeRun:
    """Writes a run: `make_run(folder, lr=0.1, git_commit="c")`."""
    return write_run
