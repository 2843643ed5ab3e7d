"""A run's record, in words and as plain data, and the commands that resume it or use its model."""

import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptpl.files.durable import is_locked
from gptpl.files.run_record import BEST, CHECKPOINT_FOLDER, LAST, Evaluation, RunRecord
from gptpl.runs.listing import DiskUse
from gptpl.text import NONE, bytes_text, duration_text, loss_text, near, time_text

LAST_PATH = f"{CHECKPOINT_FOLDER}/{LAST}"
BEST_PATH = f"{CHECKPOINT_FOLDER}/{BEST}"
SHAPE = {"n_layers": "layers", "n_heads": "heads", "emb_dim": "wide", "context_length": "tokens of context"}
USES = {
    "ClassificationModule": ("classify", "text='See you at six'"),
    "InstructionModule": ("respond", "instruction='Name a synonym of happy.'"),
}
"""The commands that use the models of older runs, by their task; newer runs record theirs (`use`)."""


def facts(run: RunRecord) -> dict[str, str]:
    """What is known of a run, by name; "-" for what is not recorded."""
    speed, peak = run.metric("train/tokens_per_second"), run.record.get("peak_memory_bytes")
    data, tokenizer = run.entry("data", "name"), run.entry("tokenizer", "name")
    seconds = run.record.get("seconds") if run.state == "finished" else None
    without = ", without parts that were killed" if run.record.get("resumed") else ""
    planned = "" if run.planned_steps is None else f" of {run.planned_steps:,}"
    return {
        "state": _state(run),
        "tags": ", ".join(run.tags) or NONE,
        "notes": run.notes or NONE,
        "command": run.record.get("command", NONE),
        "started": time_text(run.started),
        "data": f"{data} (SHA-256 {str(run.entry('data', 'sha256'))[:12]})" if data else NONE,
        "tokenizer": f"{tokenizer}, {run.entry('tokenizer', 'vocab_size')} tokens" if tokenizer else NONE,
        "model": _model(run),
        "started from": _start(run),
        "steps": f"{run.steps:,}{planned}",
        "tokens": f"{run.tokens_seen:,}",
        "time": NONE if seconds is None else f"{duration_text(seconds)}{without}",
        "tokens per second": NONE if math.isnan(speed) else f"{speed:,.0f}",
        "peak memory": NONE if peak is None else bytes_text(peak),
        "lowest val loss": _loss(run.best),
        "first val loss": _loss(run.evaluations[0] if run.evaluations else None),
        "last val loss": _loss(run.last),
        "last train loss": loss_text(run.last.train_loss if run.last else None),
    }


def entry(run: RunRecord, use: DiskUse) -> dict[str, Any]:
    """What `--json` prints of every run."""
    return {
        "run": near(run.path),
        "state": state(run),
        "started": run.started.isoformat(timespec="seconds"),
        "steps": run.steps,
        "planned_steps": run.planned_steps,
        "tokens_seen": run.tokens_seen,
        "tags": run.tags,
        "notes": run.notes,
        "bytes": use.total,
        "checkpoint_bytes": sum(use.checkpoints.values()),
    }


def state(run: RunRecord) -> str:
    """How the run ended, or that it is being trained."""
    return "running" if run.state == "unfinished" and is_locked(run.path) else run.state


def _state(run: RunRecord) -> str:
    step = run.entry(run.state, "step")
    if run.state == "stopped" and step is not None:
        return f"stopped at step {step} ({run.entry('stopped', 'reason')})"
    if run.state == "failed" and step is not None:
        return f"failed at step {step}: {run.entry('failed', 'error')}"
    return "unfinished: it was killed" if (found := state(run)) == "unfinished" else found


def _loss(evaluation: Evaluation | None) -> str:
    return f"{loss_text(evaluation.val_loss)} at step {evaluation.step:,}" if evaluation else NONE


def _start(run: RunRecord) -> str:
    """The weights that it started from."""
    start = run.record.get("start")
    if start is None:
        return NONE
    step = run.entry("start", "parent", "step")
    place = start.get("checkpoint") or start.get("path") or start.get("size")
    words = [str(start.get("init"))]
    if isinstance(place, str):
        words.append(f"({near(Path(place)) if '/' in place else place})")
    if isinstance(step, int):
        words.append(f"after {step:,} steps")
    return " ".join(words)


def _model(run: RunRecord) -> str:
    config, parameters = run.config.get("model"), run.record.get("parameters")
    model = config if isinstance(config, Mapping) else {}
    parts = [f"{model[key]} {noun}" for key, noun in SHAPE.items() if model.get(key) is not None]
    parts += [] if parameters is None else [f"{parameters:,} parameters"]
    return ", ".join(parts) or NONE


def resume_command(run: RunRecord) -> str | None:
    """The command that resumes the run, a finished one with more steps; None without a checkpoint."""
    if not (run.path / LAST_PATH).is_file():
        return None
    command = f"gptpl train {shlex.quote(f'resume={near(run.path)}')}"
    trainer = run.config.get("trainer")
    if run.state != "finished" or not isinstance(trainer, Mapping):
        return command
    steps, epochs = trainer.get("max_steps"), trainer.get("max_epochs")
    if isinstance(steps, int) and run.steps >= steps > 0:
        return f"{command} trainer.max_steps={2 * steps}"
    return f"{command} trainer.max_epochs={2 * epochs}" if isinstance(epochs, int) else command


def use_command(run: RunRecord) -> str | None:
    """A command that uses the model; None without weights."""
    if not any((run.path / name).is_file() for name in (LAST_PATH, BEST_PATH)):
        return None
    task = run.config.get("task")
    target = str(task.get("_target_")) if isinstance(task, Mapping) else ""
    default = USES.get(target.rpartition(".")[2], ("generate", "prompt='Every effort moves you'"))
    verb, example = run.record.get("use") or default
    return f"gptpl {verb} {shlex.quote(f'checkpoint={near(run.path)}')} {example}"
