"""Rows of a table of texts: CSV, TSV, JSON lines, or plain lines; read one after the other."""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptpl.data.sources.base import utf8_lines
from gptpl.errors import InputError

FORMATS = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "lines"}
"""What a file is by the end of its name."""
KINDS = ", ".join(dict.fromkeys(FORMATS.values()))
LONGEST_FIELD = 1 << 24
"""Characters of a CSV field; csv's own limit of 131,072 is less than a long document has."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A text, not empty, and what it is ("": nobody asked); `line` of its file, from 1, is for messages."""

    text: str
    label: str
    line: int = field(default=0, compare=False)


@dataclass(frozen=True, kw_only=True)
class Table:
    """A file of texts.

    Args:
        path: the file.
        format: "csv" (RFC 4180: fields may be quoted), "tsv" (quotes are characters like others), "jsonl" (an
            object a line) or "lines" (each line is a text); None: by the end of the name, see `FORMATS`.
        columns: names of the columns of a CSV or TSV file without a header line; None: it has one.
        keys: what stands before the settings' names, as messages give them, such as "data.".
    """

    path: Path
    format: str | None = None
    columns: Sequence[str] | None = None
    keys: str = "data."

    def _kind(self) -> str:
        if self.format is None and self.path.suffix.lower() not in FORMATS:
            raise InputError(f"{self.path}: its name does not say what it is: give {self.keys}format={KINDS}")
        kind = self.format or FORMATS[self.path.suffix.lower()]
        if kind not in FORMATS.values():
            raise InputError(f"{self.keys}format={kind} is unknown: choose one of {KINDS}")
        return kind

    def rows(self, text_column: str, label_column: str | None = None) -> Iterator[Example]:
        """Every row in order. The labels of a file are all texts or all whole numbers, which become texts.

        Raises InputError, naming the line, for a column that is missing, an empty text or label, a broken
        row, labels of mixed types; for a file that `utf8_lines` does not read or that has no rows, and for an
        unknown format.
        """
        kind = self._kind()
        if label_column is not None and kind == "lines":
            raise InputError(f"{self.path} is plain lines without labels: give a CSV, TSV or JSONL file")
        columns = [text_column] if label_column is None else [text_column, label_column]
        line, label, label_type = 0, "", None
        with closing(utf8_lines(self.path)) as lines:  # the file too, whatever is wrong in it
            for line, fields in self._fields(lines, kind, columns):
                text = self._text(fields[text_column], text_column, line)
                if label_column is not None:
                    value = fields[label_column]
                    label = self._label(value, label_column, line)
                    if label_type not in (None, type(value)):
                        called = "whole numbers" if label_type is int else "texts"
                        raise self._wrong(
                            line, f"has {value!r} as label, before it {called}: make them of one type"
                        )
                    label_type = type(value)
                yield Example(text=text, label=label, line=line)
        if not line:
            raise InputError(f"{self.path} has no rows below its header: give a file with texts in it")

    def _fields(
        self, lines: Iterator[str], kind: str, wanted: Sequence[str]
    ) -> Iterator[tuple[int, Mapping[str, Any]]]:
        if kind == "lines":
            for number, line in enumerate(lines, start=1):
                yield number, {wanted[0]: line.rstrip("\r\n")}
        elif kind == "jsonl":
            yield from self._json_objects(lines, wanted)
        else:
            yield from self._separated(lines, kind, wanted)

    def _json_objects(
        self, lines: Iterator[str], wanted: Sequence[str]
    ) -> Iterator[tuple[int, Mapping[str, Any]]]:
        for number, line in enumerate(lines, start=1):
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = "it is empty" if line.isspace() else error
                raise self._wrong(number, f"is no JSON ({reason}): repair or remove the line") from error
            if not isinstance(fields, dict):
                raise self._wrong(number, "holds no JSON object: write one with the columns as its keys")
            if missing := [name for name in wanted if name not in fields]:
                raise self._wrong(number, self._lacks(missing, list(fields)))
            yield number, fields

    def _separated(
        self, lines: Iterator[str], kind: str, wanted: Sequence[str]
    ) -> Iterator[tuple[int, Mapping[str, Any]]]:
        csv.field_size_limit(LONGEST_FIELD)
        quoting: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == "tsv" else {}
        reader = csv.reader(lines, strict=True, **quoting)
        names = None if self.columns is None else self._checked_names(self.columns, wanted)
        line = 1
        try:
            for values in reader:
                if names is None:
                    names = self._checked_names(values, wanted)
                elif line == 1 and values == list(names):
                    raise self._wrong(line, f"has the names of {self.keys}columns: leave that setting out")
                elif values:  # csv gives nothing for an empty line
                    if len(values) != len(names):
                        remedy = "quote fields with commas" if kind == "csv" else "repair it"
                        raise self._wrong(line, f"has {len(values)} fields, not {len(names)}: {remedy}")
                    yield line, dict(zip(names, values, strict=True))
                line = reader.line_num + 1
        except csv.Error as error:
            remedy = f"repair its quotes, or give {self.keys}format=tsv"
            raise self._wrong(line, f"is no {kind.upper()} ({error}): {remedy}") from error

    def _checked_names(self, names: Sequence[str], wanted: Sequence[str]) -> Sequence[str]:
        if missing := [name for name in wanted if name not in names]:
            raise InputError(f"{self.path} {self._lacks(missing, names)}")
        if len(set(names)) != len(names):
            raise InputError(f"{self.path} names a column twice ({', '.join(names)}): rename one of them")
        return names

    def _lacks(self, missing: Sequence[str], there: Sequence[str]) -> str:
        shown = ", ".join(repr(name) for name in there[:8])
        if self._kind() == "jsonl":
            remedy = "add it there"
        else:
            remedy = f"name all of them in {self.keys}columns=[...] if there is no header line"
        return (
            f"lacks the column {missing[0]!r} (it has {shown}): set {self.keys}text_column and"
            f" {self.keys}label_column, or {remedy}"
        )

    def _text(self, value: Any, column: str, line: int) -> str:
        if not isinstance(value, str):
            raise self._wrong(line, f"has {value!r} in {column!r}, which is no text: write a text there")
        if not value or value.isspace():
            raise self._wrong(line, f"has an empty text in {column!r}: fill it in or remove the line")
        try:
            value.encode()
        except UnicodeEncodeError as error:  # what JSON's \ud800 gives
            raise self._wrong(line, f"has half a character in {column!r}: repair it") from error
        return value

    def _label(self, value: Any, column: str, line: int) -> str:
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise self._wrong(line, f"has {value!r} as label in {column!r}: give a text or a whole number")
        label = str(value)
        if not label or label.isspace():
            raise self._wrong(line, f"has an empty label in {column!r}: fill it in or remove the line")
        return label

    def _wrong(self, line: int, what: str) -> InputError:
        return InputError(f"{self.path}, line {line}, {what}")
