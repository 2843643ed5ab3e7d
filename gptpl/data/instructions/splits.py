"""Instructions with their answers: read from JSON or JSON Lines, split, and kept in a run's folder."""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from gptpl.data.sources.records import Record, read_records
from gptpl.data.splits import (
    SPLITS,
    Duplicates,
    Split,
    check_choice,
    check_ratios,
    homes,
    write_split,
)
from gptpl.errors import InputError

Precedence = Literal["test", "train"]
_ORDERS: dict[Precedence, tuple[Split, ...]] = {
    "test": ("test", "val", "train"),
    "train": ("train", "test", "val"),
}


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """What is asked, what it is asked about (may be empty), and the reference answer."""

    instruction: str
    input: str
    output: str

    @property
    def question(self) -> tuple[str, str]:
        """Instruction and input, by which duplicates are found."""
        return _normalised(self.instruction), _normalised(self.input)


def _normalised(text: str) -> str:
    """The text with single spaces for all white space: questions count as equal by that."""
    return " ".join(text.split())


def read_instructions(
    path: Path, *, instruction: str = "instruction", input: str | None = "input", output: str = "output"
) -> list[Instruction]:
    """Every record of a file, in order, by the keys of its parts; no input is read where that is None.

    Raises InputError as `read_records`, for a missing key, a value that is not a text, an empty instruction
    and an empty answer.
    """
    return [
        Instruction(
            **question_of(record, instruction=instruction, input=input, keys="data."),
            output=record.text(output, "set data.output_column to the key of the answer"),
        )
        for record in read_records(path)
    ]


def question_of(record: Record, *, instruction: str, input: str | None, keys: str = "") -> dict[str, str]:
    """A record's `instruction` and `input` ("" where its key is None), as `read_instructions` reads them.

    `keys` stands before the names of the settings in messages.
    """
    remedy = f"set {keys}instruction_column to the key of the question"
    no_input = f"set {keys}input_column to another key, or to null where there is none"
    return {
        "instruction": record.text(instruction, remedy),
        "input": "" if input is None else record.text(input, no_input, may_be_empty=True),
    }


@dataclass(frozen=True, kw_only=True)
class InstructionSplits:
    """The instructions of each split, in order; `shared` of them have the question of a preceding split."""

    train: list[Instruction]
    val: list[Instruction]
    test: list[Instruction]
    shared: int
    read: int

    def of(self, split: Split) -> list[Instruction]:
        """The instructions of one split."""
        return {"train": self.train, "val": self.val, "test": self.test}[split]


def split_instructions(
    instructions: Sequence[Instruction],
    *,
    train_ratio: float = 0.85,
    test_ratio: float = 0.1,
    shuffle_seed: int | None = None,
    duplicates: Duplicates = "remove",
    precedence: Precedence = "test",
) -> InstructionSplits:
    """Cut instructions in three: the first to train on, the next for the test, the rest for validation.

    This is the book's split; counts are rounded down. `shuffle_seed` decides the order before the cut; None:
    that of the file. With `duplicates` "remove", training loses the questions of validation and test, and
    validation those of the test, which stays as it was cut; "group" moves them there; "keep" leaves them,
    and validation and test are a little too easy. `precedence` "train" is the order of older runs: training,
    test, validation.

    Raises InputError for ratios or instructions that leave a split empty, and for an unknown choice.
    """
    check_ratios(train_ratio=train_ratio, test_ratio=test_ratio)
    check_choice("data.duplicates", duplicates, Duplicates)
    check_choice("data.precedence", precedence, Precedence)
    order = list(instructions)
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(order)
    # int() of the product, as in the book: its 1,100 entries are 935, 110 and 55.
    n_train, n_test = int(len(order) * train_ratio), int(len(order) * test_ratio)
    cut: dict[Split, list[Instruction]] = {
        "train": order[:n_train],
        "test": order[n_train : n_train + n_test],
        "val": order[n_train + n_test :],
    }
    splits: dict[Split, list[Instruction]] = {name: [] for name in cut}
    shared = 0
    for name, home in homes(cut, lambda each: each.question, _ORDERS[precedence]).items():
        for each, where in zip(cut[name], home, strict=True):
            shared += where != name
            if where == name or duplicates != "remove":
                splits[name if duplicates == "keep" else where].append(each)
    for split in ("train", "val"):
        if not splits[split]:
            raise InputError(
                f"{len(order)} instructions leave none for {SPLITS[split]}: give more, or change"
                f" data.train_ratio={train_ratio}, data.test_ratio={test_ratio} or"
                f" data.duplicates={duplicates}"
            )
    return InstructionSplits(**splits, shared=shared, read=len(order))


def write_splits(run_dir: Path, splits: InstructionSplits) -> None:
    """Write `data/train.json`, `validation.json` and, where there is one, `test.json`: lists of objects."""
    for split in SPLITS:
        if own := splits.of(split):
            records = [asdict(each) for each in own]
            write_split(run_dir, split, ".json", json.dumps(records, ensure_ascii=False, indent=2) + "\n")
