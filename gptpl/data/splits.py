"""The splits of the data: names, sizes, equal texts in several of them, and files in a run's folder."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from gptpl.errors import InputError
from gptpl.files.durable import write_atomically
from gptpl.text import table

T = TypeVar("T")
Split = Literal["train", "val", "test"]
SPLITS: Mapping[Split, str] = {"train": "training", "val": "validation", "test": "test"}
"""The splits, and what reports call them."""
Duplicates = Literal["group", "remove", "keep"]
"""Examples of equal text: all in one split, all but one removed from the splits, or left where they are."""


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raise InputError unless the value is one of those of a Literal."""
    if value not in get_args(choices):
        raise InputError(f"{name}={value} is unknown: choose one of {', '.join(get_args(choices))}")


def check_ratios(**ratios: float) -> None:
    """Raise InputError unless `train_ratio` is positive, no other negative, and their sum below 1."""
    # 1e-9: 0.85 + 0.1 + 0.05 is 1.0, but not in every order.
    if not (ratios["train_ratio"] > 0 and min(ratios.values()) >= 0 and sum(ratios.values()) < 1 - 1e-9):
        given = ", ".join(f"data.{name}={ratio}" for name, ratio in ratios.items())
        raise InputError(
            f"{given} must lie between 0 and 1 and add up to less than 1: the rest is the last split"
        )


def homes(
    splits: Mapping[Split, Sequence[T]], key: Callable[[T], Hashable], precedence: Sequence[Split]
) -> dict[Split, list[Split]]:
    """For every example of every split: the first split in `precedence` that has one with an equal key."""
    home: dict[Hashable, Split] = {}
    return {name: [home.setdefault(key(each), name) for each in splits.get(name, ())] for name in precedence}


def split_file(run_dir: Path, split: Split, suffix: str) -> Path:
    """Where a run's folder keeps the examples of a split; the file may not exist."""
    return run_dir / "data" / f"{'validation' if split == 'val' else split}{suffix}"


def write_split(run_dir: Path, split: Split, suffix: str, content: str) -> None:
    """Keep the examples of a split in a run's folder."""
    path = split_file(run_dir, split, suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)


def batch_count(split: Split, examples: int, batch_size: int) -> int:
    """The batches of a split; training drops the last, short one."""
    return examples // batch_size if split == "train" else -(-examples // batch_size)


def split_table(splits: Iterable[Split], rows: Iterable[tuple[str, Sequence[int]]]) -> list[str]:
    """Numbers of the splits, a column each, in lines for a report."""
    cells = [["", *(SPLITS[split] for split in splits)]]
    cells += [[label, *(f"{number:,}" for number in numbers)] for label, numbers in rows]
    return table(cells, right=range(1, len(cells[0])))
