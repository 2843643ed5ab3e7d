"""Token arrays as .npy files: written piece by piece, read through memory maps."""

import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

Tokens = NDArray[np.unsignedinteger]


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """Return the smallest type that holds every token: two bytes up to 65,536 tokens, else four."""
    return np.dtype(np.uint16) if vocab_size <= 1 << 16 else np.dtype(np.uint32)


class TokenFileWriter:
    """Appends tokens to a new .npy file whose final length nobody knows yet.

    A context manager; leaving it writes the length into the header and the file to the disk (fsync). Raises
    OSError, also when `path` exists already.
    """

    def __init__(self, path: Path, dtype: np.dtype[np.unsignedinteger]) -> None:
        self._dtype = dtype
        self._tokens = 0
        self._file = path.open("xb")
        self._write_header()
        self._header_bytes = self._file.tell()

    def append(self, tokens: NDArray[np.unsignedinteger]) -> None:
        """Write 1-D `tokens` behind the others."""
        self._file.write(np.ascontiguousarray(tokens, dtype=self._dtype).data)
        self._tokens += len(tokens)

    def _write_header(self) -> None:
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._tokens,)}
        npy_format.write_array_header_1_0(self._file, header)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        """Complete the file, or after an error only close it."""
        try:
            if kind is None:
                self._file.seek(0)
                self._write_header()  # NumPy leaves room in the first header for a longer length
                assert self._file.tell() == self._header_bytes, "the .npy header has grown into the tokens"
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()


def open_tokens(path: Path, *, dtype: np.dtype[np.unsignedinteger], length: int) -> Tokens:
    """Map `path` into memory, read-only; nothing is read until it is used.

    Raises OSError when the file is missing, ValueError when it is cut short or not the array asked for.
    """
    tokens = npy_format.open_memmap(path, mode="r")
    if tokens.dtype != dtype or tokens.shape != (length,):
        raise ValueError(f"{path.name} holds {tokens.dtype} {tokens.shape}, not {dtype} ({length},)")
    return tokens


@dataclass(frozen=True)
class FileReference:
    """Where a memory-mapped array lies, for another process to map it again."""

    filename: str
    offset: int
    dtype: str
    length: int


def as_file_reference(tokens: Tokens) -> FileReference | Tokens:
    """Return where `tokens` is mapped from, or `tokens` itself when it is not a whole mapped file."""
    # A slice keeps the offset of the whole, which is wrong for it; only the whole has the mmap as its base.
    base: object = tokens.base
    if not (isinstance(tokens, np.memmap) and isinstance(base, mmap.mmap)):
        return tokens
    return FileReference(str(tokens.filename), tokens.offset, tokens.dtype.str, len(tokens))


def from_file_reference(tokens: FileReference | Tokens) -> Tokens:
    """Undo `as_file_reference`."""
    if not isinstance(tokens, FileReference):
        return tokens
    return np.memmap(
        tokens.filename, dtype=tokens.dtype, mode="r", offset=tokens.offset, shape=(tokens.length,)
    )
