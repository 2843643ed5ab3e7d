"""The lines of a UTF-8 file, one at a time, with a clear line for what can be wrong with them."""

from collections.abc import Iterator
from pathlib import Path

from gptpl.data.corpora.reading import UTF16_MARKS, unreadable
from gptpl.errors import InputError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def utf8_lines(path: Path) -> Iterator[str]:
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


def _decoded(line: bytes, path: Path, number: int) -> str:
    if number == 1:
        if line.startswith(UTF16_MARKS):
            raise InputError(f"{path} is UTF-16, not UTF-8: convert it, e.g. iconv -f UTF-16 -t UTF-8")
        line = line.removeprefix(BYTE_ORDER_MARK)
    if b"\0" in line:
        raise InputError(f"{path}, line {number}, is binary, not text (a zero byte): give a UTF-8 text file")
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}, line {number}, is not UTF-8 (byte 0x{line[error.start]:02X}): "
            "convert it, e.g. iconv -f WINDOWS-1252 -t UTF-8"
        ) from error
