"""Answers of a model beside their references, read from JSON and checked."""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from gptpl.errors import InputError
from gptpl.text import shortened

log = logging.getLogger(__name__)

_REMEDY = "give a file that gptpl respond wrote"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One instruction with its reference, `output`, and a model's answer.

    `index` is its place in the file, from 0, `fields` the whole object there, more keys included.
    """

    index: int
    instruction: str
    input: str
    output: str
    model_response: str
    fields: dict[str, Any]

    @property
    def task(self) -> tuple[str, str]:
        """By what two files' entries are matched."""
        return self.instruction, self.input

    @property
    def name(self) -> str:
        """The entry, for messages: its number, from 1, and how its instruction begins."""
        return f"entry {self.index + 1} ({shortened(self.instruction, 60)!r})"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two models' answers to the same task."""

    first: Entry
    second: Entry


def read_responses(given: Path | str | Sequence[Mapping[str, Any]], *, key: str = "responses") -> list[Entry]:
    """The entries of a JSON file, or of a list: objects with `instruction`, `output` and `model_response`.

    `input` may be missing or null, which is an empty one. Entries with an empty answer, or with the same task
    as another, are kept, with a warning. `key` is the setting that named the file, for messages.

    Raises InputError for a file that is missing, not UTF-8, no JSON (NaN is none), no list or an empty one,
    and for an entry without a needed field, or with one that is no text.
    """
    name, data = key, given
    if isinstance(given, Path | str):
        name = f"{key}={given}"
        data = _parsed(Path(given).expanduser(), name)
    if not isinstance(data, list | tuple) or not data:
        kind = "holds an empty list" if data == [] else f"holds no list but {_kind(data)}"
        raise InputError(f"{name} {kind}: {_REMEDY}, a list of entries")
    entries = [_entry(index, fields, name) for index, fields in enumerate(data)]
    _warn_of_oddities(entries, name)
    return entries


def paired(first: Sequence[Entry], second: Sequence[Entry]) -> list[Pair]:
    """The entries of two files by their tasks, in the order of the first file; equal tasks in their order.

    Raises InputError for a task that only one file has, or has more often, or whose reference differs.
    """
    waiting: dict[tuple[str, str], list[Entry]] = {}
    for entry in second:
        waiting.setdefault(entry.task, []).append(entry)
    pairs = []
    for entry in first:
        others = waiting.get(entry.task)
        if not others:
            raise _unmatched(entry, "responses", "compare")
        pairs.append(Pair(first=entry, second=others.pop(0)))
    if left := [entry for others in waiting.values() for entry in others]:
        raise _unmatched(min(left, key=lambda entry: entry.index), "compare", "responses")
    for pair in pairs:
        if pair.first.output != pair.second.output:
            raise InputError(
                f"{pair.first.name} of responses= has another reference in compare=:"
                " give answers to one test set"
            )
    return pairs


def _unmatched(entry: Entry, where: str, other: str) -> InputError:
    return InputError(
        f"{entry.name} of {where}= has no partner in {other}=: give answers of two models to one test set"
    )


def _parsed(path: Path, name: str) -> Any:
    def refuse(constant: str) -> NoReturn:
        raise InputError(f"{name} holds {constant}, which is no JSON: give texts and finite numbers")

    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"), parse_constant=refuse)
    except OSError as error:
        raise InputError(f"{name} cannot be read ({error.strerror}): {_REMEDY}") from error
    except UnicodeDecodeError as error:
        byte = f"byte {error.start} is 0x{error.object[error.start]:02x}"
        raise InputError(f"{name} is not UTF-8 ({byte}): save it as UTF-8") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise InputError(f"{name} is no JSON ({error.msg}, {where}): {_REMEDY}") from error
    except InputError:
        raise
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
        raise InputError(f"{name} is no JSON that can be read ({error}): {_REMEDY}") from error


def _entry(index: int, fields: Any, name: str) -> Entry:
    where = f"{name}, entry {index + 1}"
    if not isinstance(fields, dict):
        raise InputError(f"{where} is {_kind(fields)}, not an object: {_REMEDY}")
    texts = {}
    for field in ("instruction", "input", "output", "model_response"):
        value = fields.get(field)
        if field == "input" and value is None:
            value = ""
        if field not in fields and value is None:
            raise InputError(f"{where} has no {field}: {_REMEDY}")
        if not isinstance(value, str):
            raise InputError(f"{where}: {field} is {_kind(value)}: give a text")
        texts[field] = value
    try:
        json.dumps(fields, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{where} holds half of a surrogate pair: give whole characters") from error
    return Entry(index=index, fields=fields, **texts)


def _warn_of_oddities(entries: Sequence[Entry], name: str) -> None:
    empty = [entry for entry in entries if not entry.model_response.strip()]
    if empty:
        log.warning(
            "%s: %d of %d answers are empty, the first is %s: they are judged as they are",
            *(name, len(empty), len(entries), empty[0].name),
        )
    counts = Counter(entry.task for entry in entries)
    again = [entry for entry in entries if counts[entry.task] > 1]
    if again:
        log.warning(
            "%s: %d entries share their instruction and input with another, the first is %s: each counts",
            *(name, len(again), again[0].name),
        )


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")
