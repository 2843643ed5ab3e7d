"""What a run's record says, in words; `-` for what it does not say."""

import math
from collections.abc import Mapping
from pathlib import Path

from gptpl.files.run_record import Evaluation, RunRecord
from gptpl.text import bytes_text, duration_text, loss_text, near


def state_text(run: RunRecord) -> str:
    """How it ended, and why."""
    step = run.entry(run.state, "step")
    if run.state == "stopped" and step is not None:
        return f"stopped at step {step} ({run.entry('stopped', 'reason')})"
    if run.state == "failed" and step is not None:
        return f"failed at step {step}: {run.entry('failed', 'error')}"
    return {"unfinished": "unfinished: still running, or ended without a word"}.get(run.state, run.state)


def steps_text(run: RunRecord) -> str:
    """`15` or, where the plan is known, `15 of 20`."""
    return f"{run.steps:,}" + ("" if run.planned_steps is None else f" of {run.planned_steps:,}")


def evaluation_text(evaluation: Evaluation | None) -> str:
    """`3.0257 at step 30`."""
    return f"{loss_text(evaluation.val_loss)} at step {evaluation.step:,}" if evaluation else "-"


def time_text(run: RunRecord) -> str:
    """How long it took; of a run that was resumed, since then."""
    if run.state != "finished" or "seconds" not in run.record:
        return "-"
    return duration_text(run.record["seconds"]) + (
        " since it was resumed" if run.record.get("resumed") else ""
    )


def speed_text(run: RunRecord) -> str:
    """The last tokens per second."""
    speed = run.metric("train/tokens_per_second")
    return "-" if math.isnan(speed) else f"{speed:,.0f}"


def memory_text(run: RunRecord) -> str:
    """The most memory that it took."""
    peak = run.record.get("peak_memory_bytes")
    return "-" if peak is None else bytes_text(peak)


def start_text(run: RunRecord) -> str:
    """What its weights began with."""
    start = run.record.get("start")
    if start is None:
        return "-"
    step = run.entry("start", "parent", "step")
    place = start.get("checkpoint") or start.get("path") or start.get("size")
    return " ".join(
        [
            str(start.get("init")),
            *([f"({near(Path(place)) if '/' in place else place})"] if isinstance(place, str) else []),
            *([f"after {step:,} steps"] if isinstance(step, int) else []),
        ]
    )


def model_text(run: RunRecord) -> str:
    """Its shape, and its parameters."""
    config = run.config.get("model")
    model = config if isinstance(config, Mapping) else {}
    names = {
        "n_layers": "layers",
        "n_heads": "heads",
        "emb_dim": "wide",
        "context_length": "tokens of context",
    }
    shape = [f"{model[key]} {noun}" for key, noun in names.items() if model.get(key) is not None]
    parameters = run.record.get("parameters")
    return ", ".join([*shape, *([f"{parameters:,} parameters"] if parameters is not None else [])]) or "-"


def data_text(run: RunRecord) -> str:
    """The name of the data and the beginning of their hash."""
    name, sha256 = run.entry("data", "name"), run.entry("data", "sha256")
    return "-" if name is None else f"{name} (SHA-256 {str(sha256)[:12]})"


def tokenizer_text(run: RunRecord) -> str:
    """The tokenizer with the size of its vocabulary."""
    name, size = run.entry("tokenizer", "name"), run.entry("tokenizer", "vocab_size")
    return "-" if name is None else f"{name}, {size} tokens"
