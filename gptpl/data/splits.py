"""The splits of the data: names, files in a run's folder, and which of them hold equal examples."""

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Literal

Split = Literal["train", "val", "test"]
SPLITS: Mapping[Split, str] = {"train": "training", "val": "validation", "test": "test"}
"""The splits, and how reports call them."""


def split_file(run_dir: Path, split: Split, suffix: str) -> Path:
    """Where a run's folder keeps the examples of a split; they may not be there."""
    return run_dir / "data" / f"{'validation' if split == 'val' else split}{suffix}"


def homes(keys: Mapping[Split, Sequence[Hashable]], precedence: Sequence[Split]) -> dict[Split, list[Split]]:
    """For every example of every split, by its key: the first split in `precedence` that has an equal one."""
    home: dict[Hashable, Split] = {}
    return {name: [home.setdefault(key, name) for key in keys.get(name, ())] for name in precedence}
