"""Where a model's weights come from: what it was trained on, and what it began with, run before run."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from gptpl.records.run_record import RunError, read_evaluations

LOSSES = ("eval/train_loss", "val/loss")
RANDOM: Mapping[str, Any] = {"init": "random"}


def lineage_of(checkpoint: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The past of a checkpoint, as plain data.

    Keys: `step` (optimizer steps), `tokens_seen`, `data` (`corpus` and the text's `sha256`), `losses` (nats
    per token at the last evaluation before the checkpoint; empty where the run's files are not there),
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
    data = config.get("data")
    corpus = data.get("corpus") if isinstance(data, Mapping) else None
    if not isinstance(corpus, Mapping):
        return ""
    target = str(corpus.get("_target_", "")).rpartition(".")[2]
    return str(corpus.get("name") or corpus.get("path") or target)


def _losses(path: Path, step: int) -> dict[str, float]:
    """The losses that a run logged last at or before a step."""
    run_dir = path.resolve().parent.parent
    found: dict[str, float] = {}
    if path.parent.name != "checkpoints":
        return found
    with suppress(RunError):  # what the weights began with is worth telling without the losses
        for each in read_evaluations(run_dir):
            if each.step <= step:
                found |= {name: each.metrics[name] for name in LOSSES if name in each.metrics}
    return found
