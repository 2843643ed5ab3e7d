"""The interface of corpora: files in a stable order, their documents, and parts to be read one by one."""

import codecs
import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from gptpl.errors import InputError
from gptpl.files.durable import sha256_of

SECTION = 1 << 20
"""Characters from which on a document is cut, at the next good place."""
# Between two lines without white space at the cut: for GPT-2's pattern the line end is a token by itself,
# whichever side it is on. (Later patterns of tiktoken add a slash behind a line end to what is before it.)
_CUT = re.compile(r"(?<=\S)\n(?=[^\s/])")
_CUT_IN_LINE = re.compile(r"(?<=\S)(?= \S)")


T = TypeVar("T")
Files = list[tuple[str, int, int]]
"""Of each file: its name below the folder that all have in common, bytes, and time of change in ns."""


Refused = Callable[[InputError], None]
"""Takes the error of a record, or of the rest of a piece, that cannot be read."""


class Section(NamedTuple):
    """A document, or a part of a long one; `ends`: it is the last part. A blank document has the text ""."""

    text: str
    ends: bool


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of a corpus that can be read by itself: a file, or a range of one; without a path, all.

    The range is in bytes, of Parquet in row groups; `end` None: to the end. `size` is the number of bytes, of
    a compressed file an estimate of those of its text. `within`: it begins within a document.
    """

    path: Path | None = None
    start: int = 0
    end: int | None = None
    size: int = 0
    within: bool = False


class Corpus(ABC):
    """Documents, one a file, always in the same order. `name` is what reports call it."""

    name: str

    @abstractmethod
    def files(self) -> list[Path]:
        """The files in their order, downloaded if need be. Raises InputError where there are none."""

    def check_path(self) -> None:  # noqa: B027  # most need none
        """Raise InputError for what is wrong with the given paths, as far as a moment's look tells."""

    def read(self, path: Path) -> str:
        """Text of one of the files. Raises InputError, which names the file, where it has none."""
        return read_utf8(path)

    def documents(self) -> Iterator[str]:
        """All documents in order, one at a time."""
        for path in self.files():
            yield self.read(path)

    def listing(self) -> Files:
        """Name, size and time of every file. Raises InputError, which names the file, where it is gone."""
        return listed([str(path) for path in self.files()])

    def listing_sha256(self) -> str:
        """Hash of `reading` and the listing, without reading the files; another one where they are copied."""
        return hashlib.sha256(json.dumps([self.reading, self.listing()]).encode()).hexdigest()

    def pieces(self) -> list[Piece]:
        """Parts that can be read by themselves, in the order of the documents.

        Here each file is one; of a subclass that has its own `documents`, all of them together are.
        """
        files = self.files()
        if type(self).documents is not Corpus.documents:
            return [Piece(size=sum(path.stat().st_size for path in files))]
        return [Piece(path=path, size=path.stat().st_size) for path in files]

    def sections(self, piece: Piece) -> Iterator[Section]:
        """The documents of a piece, in sections. Raises InputError as `documents`."""
        for text in self.documents() if piece.path is None else [self.read(piece.path)]:
            yield from in_sections([text])

    def readable_sections(self, piece: Piece, refused: Refused) -> Iterator[Section]:
        """As `sections`, to look at a corpus: errors are given to `refused`, what can be read goes on."""
        try:
            yield from self.sections(piece)
        except InputError as error:
            refused(error)

    @property
    def reading(self) -> str:
        """What decides, besides names, sizes and times of the files, which documents they hold.

        Of a class that reads them in its own way, by settings that are not known here, it is their hash, for
        which all are read: say it shorter where there are many.
        """
        own = type(self)
        if own.read is Corpus.read and own.documents is Corpus.documents and own.sections is Corpus.sections:
            return class_name(own)
        return f"{class_name(own)} {self.content_sha256()}"

    def content_sha256(self) -> str:
        """Hash of the class and of everything that decides the text: the bytes of the files in order.

        For a subclass that reads them in its own way it is the hash of the documents. Raises InputError
        where a file cannot be read.
        """
        own = type(self)
        if own.read is Corpus.read and own.documents is Corpus.documents:
            return self.files_sha256()
        digest = self._digest()
        for text in self.documents():
            data = text.encode()
            digest.update(len(data).to_bytes(8))
            digest.update(data)
        return digest.hexdigest()

    def files_sha256(self) -> str:
        """Hash of the class and of the bytes of the files in order. Raises InputError as above."""
        digest = self._digest()
        for path in self.files():
            try:
                digest.update(bytes.fromhex(sha256_of(path)))
            except OSError as error:
                raise unreadable(path, error) from error
        return digest.hexdigest()

    def _digest(self) -> "hashlib._Hash":
        return hashlib.sha256(class_name(type(self)).encode())


def class_name(of: type[Corpus]) -> str:
    """The class with its module."""
    module, name = of.__module__, of.__qualname__
    if module.startswith("gptpl.data.sources."):
        # The modules' first names: older runs and caches know their text by this hash.
        module = "gptpl.data.corpora." + re.sub(r"\B(?=[A-Z])", "_", name).lower()
    return f"{module}.{name}"


