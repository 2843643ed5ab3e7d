"""Encoded corpora on disk: one folder an entry, complete or not there at all.

An entry holds `train.npy`, `val.npy` and `stats.json` (counts, and the tokenizer's state). It is written in a
folder of its own beside its final place and renamed when everything is on the disk, so that neither an
interrupted run nor two runs at once leave half an entry.
"""

import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.lib import format as npy_format

from gptpl.data.encoded_corpus import CorpusStats, EncodedCorpus
from gptpl.data.split import PARTS, Part
from gptpl.data.token_file import TokenFileWriter, Tokens, open_tokens, token_dtype
from gptpl.data.tokenizers import Tokenizer, tokenizer_from_state
from gptpl.files.durable import sync_folder

log = logging.getLogger(__name__)


DAMAGE = (OSError, ValueError, KeyError, TypeError)
"""What reading an entry raises that is not there, or not whole."""


class CacheUnwritableError(Exception):
    """The cache cannot take an entry; the message is the system's reason."""


@contextmanager
def _told_apart() -> Iterator[None]:
    """Turn an OSError of the cache into its own exception: one of the corpus means something else."""
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
        self._folder = entry.with_name(f"{entry.name}.{uuid.uuid4().hex}.partial")
        self._files = ExitStack()
        self._writers: dict[Part, TokenFileWriter] = {}
        self._folder.mkdir(parents=True)
        try:
            for part in PARTS:
                writer = TokenFileWriter(self._folder / f"{part}.npy", dtype)
                self._writers[part] = self._files.enter_context(writer)
        except OSError:
            self._discard()
            raise

    @_told_apart()
    def append(self, part: Part, tokens: Tokens) -> None:
        """Add `tokens` to a split."""
        self._writers[part].append(tokens)

    @_told_apart()
    def written(self, part: Part) -> Tokens:
        """Complete the token files, and return a split."""
        self._files.close()
        return npy_format.open_memmap(self._folder / f"{part}.npy", mode="r")

    @_told_apart()
    def commit(self, stats: CorpusStats, tokenizer: Tokenizer) -> None:
        """Complete the entry and put it in its place, unless another process has just done so."""
        self._files.close()
        description = {"stats": asdict(stats), "tokenizer": tokenizer.state()}
        with (self._folder / "stats.json").open("w", encoding="utf-8") as file:
            json.dump(description, file)
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

    @_told_apart()
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove what has not been committed."""
        try:
            self._files.__exit__(kind, error, trace)
        finally:
            self._discard()

    def _discard(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def read_entry(entry: Path, tokenizer: Tokenizer | None) -> EncodedCorpus | None:
    """Open an entry without reading its tokens; None if there is none.

    `tokenizer` is the one that the entry was made with, if it is at hand; None: it is rebuilt from the entry.
    A damaged entry (something missing, cut short, unreadable) counts as none: it is removed, with a warning.
    """
    try:
        return open_entry(entry, tokenizer) if entry.is_dir() else None
    except DAMAGE as error:
        log.warning("the cached tokens in %s are damaged (%s): they are made again", entry, error)
        _remove(entry)
        return None


def open_entry(entry: Path, tokenizer: Tokenizer | None = None) -> EncodedCorpus:
    """The same, touching nothing. Raises one of DAMAGE where there is no entry, or a damaged one."""
    description = json.loads((entry / "stats.json").read_text(encoding="utf-8"))
    stats = CorpusStats(**description["stats"])
    fitted = tokenizer or tokenizer_from_state(description["tokenizer"])
    dtype = token_dtype(fitted.vocab_size)
    train = open_tokens(entry / "train.npy", dtype=dtype, length=stats.train_tokens)
    val = open_tokens(entry / "val.npy", dtype=dtype, length=stats.val_tokens)
    return EncodedCorpus(train=train, val=val, tokenizer=fitted, stats=stats)


def _remove(entry: Path) -> None:
    """Remove an entry in one step: another process sees it whole or not at all."""
    doomed = entry.with_name(f"{entry.name}.{uuid.uuid4().hex}.damaged")
    try:
        entry.rename(doomed)
    except OSError as error:
        log.warning("cannot remove %s: %s", entry, error)
    else:
        shutil.rmtree(doomed, ignore_errors=True)
