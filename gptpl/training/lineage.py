"""Where a model's weights come from: what it was trained on, and what it began with, run before run."""

import csv
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

LOSSES = ("eval/train_loss", "val/loss")
RANDOM: Mapping[str, Any] = {"init": "random"}


def lineage_of(checkpoint: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The past of a checkpoint, as plain data.

    Keys: `step` (optimizer steps), `tokens_seen`, `data` (`corpus` and the text's `sha256`), `losses` (nats
    per token at the last evaluation before the checkpoint; empty where the run's metrics.csv is not there),
    and `start`: what its first weights were, for a run with that run's own past as `parent`.
    """
    header = checkpoint["gptpl"]
    if exported := header.get("lineage"):
        return dict(exported)
    step = int(checkpoint.get("global_step", 0))
    return {
        "step": step,
        "tokens_seen": int(header.get("tokens_seen", 0)),
        "data": {"corpus": _corpus(header["config"]), "sha256": header.get("data_sha256", "")},
        "losses": _losses(path, step),
        "start": header.get("start", RANDOM),
    }


def generations(lineage: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The runs of a lineage, the youngest first."""
    found = [lineage]
    while isinstance(parent := found[-1].get("start", {}).get("parent"), Mapping):
        found.append(parent)
    return found


def _corpus(config: Mapping[str, Any]) -> str:
    """What the run's settings call its text."""
    corpus = config.get("data", {}).get("corpus", {})
    target = str(corpus.get("_target_", "")).rpartition(".")[2]
    return str(corpus.get("name") or corpus.get("path") or target)


def _losses(path: Path, step: int) -> dict[str, float]:
    """The losses that a run logged last at or before a step."""
    metrics = path.resolve().parent.parent / "metrics.csv"
    found: dict[str, float] = {}
    if path.parent.name != "checkpoints" or not metrics.is_file():
        return found
    with suppress(OSError, UnicodeDecodeError, csv.Error), metrics.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            with suppress(ValueError, KeyError, TypeError):  # a line that is being written, or was edited
                if int(row["step"]) <= step:
                    found |= {name: float(row[name]) for name in LOSSES if row.get(name)}
    return found
