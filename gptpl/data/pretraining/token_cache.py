"""Encoded corpora, in memory and on disk: there one folder an entry, complete or not there at all.

An entry holds `train.npy`, `val.npy` and `stats.json` (counts, and the tokenizer's state). It is written in a
folder of its own beside its final place and renamed when everything is on the disk, so that neither an
interrupted run nor two runs at once leave half an entry.
"""

import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, Literal, Self, get_args

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from gptpl.files.durable import sync_folder
from gptpl.tokenizers import Tokenizer, tokenizer_from_state

log = logging.getLogger(__name__)

Tokens = NDArray[np.unsignedinteger]
Part = Literal["train", "val"]
PARTS: tuple[Part, ...] = get_args(Part)
DAMAGE = (OSError, ValueError, KeyError, TypeError)
"""What reading an entry raises that is not there, or not whole."""
_ABANDONED = 24 * 3600  # seconds


@dataclass(frozen=True, kw_only=True)
class CorpusStats:
    """Counts of a corpus and of its two splits.

    A document that the cut falls into counts in both splits. Characters are those of the documents, tokens
    include the end-of-text tokens between documents. Of `compared_blocks` blocks of 32 validation tokens,
    `duplicate_blocks` stand word for word in the training split.
    """

    documents: int
    train_documents: int
    val_documents: int
    train_characters: int
    val_characters: int
    train_tokens: int
    val_tokens: int
    duplicate_blocks: int
    compared_blocks: int
    content_sha256: str


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedCorpus:
    """Both splits as 1-D arrays of `token_dtype`, often memory-mapped, and the tokenizer that made them."""

    train: Tokens
    val: Tokens
    tokenizer: Tokenizer
    stats: CorpusStats


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """The smallest type that holds every token: two bytes up to 65,536 tokens, else four."""
    return np.dtype(np.uint16) if vocab_size <= 1 << 16 else np.dtype(np.uint32)


class TokenFileWriter:
    """Appends tokens to a new .npy file, open for writing, whose final length nobody knows yet."""

    def __init__(self, file: BinaryIO, dtype: np.dtype[np.unsignedinteger]) -> None:
        self._file = file
        self._dtype = dtype
        self._tokens = 0
        self._write_header()
        self._header_bytes = file.tell()

    def append(self, tokens: Tokens) -> None:
        """Write 1-D `tokens` behind the others."""
        self._file.write(np.ascontiguousarray(tokens, dtype=self._dtype).data)
        self._tokens += len(tokens)

    def finish(self) -> None:
        """Write the length into the header and the file to the disk (fsync)."""
        self._file.seek(0)
        self._write_header()  # NumPy leaves room in the first header for a longer length
        assert self._file.tell() == self._header_bytes, "the .npy header has grown into the tokens"
        self._file.flush()
        os.fsync(self._file.fileno())

    def _write_header(self) -> None:
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._tokens,)}
        npy_format.write_array_header_1_0(self._file, header)


class CacheUnwritableError(Exception):
    """The cache cannot take an entry; the message is the system's reason."""


@contextmanager
def _told_apart() -> Iterator[None]:
    """Turns an OSError of the cache into its own exception: one of the corpus means something else."""
    try:
        yield
    except OSError as error:
        raise CacheUnwritableError(str(error)) from error