def sampled(corpus: Corpus, most: int | None = None) -> Iterator[str]:
    """The text of all sections of a corpus, or of about `most` bytes of them, evenly spread."""
    pieces = corpus.pieces()
    share = 1.0 if most is None else most / max(1, sum(piece.size for piece in pieces))
    passed = read = 0
    for piece in pieces:
        passed += piece.size
        if share < 1 and read >= share * passed:
            continue
        for text, _ in corpus.sections(piece):
            yield text
            read += len(text.encode("utf-8", "surrogatepass"))
            if share < 1 and read >= share * passed:
                break


def grouped(items: Iterable[T], size: Callable[[T], int], least: int) -> Iterator[list[T]]:
    """Consecutive items in groups, each of which ends as soon as its sizes add up to `least`."""
    group: list[T] = []
    total = 0
    for item in items:
        group.append(item)
        total += size(item)
        if total >= least:
            yield group
            group, total = [], 0
    if group:
        yield group


def in_sections(parts: Iterable[str], *, begins: bool = True, ends: bool = True) -> Iterator[Section]:
    """A document, read part by part, in sections.

    `begins`, `ends`: whether the document does so with the first and with the last part.
    """
    waiting, start, blank = "", 0, begins and ends
    for part in parts:
        waiting, start = waiting[start:] + part, 0
        while len(waiting) - start > 2 * SECTION:
            first, last = start + SECTION, start + 2 * SECTION
            cut = _CUT.search(waiting, first, last) or _CUT_IN_LINE.search(waiting, first, last)
            place = cut.end() if cut else first
            yield Section(waiting[start:place], False)
            start, blank = place, False
    rest = waiting[start:]
    yield Section("" if blank and rest.isspace() else rest, ends)


def listed(paths: list[str]) -> Files:
    """See `Corpus.listing`. Of strings: a hundred thousand paths alone take half a second to make."""
    paths = [path.removeprefix(os.path.join(os.curdir, "")) for path in paths]  # noqa: PTH118
    start = len(os.path.commonpath({os.path.split(path)[0] for path in paths})) if paths else 0
    found = []
    for path in paths:
        try:
            status = os.stat(path)  # noqa: PTH116
        except OSError as error:
            raise unreadable(Path(path), error) from error
        found.append((path[start:].lstrip(os.sep), status.st_size, status.st_mtime_ns))
    return found


def read_utf8(path: Path) -> str:
    r"""Text of a UTF-8 file, without a byte order mark and with every line ending as `\n`.

    Raises InputError, which names the file and the remedy, where it is missing, a folder, unreadable, blank,
    binary (it holds a zero byte), or not UTF-8.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    return not_blank(decoded_line(data, path).replace("\r\n", "\n").replace("\r", "\n"), path)


def utf8_lines(path: Path) -> Generator[str, None, None]:
    r"""Each line with its `\n` or `\r\n`, without a byte order mark; the file is never held as a whole.

    Raises InputError as `read_utf8`, naming the line too.
    """
    number = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield decoded_line(line, path, number)
    except OSError as error:
        raise unreadable(path, error) from error
    if not number:
        not_blank("", path)


def decoded_line(data: bytes, path: Path, line: int | None = None) -> str:
    """Text of a line, numbered from 1, or of a whole file; the first is without a byte order mark.

    Raises InputError as `read_utf8`, naming the line too.
    """
    place = f"{path}" if line is None else f"{path}, line {line},"
    first = line in (None, 1)
    check_text(data, place, str(path) if first else "")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise not_utf8(place, error, error.start) from error
    return text.removeprefix("\ufeff") if first else text


def check_text(data: bytes, place: str, begins: str = "", *, start: int = 0) -> None:
    """Raise InputError for UTF-16 at the beginning of a file, if `begins` is its name, and for a zero byte.

    `start` is the offset of the data in the place.
    """
    if begins and data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(f"{begins} is UTF-16, not UTF-8: convert it, e.g. iconv -f UTF-16 -t UTF-8")
    if (offset := data.find(b"\0")) >= 0:
        raise InputError(
            f"{place} is binary, not text (zero byte at offset {start + offset}): give a UTF-8 text file"
        )


def not_utf8(place: str, error: UnicodeDecodeError, offset: int) -> InputError:
    """The error for bytes that are no UTF-8, at an offset of a place."""
    return InputError(
        f"{place} is not UTF-8 (byte 0x{error.object[error.start]:02X} at offset {offset}): "
        "convert it, e.g. iconv -f WINDOWS-1252 -t UTF-8"
    )


def not_blank(text: str, path: Path) -> str:
    """The text. Raises InputError where it is empty or only white space."""
    if not text or text.isspace():
        raise InputError(f"{path} is empty: remove it or choose a file with text in it")
    return text


def unreadable(path: Path, error: OSError) -> InputError:
    """The error for a file that the system does not let us read."""
    return InputError(f"cannot read {path} ({error.strerror}): check the path and its permissions")
