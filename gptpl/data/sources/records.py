"""Records of text: JSON, JSON Lines, CSV, TSV or plain lines, read strictly, one by one; labelled texts."""

import csv
import hashlib
import json
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from gptpl.data.sources.base import read_utf8, utf8_lines
from gptpl.errors import InputError
from gptpl.files.download import cache_dir, download, file_name
from gptpl.files.durable import record_file, sha256_of, write_atomically
from gptpl.files.plain import parse_json
from gptpl.settings import FREE
from gptpl.text import shortened

JSON_LINES = (".jsonl", ".ndjson")
FORMATS = {".csv": "csv", ".tsv": "tsv", **dict.fromkeys(JSON_LINES, "jsonl"), ".txt": "lines"}
"""The format of a file by its suffix."""
KINDS = ", ".join(dict.fromkeys(FORMATS.values()))
LONGEST_FIELD = 1 << 24
"""Characters of a CSV field; csv's own limit of 131,072 is less than a long document has."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """Named values; `place` is what messages call it, "F, entry 3" or "F, line 3", and `number` the 3."""

    place: str
    number: int
    fields: Mapping[str, Any]

    def value(self, key: str, remedy: str = "name another key") -> Any:
        """The value of a key. Raises InputError where there is no such key."""
        if key not in self.fields:
            there = ", ".join(map(repr, list(self.fields)[:8])) or "nothing"
            raise InputError(f"{self.place} has no {key!r} (it has {there}): add it, or {remedy}")
        return self.fields[key]

    def text(self, key: str, remedy: str = "name another key", *, may_be_empty: bool = False) -> str:
        """The text of a key. Raises InputError for a missing key, another type, and white space alone."""
        value = self.value(key, remedy)
        if not isinstance(value, str):
            raise InputError(f"{self.place}: {key!r} must be a text, got {shortened(repr(value), 40)}")
        if not may_be_empty and (not value or value.isspace()):
            raise InputError(f"{self.place}: {key!r} is empty: fill it in or remove the record")
        return value


def read_records(path: Path) -> list[Record]:
    """Every object of a JSON list, or of JSON Lines.

    Raises InputError for a file that `read_utf8` or `parse_json` refuses, for anything but objects, and
    where there are none.
    """
    text = read_utf8(path)
    if text.lstrip().startswith("["):
        values = enumerate(parse_json(text, str(path)), 1)
        records = [_record(value, f"{path}, entry", number) for number, value in values]
    else:
        _refuse_wrapped(text, path)
        # Not splitlines(): a text may hold characters, such as U+2028, that it takes for line ends.
        records = list(json_lines(text.split("\n"), path))
    if not records:
        raise InputError(f"{path} holds no records: give a list of objects, or one object a line")
    return records


def _refuse_wrapped(text: str, path: Path) -> None:
    """Raise InputError for one object around the list of records, such as `{"data": [...]}`.

    An object on one line with a text in it may be a record that has a list, too.
    """
    try:
        whole = parse_json(text, str(path))
    except InputError:
        return  # JSON Lines, or an error that `json_lines` reports with its line number
    values = list(whole.values()) if isinstance(whole, dict) else []
    is_record = "\n" not in text.strip() and any(isinstance(value, str) for value in values)
    has_records = any(isinstance(value, list) and value and isinstance(value[0], dict) for value in values)
    if has_records and not is_record:
        keys = ", ".join(map(repr, whole))
        raise InputError(f"{path} is one object ({shortened(keys, 40)}): give the list of records alone")


def json_lines(lines: Iterable[str], path: Path) -> Iterator[Record]:
    """The object of each line; blank lines are skipped. Raises InputError as `read_records`."""
    for number, line in enumerate(lines, 1):
        if line and not line.isspace():
            yield json_line(line, path, number)


def json_line(line: str, path: Path, number: int) -> Record:
    """The object of a line, numbered from 1. Raises InputError as `read_records`."""
    return _record(parse_json(line.strip(), f"{path}, line {number}"), f"{path}, line", number)


def _record(value: Any, where: str, number: int) -> Record:
    if not isinstance(value, dict):
        raise InputError(f"{where} {number} must be a JSON object, got {shortened(repr(value), 40)}")
    return Record(place=f"{where} {number}", number=number, fields=value)


# --- tables of texts ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Example:
    """A text, not empty, and its label ("": none asked for); `line` of its file, from 1, is for messages."""

    text: str
    label: str
    line: int = field(default=0, compare=False)


def text_rows(
    path: Path,
    text_column: str,
    label_column: str | None = None,
    *,
    format: str | None = None,
    columns: Sequence[str] | None = None,
    keys: str = "data.",
) -> Generator[Example]:
    """Yield the rows of a file of texts, in order. Labels are all strings or all integers, read as strings.

    Args:
        path: the file.
        text_column: name of a column, or a key.
        label_column: the same; None: no label is read.
        format: "csv" (RFC 4180: fields may be quoted), "tsv" (quotes are ordinary characters), "jsonl" (an
            object a line) or "lines" (each line is a text); None: by the suffix, see `FORMATS`.
        columns: names of the columns of a CSV or TSV file without a header line; None: it has one.
        keys: prefix of the settings in messages, such as "data.".

    Raises InputError, which names the line, for a missing column, an empty text or label, a broken row,
    labels of mixed types; for a file that `utf8_lines` refuses or that has no rows, and for an unknown
    format.
    """
    kind = format or FORMATS.get(path.suffix.lower())
    if kind is None or kind not in FORMATS.values():
        what = f"{path} has an unknown suffix" if kind is None else f"{keys}format={kind} is unknown"
        raise InputError(f"{what}: set {keys}format to one of {KINDS}")
    if label_column is not None and kind == "lines":
        raise InputError(f"{path} is plain lines without labels: give a CSV, TSV or JSONL file")
    remedy = f"set {keys}text_column"
    if label_column is not None:
        remedy += f" and {keys}label_column"
    if kind in ("csv", "tsv"):
        remedy += f", or {keys}columns=[...] if there is no header line"
    record, label, label_type = None, "", None
    with closing(utf8_lines(path)) as lines:  # closes the file, too, whatever is wrong in it
        if kind == "jsonl":
            records = json_lines(lines, path)
        elif kind == "lines":
            texts = ({text_column: line.rstrip("\r\n")} for line in lines)
            records = (_record(text, f"{path}, line", n) for n, text in enumerate(texts, start=1))
        else:
            records = _separated(lines, path, kind, columns, keys)
        for record in records:
            text = record.text(text_column, remedy)
            if label_column is not None:
                value = record.value(label_column, remedy)
                whole = isinstance(value, int) and not isinstance(value, bool)
                label = str(value) if whole else record.text(label_column)
                if label_type not in (None, type(value)):
                    raise InputError(
                        f"{record.place}: the label {value!r} is of another type than those before it:"
                        " give only texts, or only whole numbers"
                    )
                label_type = type(value)
            yield Example(text=text, label=label, line=record.number)
    if record is None:
        raise InputError(f"{path} has no rows below its header: give a file with texts in it")


def _separated(
    lines: Iterator[str], path: Path, kind: str, names: Sequence[str] | None, keys: str
) -> Iterator[Record]:
    csv.field_size_limit(LONGEST_FIELD)
    quoting: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == "tsv" else {}
    reader, line = csv.reader(lines, strict=True, **quoting), 1
    if names is not None and len(set(names)) != len(names):
        raise InputError(f"{keys}columns must be different names, got {', '.join(names)}")
    try:
        for values in reader:
            if names is None:
                names = values
                if len(set(names)) != len(names):
                    raise InputError(f"{path} names a column twice ({', '.join(names)}): rename one")
            elif line == 1 and values == list(names):
                raise InputError(f"{path} has a header line: leave {keys}columns out")
            elif values:  # csv gives nothing for an empty line
                if len(values) != len(names):
                    raise InputError(
                        f"{path}, line {line} has {len(values)} fields, not {len(names)}: repair it"
                        + ", or quote fields with commas" * (kind == "csv")
                    )
                yield _record(dict(zip(names, values, strict=True)), f"{path}, line", line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(
            f"{path}, line {line} is not valid {kind.upper()} ({error}): repair its quotes, or set"
            f" {keys}format=tsv"
        ) from error


# --- labelled texts -------------------------------------------------------------------------------------

WHOLE = "all"
"""In place of a split's name: a table that is still to be split."""
_MOST_BYTES = 1 << 24
"""Read of a file in an archive, which can claim to hold terabytes."""


