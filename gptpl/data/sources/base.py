"""What every corpus promises, files in a stable order and the text in each; and reading one file."""

import codecs
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from pathlib import Path

from gptpl.errors import InputError


class Corpus(ABC):
    """Documents, one a file, always in the same order. `name` stands for it in reports."""

    name: str

    @abstractmethod
    def files(self) -> list[Path]:
        """The files in their order, downloaded if need be. Raises InputError when there are none."""

    def read(self, path: Path) -> str:
        """Text of one of the files. Raises InputError that names the file and the remedy when it has none."""
        return read_utf8(path)

    def documents(self) -> Iterator[str]:
        """Text of every file in order, one at a time."""
        for path in self.files():
            yield self.read(path)

    def content_sha256(self) -> str:
        """Hash of the kind of corpus and of all that decides its text: the files' bytes in their order.

        Of a class that reads them in its own way, and may have settings for it, the documents themselves.
        Raises InputError when a file cannot be read.
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
        """Hash of the kind of corpus, the files' bytes and their order. Raises InputError as above."""
        digest = self._digest()
        for path in self.files():
            try:
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                raise unreadable(path, error) from error
        return digest.hexdigest()

    def _digest(self) -> "hashlib._Hash":
        kind = f"{type(self).__module__}.{type(self).__qualname__}"
        # The folder's first name: older runs and caches know their text by this hash.
        return hashlib.sha256(kind.replace("gptpl.data.sources.", "gptpl.data.corpora.").encode())


def read_utf8(path: Path) -> str:
    r"""Text of a UTF-8 file, without a byte order mark and with every line ending as `\n`.

    Raises InputError, naming the file and the remedy, when it is missing, a folder, unreadable, empty or
    blank, binary (it holds a zero byte), or not UTF-8.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    return not_blank(_decoded(data, path).replace("\r\n", "\n").replace("\r", "\n"), path)


def utf8_lines(path: Path) -> Generator[str, None, None]:
    r"""Each line with its `\n` or `\r\n`, without a byte order mark; the file is never held as a whole.

    Raises InputError, naming the file, the line and the remedy, when it is missing, a folder, unreadable,
    empty, binary (it holds a zero byte), or not UTF-8.
    """
    number = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield _decoded(line, path, number)
    except OSError as error:
        raise unreadable(path, error) from error
    if not number:
        raise InputError(f"{path} is empty: give a file with texts in it")


def _decoded(data: bytes, path: Path, line: int | None = None) -> str:
    place = f"{path}" if line is None else f"{path}, line {line},"
    first = line in (None, 1)
    if first and data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(f"{path} is UTF-16, not UTF-8: convert it, e.g. iconv -f UTF-16 -t UTF-8")
    if (offset := data.find(b"\0")) >= 0:
        raise InputError(
            f"{place} is binary, not text (zero byte at offset {offset}): give a UTF-8 text file"
        )
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{place} is not UTF-8 (byte 0x{data[error.start]:02X} at offset {error.start}): "
            "convert it, e.g. iconv -f WINDOWS-1252 -t UTF-8"
        ) from error
    return text.removeprefix("\ufeff") if first else text


def not_blank(text: str, path: Path) -> str:
    """The text. Raises InputError when there is nothing but white space in it."""
    if not text or text.isspace():
        raise InputError(f"{path} is empty: remove it or choose a file with text in it")
    return text


def unreadable(path: Path, error: OSError) -> InputError:
    """What to raise for a file that the system does not hand out."""
    return InputError(f"cannot read {path} ({error.strerror}): check the path and its permissions")
