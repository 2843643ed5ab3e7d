"""The interface of corpora, files in a stable order and the text of each; and reading one file."""

import codecs
import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from pathlib import Path

from gptpl.errors import InputError


class Corpus(ABC):
    """Documents, one a file, always in the same order. `name` is what reports call it."""

    name: str

    @abstractmethod
    def files(self) -> list[Path]:
        """The files in their order, downloaded if need be. Raises InputError where there are none."""

    def read(self, path: Path) -> str:
        """Text of one of the files. Raises InputError, which names the file, where it has none."""
        return read_utf8(path)

    def documents(self) -> Iterator[str]:
        """All documents in order, one at a time."""
        for path in self.files():
            yield self.read(path)

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
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                raise unreadable(path, error) from error
        return digest.hexdigest()

    def _digest(self) -> "hashlib._Hash":
        module, name = type(self).__module__, type(self).__qualname__
        if module.startswith("gptpl.data.sources."):
            # The modules' first names: older runs and caches know their text by this hash.
            module = "gptpl.data.corpora." + re.sub(r"\B(?=[A-Z])", "_", name).lower()
        return hashlib.sha256(f"{module}.{name}".encode())


def read_utf8(path: Path) -> str:
    r"""Text of a UTF-8 file, without a byte order mark and with every line ending as `\n`.

    Raises InputError, which names the file and the remedy, where it is missing, a folder, unreadable, blank,
    binary (it holds a zero byte), or not UTF-8.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    return not_blank(_decoded(data, path).replace("\r\n", "\n").replace("\r", "\n"), path)


def utf8_lines(path: Path) -> Generator[str, None, None]:
    r"""Each line with its `\n` or `\r\n`, without a byte order mark; the file is never held as a whole.

    Raises InputError as `read_utf8`, naming the line too.
    """
    number = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield _decoded(line, path, number)
    except OSError as error:
        raise unreadable(path, error) from error
    if not number:
        not_blank("", path)


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
    """The text. Raises InputError where it is empty or only white space."""
    if not text or text.isspace():
        raise InputError(f"{path} is empty: remove it or choose a file with text in it")
    return text


def unreadable(path: Path, error: OSError) -> InputError:
    """The error for a file that the system does not let us read."""
    return InputError(f"cannot read {path} ({error.strerror}): check the path and its permissions")
