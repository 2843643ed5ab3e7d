"""What a run's record says, in words; `-` for what it does not say."""

import math
from collections.abc import Mapping
from typing import Any

from gptpl.cli.readable import bytes_text, loss_text, near, seconds_text
from gptpl.records.run_record import Evaluation, RunRecord


def state_text(run: RunRecord) -> str:
    """How it ended, and why."""
    ending = run.record.get(run.state)
    if run.state == "stopped" and isinstance(ending, Mapping):
        return f"stopped at step {ending.get('step')} ({ending.get('reason')})"
    if run.state == "failed" and isinstance(ending, Mapping):
        return f"failed at step {ending.get('step')}: {ending.get('error')}"
    return {"unfinished": "unfinished: still running, or ended without a word"}.get(run.state, run.state)


def steps_text(run: RunRecord) -> str:
    """`15` or, where the plan is known, `15 of 20`."""
    return f"{run.steps:,}" + ("" if run.planned_steps is None else f" of {run.planned_steps:,}")


def evaluation_text(evaluation: Evaluation | None) -> str:
    """`3.0257 at step 30`."""
    return f"{loss_text(evaluation.val_loss)} at step {evaluation.step:,}" if evaluation else "-"


def duration_text(run: RunRecord) -> str:
    """How long it took; of a run that was resumed, since then."""
    seconds = run.record.get("seconds")
    if run.state != "finished" or not isinstance(seconds, int | float):
        return "-"
    return seconds_text(seconds) + (" since it was resumed" if run.record.get("resumed") else "")


def speed_text(run: RunRecord) -> str:
    """The last tokens per second."""
    speed = run.metric("train/tokens_per_second")
    return "-" if math.isnan(speed) else f"{speed:,.0f}"


def memory_text(run: RunRecord) -> str:
    """The most memory that it took."""
    peak = run.record.get("peak_memory_bytes")
    return bytes_text(peak) if isinstance(peak, int) else "-"


def start_text(run: RunRecord) -> str:
    """What its weights began with."""
    start = run.record.get("start")
    if not isinstance(start, Mapping):
        return "-"
    step = _entry(start.get("parent"), "step")
    place = start.get("checkpoint") or start.get("path") or start.get("size")
    return " ".join(
        [
            str(start.get("init")),
            *([f"({near(place) if '/' in str(place) else place})"] if place else []),
            *([f"after {step:,} steps"] if isinstance(step, int) else []),
        ]
    )


def model_text(run: RunRecord) -> str:
    """Its shape, and its parameters."""
    model = run.config.get("model")
    names = {
        "n_layers": "layers",
        "n_heads": "heads",
        "emb_dim": "wide",
        "context_length": "tokens of context",
    }
    shape = [f"{_entry(model, key)} {noun}" for key, noun in names.items() if _entry(model, key) is not None]
    parameters = run.record.get("parameters")
    return (
        ", ".join([*shape, *([f"{parameters:,} parameters"] if isinstance(parameters, int) else [])]) or "-"
    )


def data_text(run: RunRecord) -> str:
    """The name of the data and the beginning of their hash."""
    data = run.record.get("data")
    return f"{_entry(data, 'name')} (SHA-256 {str(_entry(data, 'sha256'))[:12]})" if data else "-"


def tokenizer_text(run: RunRecord) -> str:
    """The tokenizer with the size of its vocabulary."""
    tokenizer = run.record.get("tokenizer")
    return f"{_entry(tokenizer, 'name')}, {_entry(tokenizer, 'vocab_size')} tokens" if tokenizer else "-"


def _entry(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else None
