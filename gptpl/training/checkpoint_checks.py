"""What a checkpoint must hold before anything is made of it: entries of the right kind, one by one.

A file may be damaged, or made by anybody: what reads its entries later may rely on this.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any

import torch

from gptpl.errors import InputError
from gptpl.files.plain import tensors_in
from gptpl.model.lora import low_rank_layers

Kind = type | UnionType


@dataclass(frozen=True)
class _Entry:
    """A value's kind, its smallest value if it is a number, and whether it has to be there."""

    kind: Kind
    least: float | None = None
    needed: bool = True


_TEXT, _COUNT, _STEP = _Entry(str), _Entry(int, 1), _Entry(int, 0)
_CHECKPOINT = {"state_dict": _Entry(dict), "global_step": _Entry(int, 0, needed=False)}
_HEADER = {
    **dict.fromkeys(("model", "tokenizer", "config"), _Entry(dict)),
    **dict.fromkeys(("start", "lineage", "tune", "task"), _Entry(dict, needed=False)),
    **dict.fromkeys(("tokens_seen", "global_batch"), _Entry(int, 0, needed=False)),
    "data_sha256": _Entry(str, needed=False),
}
_LINEAGE = {
    "step": _STEP,
    "start": _Entry(dict),
    "tokens_seen": _Entry(int, 0, needed=False),
    **dict.fromkeys(("data", "losses"), _Entry(dict, needed=False)),
}
_LORA = {"rank": _COUNT, "alpha": _Entry(int | float)}
_CLASSIFIER = {
    "labels": _Entry(list),
    "pooling": _TEXT,
    "head_bias": _Entry(bool),
    "max_length": _COUNT,
    "padded_to": _Entry(int | None, 1),
}
_RESUMABLE = {
    "tokens_seen": _STEP,
    "data_sha256": _TEXT,
    "world_size": _COUNT,
    "total_steps": _COUNT,
    "lr_ceiling": _Entry(int | float | None, needed=False),
}


def check_entries(checkpoint: Mapping[str, Any], header: Mapping[str, Any], path: Path) -> None:
    """Raises InputError that names the first entry that is missing or of another kind than gptpl writes."""
    _check(checkpoint, _CHECKPOINT, "", path)
    if tensors_in(header):
        raise _damaged("header", "no plain data", path)
    _check(header, _HEADER, "", path)
    task, tune = header.get("task"), header.get("tune")
    if "lineage" in header:
        _check(header["lineage"], _LINEAGE, "lineage.", path)
    if task is not None:
        _check(task, {"name": _TEXT}, "task.", path)
    if tune is not None:
        _check(tune, {"name": _TEXT, **(_LORA if tune.get("name") == "lora" else {})}, "tune.", path)
    _check_weights(checkpoint["state_dict"], path)


def check_classifier_task(task: Mapping[str, Any], path: Path) -> None:
    """The same of what a classifier's checkpoint says of its task."""
    _check(task, _CLASSIFIER, "task.", path)
    if not all(isinstance(label, str) for label in task["labels"]):
        raise _damaged("task.labels", "of another kind", path)


def check_training_state(header: Mapping[str, Any], state: Any, path: Path) -> None:
    """The same of what a run goes on from; `state` is what the checkpoint has of its position."""
    _check(header, _RESUMABLE, "", path)
    if not isinstance(state, Mapping):
        raise _damaged("state of its training", "of another kind", path)
    _check(state, {"step": _STEP}, "", path)


def _check(found: Mapping[str, Any], entries: Mapping[str, _Entry], place: str, path: Path) -> None:
    for name, entry in entries.items():
        if name not in found:
            if entry.needed:
                raise _damaged(f"{place}{name}", "missing", path)
            continue
        value = found[name]
        if not isinstance(value, entry.kind) or (isinstance(value, bool) and entry.kind is not bool):
            raise _damaged(f"{place}{name}", "of another kind", path)
        if entry.least is not None and isinstance(value, int | float) and value < entry.least:
            raise _damaged(f"{place}{name}", f"below {entry.least}", path)


def _check_weights(weights: Mapping[Any, Any], path: Path) -> None:
    for name, tensor in weights.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise _damaged(f"weight {name!r:.80}", "no tensor", path)
    # Before the small matrices are multiplied: their product may be larger than any file.
    for layer in low_rank_layers(weights):
        shapes = [
            tuple(weights[f"{layer}.{part}"].shape) if f"{layer}.{part}" in weights else ()
            for part in ("weight", "lora_A", "lora_B")
        ]
        (outputs, inputs), first, second = shapes[0] if len(shapes[0]) == 2 else (0, 0), *shapes[1:]
        if len(second) != 2 or first != (second[1], inputs) or second[0] != outputs:
            raise _damaged(f"weight {layer!r:.80}", "of another shape than its low-rank matrices", path)


def _damaged(entry: str, what: str, path: Path) -> InputError:
    if what == "missing":
        return InputError(f"checkpoint={path} holds no {entry} (it is damaged): use another checkpoint")
    return InputError(f"checkpoint={path} is damaged ({entry} is {what}): use another checkpoint")
