"""Files of text, JSON Lines and Parquet, compressed or not, read in pieces and never held as a whole.

A piece is a file, or a range of a large one that can be read without the rest of it.
"""

import codecs
import gzip
import io
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from gptpl.data.sources.base import (
    SECTION,
    Piece,
    Refused,
    Section,
    check_text,
    decoded_line,
    grouped,
    in_sections,
    not_utf8,
    unreadable,
)
from gptpl.data.sources.records import JSON_LINES, json_line
from gptpl.errors import InputError

Kind = Literal["text", "JSON Lines", "Parquet"]
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".tex", ".html")
COMPRESSED = (".gz", ".zst")
PIECE_BYTES = 1 << 24
ROWS = 1024  # of a table, read at a time
_WINDOW = 1 << 16  # bytes that are searched at a time for a place to cut
_FAR = 1 << 20  # bytes after which a worse place will do

# As `CUT` in base.py, for bytes, where white space beyond ASCII has to be spelt out.
_SPACES = rb"\xc2[\x85\xa0]|\xe1\x9a\x80|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]|\xe2\x81\x9f|\xe3\x80\x80"
_CUT_BYTES = re.compile(
    rb"(?<!\s)(?<!\xc2[\x85\xa0])(?<!\xe1\x9a\x80)(?<!\xe2\x80[\x80-\x8a\xa8\xa9\xaf])(?<!\xe2\x81\x9f)"
    rb"(?<!\xe3\x80\x80)\r?\n(?=[^\s/])(?!" + _SPACES + rb")"
)


def kind_of(path: Path | str) -> Kind | None:
    """What a file holds, by its suffix; None: nothing that is known."""
    *_, before, last = ["", *os.path.basename(path).lower().split(".")]  # noqa: PTH119  # fast
    suffix = f".{before if f'.{last}' in COMPRESSED else last}"
    if suffix in JSON_LINES:
        return "JSON Lines"
    return "Parquet" if suffix == ".parquet" else "text" if suffix in TEXT_SUFFIXES else None


def is_compressed(path: Path) -> bool:
    """Whether the file has to be decompressed, from its beginning."""
    return path.suffix.lower() in COMPRESSED


