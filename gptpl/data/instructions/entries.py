"""Instructions with their answers: read from JSON or JSON Lines, split, and kept in a run's folder."""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

from gptpl.data.sources.base import read_utf8
from gptpl.data.splits import SPLITS, Split, homes, write_split
from gptpl.errors import InputError

Duplicates = Literal["remove", "group", "keep"]
_PRECEDENCE: tuple[Split, ...] = ("train", "test", "val")
"""Where a question that several splits hold belongs: to the first of these."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What is asked, what it is asked about (may be empty), and the right answer."""

    instruction: str
    input: str
    output: str

    @property
    def question(self) -> tuple[str, str]:
        """Instruction and input, white space aside: what makes two entries ask the same."""
        return " ".join(self.instruction.split()), " ".join(self.input.split())


@dataclass(frozen=True, kw_only=True)
class PlacedRecord:
    """One object of a file, and how an error message calls it: "F, entry 3", or "F, line 3"."""

    place: str
    fields: Mapping[str, Any]

    def text(self, key: str, *, may_be_empty: bool = False) -> str:
        """The value of a key. Raises InputError for a missing one, another type, and only white space."""
        if key not in self.fields:
            keys = ", ".join(map(repr, self.fields)) or "nothing"
            raise InputError(f"{self.place} has no {key!r}, only {keys}: add it, or name the right key")
        value = self.fields[key]
        if not isinstance(value, str):
            raise InputError(f"{self.place}: {key!r} is {_shown(value)}, no text: put it in quotes")
        if not may_be_empty and not value.strip():
            raise InputError(f"{self.place}: {key!r} is empty: fill it in, or remove the entry")
        return value


def read_entries(
    path: Path, *, instruction: str = "instruction", input: str | None = "input", output: str = "output"
) -> list[Entry]:
    """Every entry of a file, in order, by the keys of its parts; no entry has an input where that is None.

    Raises InputError, naming the entry or the line: as `read_records`, for a missing key, a value that is no
    text, an empty instruction, and an empty answer.
    """
    return [
        Entry(
            instruction=record.text(instruction),
            input="" if input is None else record.text(input, may_be_empty=True),
            output=record.text(output),
        )
        for record in read_records(path)
    ]


def read_records(path: Path) -> list[PlacedRecord]:
    """Every object of a JSON list, or of JSON Lines (an object a line; blank lines are passed over).

    Raises InputError for a file that is no UTF-8 text (see `read_utf8`), broken JSON (NaN is none), anything
    but objects, half of a surrogate pair, which no file could take, and for none at all.
    """
    text = read_utf8(path)
    if text.lstrip().startswith("["):
        values = enumerate(_loaded(text, path), 1)
        records = [_placed(f"{path}, entry {number}", value) for number, value in values]
    else:
        # Not splitlines(): a text may hold characters, such as U+2028, that it takes for line ends.
        lines = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
        records = [_placed(f"{path}, line {number}", _loaded(line, path, number)) for number, line in lines]
    if not records:
        raise InputError(f"{path} holds no entry: give a list of objects, or one object a line")
    return records


def _loaded(text: str, path: Path, line: int | None = None) -> Any:
    """The value of a JSON text, a whole file or a line of one."""
    place = f"{path}" if line is None else f"{path}, line {line}"

    def refuse(constant: str) -> NoReturn:
        raise InputError(f"{place} holds {constant}, which is no JSON: give a text or a finite number")

    try:
        return json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        said = f"broken JSON ({error.msg} at character {error.colno})"
        remedy = "mend it" if line is None else "give a list of objects in brackets, or one object a line"
        raise InputError(f"{path}, line {line or error.lineno}: {said}: {remedy}") from error
    except InputError:
        raise
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
        raise InputError(f"{place} is no JSON that can be read ({error}): mend it") from error


def _placed(place: str, value: Any) -> PlacedRecord:
    if not isinstance(value, dict):
        raise InputError(f"{place} is {_shown(value)}, no object: give {{'instruction': ..., ...}}")
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{place} holds half of a surrogate pair: give whole characters") from error
    return PlacedRecord(place=place, fields=value)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."


# --- splits ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class InstructionSplits:
    """The entries of each split, in order; `shared` of them ask what a split of higher precedence asks."""

    train: list[Entry]
    val: list[Entry]
    test: list[Entry]
    shared: int

    def of(self, split: Split) -> list[Entry]:
        """The entries of one split."""
        return {"train": self.train, "val": self.val, "test": self.test}[split]


def split_entries(
    entries: Sequence[Entry],
    *,
    train_share: float = 0.85,
    test_share: float = 0.1,
    shuffle_seed: int | None = None,
    duplicates: Duplicates = "remove",
) -> InstructionSplits:
    """The first entries to train on, the next to test on, the rest to validate on, as the book does.

    Shares are rounded down; without a test share there is no test. `shuffle_seed` decides the order before
    the cut; None: that of the file. `duplicates` says what becomes of an entry whose question (see
    `Entry.question`) an other split has too; training comes before test, test before validation. "remove":
    the later split loses it; "group": it joins the others; "keep": it stays, and the later split is a little
    too easy.

    Raises InputError for shares or entries that leave a split empty, and for an unknown `duplicates`.
    """
    # 1e-9: 0.85 + 0.1 + 0.05 is 1.0, but not in every order.
    if not (0 < train_share < 1 and 0 <= test_share < 1 and train_share + test_share < 1 - 1e-9):
        raise InputError(
            f"data.train_share={train_share} and data.test_share={test_share} leave nothing to validate on:"
            " give shares that add up to less than 1, such as 0.85 and 0.1"
        )
    if duplicates not in get_args(Duplicates):
        raise InputError(
            f"data.duplicates={duplicates} is unknown: choose one of {', '.join(get_args(Duplicates))}"
        )
    order = list(entries)
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(order)
    # int() of the product, as in the book: its 1,100 entries are 935, 110 and 55.
    n_train, n_test = int(len(order) * train_share), int(len(order) * test_share)
    cut: dict[Split, list[Entry]] = {
        "train": order[:n_train],
        "test": order[n_train : n_train + n_test],
        "val": order[n_train + n_test :],
    }
    splits: dict[Split, list[Entry]] = {name: [] for name in cut}
    shared = 0
    for name, home in homes(cut, lambda entry: entry.question, _PRECEDENCE).items():
        for entry, where in zip(cut[name], home, strict=True):
            shared += where != name
            if where == name or duplicates != "remove":
                splits[name if duplicates == "keep" else where].append(entry)
    for split in ("train", "val"):
        if not splits[split]:
            raise InputError(
                f"{len(order)} entries leave none for {SPLITS[split]}: give more entries, or change"
                f" data.train_share={train_share}, data.test_share={test_share} or"
                f" data.duplicates={duplicates}"
            )
    return InstructionSplits(**splits, shared=shared)


def write_entries(run_dir: Path, splits: InstructionSplits) -> None:
    """Writes `data/train.json`, `data/validation.json` and, where there is one, `data/test.json`.

    Each is a list of objects with `instruction`, `input` and `output`.
    """
    for split in SPLITS:
        if entries := splits.of(split):
            records = [asdict(entry) for entry in entries]
            write_split(run_dir, split, ".json", json.dumps(records, ensure_ascii=False, indent=2) + "\n")