class LabelledCorpus(ABC):
    """Texts with a label each. `name` is what reports call it."""

    name: str

    @abstractmethod
    def examples(self) -> dict[str, list[Example]]:
        """The examples in order, under `WHOLE` or under the name of each split.

        Raises InputError where there are none, and as `text_rows`.
        """

    def check_path(self) -> None:  # noqa: B027  # most need none
        """See `gptpl.data.sources.Corpus.check_path`."""

    def content_sha256(self) -> str:
        """Hash of the texts and labels. Raises InputError as `examples`."""
        digest = hashlib.sha256()
        for name, examples in self.examples().items():
            lines = [json.dumps([name, example.label, example.text]) for example in examples]
            digest.update("\n".join(lines).encode())
        return digest.hexdigest()


@dataclass(kw_only=True, eq=False)
class LabelledFiles(LabelledCorpus):
    """The user's own CSV, TSV or JSONL: one file that is to be split, or a file for each split.

    Args:
        path: the one file.
        train_path, val_path, test_path: a file for each instead; the test is optional.
        text_column, label_column: names of the columns, or keys.
        format, columns: see `text_rows`.
        name: what reports call it.
    """

    path: Annotated[str | None, FREE] = None
    train_path: Annotated[str | None, FREE] = None
    val_path: Annotated[str | None, FREE] = None
    test_path: Annotated[str | None, FREE] = None
    text_column: Annotated[str, FREE] = "text"
    label_column: Annotated[str, FREE] = "label"
    format: Annotated[str | None, FREE] = None
    columns: Annotated[Sequence[str] | None, FREE] = None
    name: str = "labelled"

    def __post_init__(self) -> None:
        if self.text_column == self.label_column:
            raise InputError(
                f"data.text_column and data.label_column are both {self.text_column!r}: name two"
            )

    def examples(self) -> dict[str, list[Example]]:
        """The rows of the files. Raises InputError also where not those that belong together are set."""
        return {split: list(rows) for split, rows in self._rows().items()}

    def check_path(self) -> None:
        """Raise InputError as `examples` does, as far as the first row of each file tells."""
        for rows in self._rows().values():
            with closing(rows):
                next(rows)

    def _rows(self) -> dict[str, Generator[Example]]:
        given = {WHOLE: self.path, "train": self.train_path, "val": self.val_path, "test": self.test_path}
        paths = {split: Path(each).expanduser() for split, each in given.items() if each}
        if not paths:
            raise InputError("data.path is not set: give data.path=FILE, a labelled CSV, TSV or JSONL file")
        if WHOLE in paths and len(paths) > 1:
            _, other, *_ = paths
            raise InputError(f"data.path and data.{other}_path are both set: give one")
        for split in () if WHOLE in paths else ("train", "val"):
            if split not in paths:
                raise InputError(f"data.{split}_path is not set: give it, or one file as data.path")
        return {
            split: text_rows(
                path, self.text_column, self.label_column, format=self.format, columns=self.columns
            )
            for split, path in paths.items()
        }


