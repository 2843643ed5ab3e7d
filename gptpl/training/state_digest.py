"""Hashes of the parts of a checkpoint, to tell whether two runs have come to the same state."""

import hashlib
import struct
from collections.abc import Mapping
from typing import Any

import torch

from gptpl.training.resume_state import RESUME_KEY

PATHS = ("dirpath", "best_model_path", "kth_best_model_path", "last_model_path", "best_k_models")
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
    """SHA-256 of plain data and tensors; the order of a mapping's keys plays no role."""
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
            if key not in PATHS:
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
