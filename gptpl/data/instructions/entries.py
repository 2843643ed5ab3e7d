"""Instructions with their answers, read from JSON or JSON Lines."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from gptpl.data.corpora.reading import read_utf8
from gptpl.errors import InputError


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

    def record(self) -> dict[str, str]:
        """As in the book's files."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The keys of an entry in a file; `input` is None where no entry has any."""

    instruction: str = "instruction"
    input: str | None = "input"
    output: str = "output"


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


def read_entries(path: Path, columns: Columns = Columns()) -> list[Entry]:
    """Every entry of a file, in order; its keys are `columns`, others are left aside.

    Raises InputError, naming the entry or the line: as `read_records`, for a missing key, a value that is no
    text, an empty instruction, and an empty answer.
    """
    entries = []
    for record in read_records(path):
        entry = Entry(
            instruction=record.text(columns.instruction),
            input="" if columns.input is None else record.text(columns.input, may_be_empty=True),
            output=record.text(columns.output),
        )
        entries.append(entry)
    return entries


def read_records(path: Path) -> list[PlacedRecord]:
    """Every object of a JSON list, or of JSON Lines (an object a line; blank lines are passed over).

    Raises InputError for a file that is no UTF-8 text (see `read_utf8`), broken JSON (NaN is none), anything
    but objects, half of a surrogate pair, which no file could take, and for none at all.
    """
    text = read_utf8(path)
    records = list(_listed(path, text) if text.lstrip().startswith("[") else _lines(path, text))
    if not records:
        raise InputError(f"{path} holds no entry: give a list of objects, or one object a line")
    return records


def _listed(path: Path, text: str) -> Iterator[PlacedRecord]:
    try:
        values = _loaded(text, str(path))
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}, line {error.lineno}: broken JSON ({error.msg} at character {error.colno}): mend it"
        ) from error
    for number, value in enumerate(values, 1):
        yield _placed(f"{path}, entry {number}", value)


def _lines(path: Path, text: str) -> Iterator[PlacedRecord]:
    # Not splitlines(): a text may hold characters, such as U+2028, that it takes for line ends.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            value = _loaded(line, place)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{place}: broken JSON ({error.msg} at character {error.colno}): give a list of objects in"
                " brackets, or one object a line"
            ) from error
        yield _placed(place, value)


def _loaded(text: str, place: str) -> Any:
    """The value of a JSON text. Raises json.JSONDecodeError, and InputError for what only Python takes."""

    def refuse(constant: str) -> NoReturn:
        raise InputError(f"{place} holds {constant}, which is no JSON: give a text or a finite number")

    try:
        return json.loads(text, parse_constant=refuse)
    except (json.JSONDecodeError, InputError):
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