@dataclass(kw_only=True, eq=False)
class SmsSpam(LabelledCorpus):
    """The SMS Spam Collection (Almeida, Gomez Hidalgo, Yamakami 2011): 5,574 messages, "ham" or "spam".

    `path` is a copy of the file `SMSSpamCollection`; None: it is downloaded once, as the `member` of the zip
    archive at `url` with the published hash `sha256`.
    """

    name = "sms_spam"
    path: Annotated[str | None, FREE] = None
    url: str
    member: str
    sha256: str

    def examples(self) -> dict[str, list[Example]]:
        """All messages. Raises InputError for a wrong file, or where it cannot be downloaded."""
        path = Path(self.path).expanduser() if self.path else self._extracted()
        # Quotes are characters of the messages: read as CSV, two of the lines are lost.
        rows = text_rows(path, "text", "label", format="tsv", columns=("label", "text"))
        try:
            return {WHOLE: list(rows)}
        except InputError as error:
            if not self.path:
                raise
            remedy = f"; if it is not a copy of {self.member} but a file of your own, choose data=labelled"
            raise InputError(f"{error}{remedy}") from error

    def check_path(self) -> None:
        """Raise InputError for a wrong file; nothing is downloaded."""
        if self.path:
            self.examples()

    def _extracted(self) -> Path:
        path = cache_dir() / file_name(PurePosixPath(self.member).name)
        if path.is_file() and sha256_of(path) == self.sha256:
            return path
        # Nobody publishes a hash of the archive; the file in it has one.
        archive = download(self.url, sha256=None, filename=f"{self.name}.zip")
        cause: Exception | None = None
        try:
            with zipfile.ZipFile(archive) as opened, opened.open(self.member) as member:
                content = member.read(_MOST_BYTES)
            if (actual := hashlib.sha256(content).hexdigest()) == self.sha256:
                write_atomically(path, content)
                return path
            what = f"holds {self.member} with SHA-256 {actual}, not {self.sha256}"
        # Damaged, without the member, encrypted or packed in an unknown way, or with wrong bytes in it.
        except (zipfile.BadZipFile, KeyError, RuntimeError, EOFError, ValueError, zlib.error) as error:
            what, cause = f"is not an archive with {self.member} in it", error
        for useless in (archive, record_file(archive)):  # to be downloaded again
            useless.unlink(missing_ok=True)
        raise InputError(
            f"{self.url} {what}: try again later, or give a copy of the file as data.path=FILE"
        ) from cause
