"""Reading one text file, with one clear line for everything that can be wrong with it."""

import codecs
from pathlib import Path

from gptpl.errors import InputError

UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_utf8(path: Path) -> str:
    r"""Text of a UTF-8 file, without a byte order mark and with every line ending as `\n`.

    Raises InputError, naming the file and the remedy, when it is missing, a folder, unreadable, empty or
    blank, binary (it holds a zero byte), or not UTF-8.
    """
    data = _read_bytes(path)
    if data.startswith(UTF16_MARKS):
        raise InputError(f"{path} is UTF-16, not UTF-8: convert it, e.g. iconv -f UTF-16 -t UTF-8")
    if (offset := data.find(b"\0")) >= 0:
        raise InputError(f"{path} is binary, not text (zero byte at offset {offset}): give a UTF-8 text file")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 (byte 0x{data[error.start]:02X} at offset {error.start}): "
            "convert it, e.g. iconv -f WINDOWS-1252 -t UTF-8"
        ) from error
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    return not_blank(text, path)


def not_blank(text: str, path: Path) -> str:
    """The text. Raises InputError when there is nothing but white space in it."""
    if not text or text.isspace():
        raise InputError(f"{path} is empty: remove it or choose a file with text in it")
    return text


def unreadable(path: Path, error: OSError) -> InputError:
    """What to raise for a file that the system does not hand out."""
    return InputError(f"cannot read {path} ({error.strerror}): check the path and its permissions")


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