class DraftEntry:
    """An entry in the making, beside its final place; a context manager that removes what is not committed.

    Every method raises CacheUnwritableError when the disk does not take what it is given.
    """

    @_told_apart()
    def __init__(self, entry: Path, dtype: np.dtype[np.unsignedinteger]) -> None:
        self._entry = entry
        _remove_abandoned(entry.parent)
        self._folder = entry.with_name(f"{entry.name}.{uuid.uuid4().hex}.partial")
        self._files = ExitStack()
        self._writers: dict[Part, TokenFileWriter] = {}
        self._folder.mkdir(parents=True)
        try:
            for part in PARTS:
                file = self._files.enter_context((self._folder / f"{part}.npy").open("xb"))
                self._writers[part] = TokenFileWriter(file, dtype)
        except OSError:
            self._discard()
            raise

    @_told_apart()
    def append(self, part: Part, tokens: Tokens) -> None:
        """Add `tokens` to a split."""
        self._writers[part].append(tokens)

    @_told_apart()
    def written(self) -> tuple[Tokens, Tokens]:
        """Complete the token files, and return both splits."""
        for writer in self._writers.values():
            writer.finish()
        train, val = (npy_format.open_memmap(self._folder / f"{part}.npy", mode="r") for part in PARTS)
        return train, val

    @_told_apart()
    def commit(self, stats: CorpusStats, tokenizer: Tokenizer) -> None:
        """Put the entry, whose token files are complete, in its place, unless another process has done so."""
        with (self._folder / "stats.json").open("w", encoding="utf-8") as file:
            json.dump({"stats": asdict(stats), "tokenizer": tokenizer.state()}, file)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self._folder)
        try:
            self._folder.rename(self._entry)
        except OSError:
            if not self._entry.is_dir():
                raise
        sync_folder(self._entry.parent)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._discard()

    @_told_apart()
    def _discard(self) -> None:
        try:
            self._files.close()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)


def _remove_abandoned(cache: Path) -> None:
    """Removes drafts of processes that were killed: nothing has been written to them for a day."""
    for draft in cache.glob("*.partial"):
        with suppress(OSError):  # another process removes it, or has just finished it
            if time.time() - max(path.stat().st_mtime for path in (draft, *draft.iterdir())) > _ABANDONED:
                shutil.rmtree(draft)
                log.info("removed %s, which a killed process had left", draft)


def read_entry(entry: Path, tokenizer: Tokenizer | None) -> EncodedCorpus | None:
    """Open an entry without reading its tokens; None if there is none.

    `tokenizer` is the one that the entry was made with, if it is at hand; None: it is rebuilt from the entry.
    A damaged entry (something missing, cut short, of another kind) counts as none: it is removed, with a
    warning. So does one that the system does not let us read now, with too many open files for example; it
    stays where it is.
    """
    try:
        return open_entry(entry, tokenizer) if entry.is_dir() else None
    except (FileNotFoundError, ValueError, KeyError, TypeError) as damage:
        log.warning("the cached tokens in %s are damaged (%s): they are made again", entry, damage)
    except OSError as error:
        log.warning("the cached tokens in %s cannot be read (%s): they are encoded once more", entry, error)
        return None
    doomed = entry.with_name(f"{entry.name}.{uuid.uuid4().hex}.damaged")
    try:
        entry.rename(doomed)  # in one step: another process sees it whole or not at all
    except OSError as error:
        log.warning("cannot remove %s: %s", entry, error)
    else:
        shutil.rmtree(doomed, ignore_errors=True)
    return None


def open_entry(entry: Path, tokenizer: Tokenizer | None = None) -> EncodedCorpus:
    """The same, touching nothing. Raises one of DAMAGE where there is no entry, or a damaged one."""
    description = json.loads((entry / "stats.json").read_text(encoding="utf-8"))
    stats = CorpusStats(**description["stats"])
    fitted = tokenizer or tokenizer_from_state(description["tokenizer"])
    dtype = token_dtype(fitted.vocab_size)

    def opened(part: Part, length: int) -> Tokens:
        tokens: Tokens = npy_format.open_memmap(entry / f"{part}.npy", mode="r")
        if tokens.dtype != dtype or tokens.shape != (length,):
            raise ValueError(f"{part}.npy holds {tokens.dtype} {tokens.shape}, not {dtype} ({length},)")
        return tokens

    train, val = opened("train", stats.train_tokens), opened("val", stats.val_tokens)
    return EncodedCorpus(train=train, val=val, tokenizer=fitted, stats=stats)
