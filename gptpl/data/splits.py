"""The splits of the data: names, files in a run's folder, and which of them hold equal examples."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar

from gptpl.files.durable import write_atomically
from gptpl.text import table

T = TypeVar("T")
Split = Literal["train", "val", "test"]
SPLITS: Mapping[Split, str] = {"train": "training", "val": "validation", "test": "test"}
"""The splits, and how reports call them."""


def split_file(run_dir: Path, split: Split, suffix: str) -> Path:
    """Where a run's folder keeps the examples of a split; they may not be there."""
    return run_dir / "data" / f"{'validation' if split == 'val' else split}{suffix}"


def write_split(run_dir: Path, split: Split, suffix: str, content: str) -> None:
    """Keeps the examples of a split in a run's folder."""
    path = split_file(run_dir, split, suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)


def split_table(splits: Iterable[Split], rows: Iterable[tuple[str, Sequence[int]]]) -> list[str]:
    """Numbers of the splits, a column each, in lines for a report."""
    cells = [["", *(SPLITS[split] for split in splits)]]
    cells += [[label, *(f"{number:,}" for number in numbers)] for label, numbers in rows]
    return table(cells, right=range(1, len(cells[0])))


def homes(
    splits: Mapping[Split, Sequence[T]], key: Callable[[T], Hashable], precedence: Sequence[Split]
) -> dict[Split, list[Split]]:
    """For every example of every split: the first split in `precedence` that has one with an equal key."""
    home: dict[Hashable, Split] = {}
    return {name: [home.setdefault(key(each), name) for each in splits.get(name, ())] for name in precedence}
