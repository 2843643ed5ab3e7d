"""What a run needs beside weights and optimizer to go on as if it had never stopped; and whether it did."""

import hashlib
import random
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

RESUME_KEY = "gptpl_resume"
"""Where a checkpoint that can be resumed keeps the state of this module, as plain data and tensors."""


@dataclass(frozen=True, kw_only=True)
class Position:
    """A boundary between two optimizer steps: everything of the first is done, nothing of the second."""

    step: int
    """Optimizer steps finished since the run began."""
    epoch: int
    """The epoch that the last of them belongs to, from 0."""
    batch: int
    """Batches of that epoch that every rank has had; all of them where it ended the epoch."""
    tokens_seen: int
    """Training tokens of those steps, over all ranks."""

    def state(self) -> dict[str, int]:
        """As plain numbers."""
        return asdict(self)


def random_state(*, accelerators: bool = True) -> dict[str, Any]:
    """The state of every global random number generator, as plain data and tensors.

    Without `accelerators` theirs are left out, and nothing is done that would start CUDA.
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
    """Restores what `random_state` gave, as far as this machine has the devices."""
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
    """Lightning's loop counters (`checkpoint["loops"]`) as they have to be to go on at `position`.

    Lightning counts at several places of a step, and reads from the differences where it was interrupted. The
    counters of two such places are set here, wherever the checkpoint was written: between two batches of an
    epoch, and (`evaluate`) the same with an evaluation begun, which it then runs before the next batch.
    """
    done = {"ready": position.batch, "started": position.batch, "processed": position.batch}
    batches = {
        "current": {**done, "completed": position.batch},
        "total": {**done, "completed": position.batch},
    }
    epochs = dict.fromkeys(("ready", "started"), position.epoch + 1)
    epochs |= dict.fromkeys(("processed", "completed"), position.epoch)
    steps = dict.fromkeys(("ready", "completed"), position.step)
    zeros = dict.fromkeys(("ready", "started", "processed", "completed"), 0)
    begun = zeros | (dict.fromkeys(("ready", "started"), 1) if evaluate else {})
    fit = {
        **loops["fit_loop"],
        "epoch_progress": {"total": epochs, "current": dict(epochs)},
        "epoch_loop.state_dict": {"_batches_that_stepped": position.step},
        "epoch_loop.batch_progress": {**batches, "is_last_batch": False},
        "epoch_loop.scheduler_progress": {"total": steps, "current": dict(steps)},
        "epoch_loop.automatic_optimization.optim_progress": {
            "optimizer": {
                "step": {"total": steps, "current": dict(steps)},
                "zero_grad": {
                    "total": {**steps, "started": position.step},
                    "current": {**steps, "started": position.step},
                },
            }
        },
        "epoch_loop.val_loop.batch_progress": {"total": begun, "current": zeros, "is_last_batch": False},
    }
    return {**loops, "fit_loop": fit}


# --- whether two runs have come to the same state -------------------------------------------------------

_PATHS = ("dirpath", "best_model_path", "kth_best_model_path", "last_model_path", "best_k_models")
"""What callbacks keep of the run's folder, which is another one in every run."""


def state_digest(checkpoint: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of each part of a full checkpoint, as `read_checkpoint` gives it.

    Equal hashes mean equal bits: a tensor is hashed with its type and shape, a float by its eight bytes.
    """
    resume = checkpoint[RESUME_KEY]
    parts = {
        "weights": checkpoint["state_dict"],
        "optimizer": checkpoint["optimizer_states"],
        "schedule": checkpoint["lr_schedulers"],
        "random states": resume["random"],
        "position": {name: resume[name] for name in ("step", "epoch", "batch", "tokens_seen")},
        "callbacks": checkpoint["callbacks"],
    }
    return {name: digest(part) for name, part in parts.items()}


def digest(part: Any) -> str:
    """SHA-256 of plain data and tensors; the order of a mapping's keys does not matter."""
    sha256 = hashlib.sha256()
    _add(sha256, part)
    return sha256.hexdigest()


def _add(sha256: "hashlib._Hash", value: Any) -> None:
    """Adds a value to the hash, each kind under a name of its own so that 1, 1.0 and "1" differ."""
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