def pieces_of(path: Path, field: str | None) -> Iterator[Piece]:
    """The pieces of a file, in order; `field` as for `sections`.

    Raises InputError for what should be a Parquet file and is not.
    """
    if kind_of(path) == "Parquet":
        with _opened_parquet(path) as file:
            groups = [file.metadata.row_group(n) for n in range(file.metadata.num_row_groups)]
        yield from row_pieces(path, [(1, group.total_byte_size) for group in groups])
    elif is_compressed(path):
        yield Piece(path=path, size=4 * path.stat().st_size)
    else:
        size = path.stat().st_size
        # The last one is up to half as large again.
        starts = list(range(0, max(1, size - PIECE_BYTES // 2), PIECE_BYTES))
        is_text = kind_of(path) != "JSON Lines" or field is None
        for start, end in zip(starts, [*starts[1:], None], strict=True):
            length = (size if end is None else end) - start
            yield Piece(path=path, start=start, end=end, size=length, within=is_text and start > 0)


def sections(piece: Piece, field: str | None, refused: Refused | None = None) -> Iterator[Section]:
    r"""The documents of a piece, in sections.

    A text file is one document, whose line ends are read as `\n`; in JSON Lines and Parquet the value of
    `field` is one, in every line or row (None: JSON Lines are text, too).

    Raises InputError, which names the file and the line or place, for what is not UTF-8, binary, cut short,
    not JSON, without a text in that field, or unreadable. `refused` takes the errors of lines of JSON Lines.
    """
    path = piece.path
    assert path is not None
    kind = kind_of(path)
    if kind == "Parquet":
        documents = _parquet(path, piece, field or "text")
    elif kind == "JSON Lines" and field is not None:
        documents = _json_lines(path, piece, field, refused)
    else:
        yield from in_sections(_text(path, piece), begins=not piece.within, ends=piece.end is None)
        return
    for document in documents:
        yield from in_sections([document])


# ------------------------------------------------------------------------------------------------- text


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed. Raises InputError where it is unreadable, damaged or cut short."""
    damage: tuple[type[Exception], ...] = (EOFError, gzip.BadGzipFile, zlib.error)
    try:
        if path.suffix.lower() == ".gz":
            opener: Any = gzip.open
        elif path.suffix.lower() == ".zst":
            zstd = _zstd(path)
            # Windows of up to 2 GB, as in files that were compressed with --long=31.
            opener = partial(zstd.open, options={zstd.DecompressionParameter.window_log_max: 31})
            damage = (*damage, zstd.ZstdError)
        else:
            opener = open
        with opener(path, "rb") as file:
            yield cast(BinaryIO, file)
    except damage as error:
        raise InputError(f"{path} is damaged or cut short ({error}): copy or download it again") from error
    except OSError as error:
        raise unreadable(path, error) from error


def _zstd(path: Path) -> Any:
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError as error:
        raise InputError(f"{path} needs the extra package backports.zstd: pip install it") from error
    return zstd


def _text(path: Path, piece: Piece) -> Iterator[str]:
    """The text of a piece, up to a million bytes of it at a time."""
    utf8 = codecs.getincrementaldecoder("utf-8")()
    line_ends = io.IncrementalNewlineDecoder(None, translate=True)
    with opened(path) as file:
        end = None if piece.end is None else place_to_cut(file, piece.end)
        place = place_to_cut(file, piece.start)
        if place or end is not None:
            file.seek(place)
        while True:
            data = file.read(SECTION if end is None else max(0, min(SECTION, end - place)))
            check_text(data, str(path), "" if place else str(path), start=place)
            waiting = len(utf8.getstate()[0])  # bytes of a character that is not complete
            try:
                text = utf8.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise not_utf8(str(path), error, place - waiting + error.start) from error
            yield line_ends.decode(text if place else text.removeprefix("\ufeff"), final=not data)
            if not data:
                return
            place += len(data)


def place_to_cut(file: BinaryIO, place: int) -> int:
    """The next place where a text can be cut: the same for the piece before it and the one behind it."""
    if not place:
        return 0
    # From one byte before, so that a line end just there is seen in its line.
    file.seek(start := max(0, place - 8))
    data = b""
    while more := file.read(_WINDOW):
        data += more
        found = _CUT_BYTES.search(data, place - start)
        if found is not None and found.end() + 3 <= len(data):  # all of the character behind it is there
            return start + found.end()
        if len(data) > _FAR:
            break
    else:
        return start + len(data)
    for mark in (b"\n", b" "):
        if (at := data.find(mark, place - start)) >= 0:
            return start + at + 1
    while data[place - start] & 0xC0 == 0x80:  # within a character
        place += 1
    return place


# --------------------------------------------------------------------------------------------- records


def _json_lines(path: Path, piece: Piece, field: str, refused: Refused | None) -> Iterator[str]:
    def document(line: bytes, number: int) -> str | None:
        text = decoded_line(line, path, number)
        if not text or text.isspace():
            return None
        record = json_line(text, path, number)
        return record.text(field, "set data.field to the key of the text", may_be_empty=True)

    with opened(path) as file:
        place = 0
        if piece.start:  # the line that this falls into belongs to the piece before
            file.seek(piece.start - 1)
            place = piece.start - 1 + len(file.readline())
        lines_before = cache(partial(_lines_before, path, place))
        for number, line in enumerate(file, start=1):
            if piece.end is not None and place >= piece.end:
                return
            place += len(line)
            try:
                try:
                    found = document(line, number)
                except InputError:
                    if piece.start:  # the message shall have the number of the line in the file
                        document(line, number + lines_before())
                    raise
            except InputError as error:
                if refused is None:
                    raise
                refused(error)
            else:
                if found is not None:
                    yield found


def _lines_before(path: Path, place: int) -> int:
    lines = 0
    with path.open("rb") as file:
        while place > 0 and (data := file.read(min(SECTION, place))):
            lines += data.count(b"\n")
            place -= len(data)
    return lines


def arrow(path: Path) -> Any:
    """The package that a file needs."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"{path} needs the extra package pyarrow: pip install pyarrow") from error
    return pyarrow


@contextmanager
def _opened_parquet(path: Path) -> Iterator[Any]:
    library = arrow(path)
    try:
        with library.parquet.ParquetFile(path) as file:
            yield file
    except library.ArrowException as error:
        raise InputError(f"{path} is not a whole Parquet file ({error}): download it again") from error
    except OSError as error:
        raise InputError(f"cannot read {path} ({error}): check the file and its permissions") from error


def row_pieces(path: Path, parts: Iterable[tuple[int, int]]) -> Iterator[Piece]:
    """Pieces of whole parts, each with how many rows it counts for, and its bytes."""
    start = 0
    for group in grouped(parts, lambda part: part[1], PIECE_BYTES):
        end = start + sum(rows for rows, _ in group)
        yield Piece(path=path, start=start, end=end, size=sum(size for _, size in group))
        start = end


def _parquet(path: Path, piece: Piece, field: str) -> Iterator[str]:
    with _opened_parquet(path) as file:
        check_text_column(file.schema_arrow, field, str(path))
        groups = list(range(piece.start, piece.end or file.metadata.num_row_groups))
        for batch in file.iter_batches(ROWS, row_groups=groups, columns=[field]):
            yield from (text or "" for text in batch.column(0).to_pylist())


def check_text_column(schema: Any, field: str, place: str) -> None:
    """Raise InputError where a table lacks that column, or it holds no texts; `schema` is pyarrow's."""
    if field not in schema.names:
        there = ", ".join(map(repr, schema.names[:8]))
        raise InputError(
            f"{place} has no column {field!r} (it has {there}): set data.field to the one with the text"
        )
    kind = str(schema.field(field).type)
    if kind not in ("string", "large_string", "string_view"):
        raise InputError(f"{place}: column {field!r} holds {kind}, not texts: set data.field to another")
