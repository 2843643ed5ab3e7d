"""What a run needs besides weights and optimizer to resume as if it had never stopped; and whether it did."""

import hashlib
import random
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

RESUME_KEY = "gptpl_resume"
"""The entry of a resumable checkpoint that holds this state, as plain data and tensors."""


@dataclass(frozen=True, kw_only=True)
class Position:
    """The boundary between an optimizer step that is finished and one that has not begun."""

    step: int
    """Optimizer steps finished since the run began."""
    epoch: int
    """The epoch of the last of them, from 0."""
    batch: int
    """Batches of that epoch that every rank has had; all of them if the step ended the epoch."""
    tokens_seen: int
    """Training tokens of all finished steps and ranks."""


def random_state(*, accelerators: bool = True) -> dict[str, Any]:
    """The states of all global random number generators, as plain data and tensors.

    Without `accelerators` theirs are left out, and CUDA is not initialised.
    """
    bits, keys, where, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002 (the global one)
    version, words, spare = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [str(bits), np.asarray(keys).tolist(), int(where), int(has_gauss), float(gauss)],
        "python": [version, list(words), spare],
    }
    if accelerators and torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if accelerators and torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore the states of `random_state`, as far as this machine has the devices."""
    torch.set_rng_state(state["torch"])
    bits, keys, where, has_gauss, gauss = state["numpy"]
    words = np.asarray(keys, dtype=np.uint32)
    np.random.set_state((bits, words, where, has_gauss, gauss))  # noqa: NPY002 (the global one)
    version, python_words, spare = state["python"]
    random.setstate((version, tuple(python_words), spare))
    for device, cuda_state in enumerate(state.get("cuda", [])[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda_state, device)
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])


def loops_at(loops: dict[str, Any], position: Position, *, evaluate: bool) -> dict[str, Any]:
    """Lightning's loop counters (`checkpoint["loops"]`) for resuming at `position`.

    Lightning counts at several places of a step, and tells from the differences where it was interrupted.
    These are the counters between two batches of an epoch, wherever the checkpoint was written; with
    `evaluate` those of an evaluation that has begun, which Lightning then runs before the next batch.
    """
    stages = ("ready", "started", "processed", "completed")
    step = dict.fromkeys(("ready", "completed"), position.step)
    epoch = dict(zip(stages, (position.epoch + 1,) * 2 + (position.epoch,) * 2, strict=True))
    none = dict.fromkeys(stages, 0)
    begun = none | (dict.fromkeys(("ready", "started"), 1) if evaluate else {})
    optimizer = {"step": _twice(step), "zero_grad": _twice({**step, "started": position.step})}
    fit = {
        **loops["fit_loop"],
        "epoch_progress": _twice(epoch),
        "epoch_loop.state_dict": {"_batches_that_stepped": position.step},
        "epoch_loop.batch_progress": {
            **_twice(dict.fromkeys(stages, position.batch)),
            "is_last_batch": False,
        },
        "epoch_loop.scheduler_progress": _twice(step),
        "epoch_loop.automatic_optimization.optim_progress": {"optimizer": optimizer},
        "epoch_loop.val_loop.batch_progress": {"total": begun, "current": none, "is_last_batch": False},
    }
    return {**loops, "fit_loop": fit}


def _twice(counts: dict[str, int]) -> dict[str, dict[str, int]]:
    return {"total": dict(counts), "current": dict(counts)}


def one_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state in torch's form, also where checkpoints have one of each of its parts.

    So those of optimizer=muon did, under the names `muon` and `adamw`. Any other is returned as it is.
    """
    if set(state) != {"muon", "adamw"}:
        return dict(state)
    joined: dict[str, Any] = {"state": {}, "param_groups": []}
    for part in (state["muon"], state["adamw"]):
        first = sum(len(group["params"]) for group in joined["param_groups"])
        joined["state"] |= {first + number: value for number, value in part["state"].items()}
        joined["param_groups"] += [
            {**group, "params": [first + number for number in group["params"]]}
            for group in part["param_groups"]
        ]
    return joined


# --- whether two runs are in the same state -------------------------------------------------------------

_PATHS = ("dirpath", "best_model_path", "kth_best_model_path", "last_model_path", "best_k_models")
"""Entries of callbacks that name the run's folder, which differs from run to run."""


def state_digest(checkpoint: Mapping[str, Any]) -> dict[str, str]:
    """The SHA-256 of each part of a full checkpoint, as `read_checkpoint` gives it; see `digest`."""
    resume = checkpoint[RESUME_KEY]
    parts = {
        "weights": checkpoint["state_dict"],
        "optimizer": [one_state(state) for state in checkpoint["optimizer_states"]],
        "schedule": checkpoint["lr_schedulers"],
        "random states": resume["random"],
        "position": {name: resume[name] for name in Position.__dataclass_fields__},
        "callbacks": checkpoint["callbacks"],
    }
    return {name: digest(part) for name, part in parts.items()}


def digest(part: Any) -> str:
    """The SHA-256 of plain data and tensors: equal for equal bits, whatever the order of a mapping's keys."""
    sha256 = hashlib.sha256()
    _add(sha256, part)
    return sha256.hexdigest()


def _add(sha256: "hashlib._Hash", value: Any) -> None:
    """Add a value to the hash; with its type, so that 1, 1.0 and "1" differ."""
    sha256.update(f"{type(value).__name__}:".encode())
    if isinstance(value, torch.Tensor):
        sha256.update(f"{value.dtype}{tuple(value.shape)}".encode())
        sha256.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            if key not in _PATHS:
                _add(sha256, key)
                _add(sha256, value[key])
        sha256.update(b"}")
    elif isinstance(value, list | tuple):
        for item in value:
            _add(sha256, item)
        sha256.update(b"]")
    elif isinstance(value, float):
        sha256.update(struct.pack("<d", value))
    else:
        sha256.update(f"{value!r};".encode())
