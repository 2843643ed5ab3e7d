"""Encoded corpora, in memory and on disk, where each is one folder, an entry: complete or absent.

An entry holds `train.npy`, `val.npy` and `stats.json` (counts, tokenizer's state). It is written under
another name next to its place, and renamed when everything is on disk: neither an interrupted run nor two
runs at once leave half an entry.
"""

import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from gptpl.errors import InputError
from gptpl.files.durable import sync_folder
from gptpl.tokenizers import Tokenizer, tokenizer_from_state

log = logging.getLogger(__name__)

Tokens = NDArray[np.unsignedinteger]
Part = Literal["train", "val"]
PARTS: tuple[Part, ...] = get_args(Part)
DAMAGE = (OSError, ValueError, KeyError, TypeError)
"""What opening a missing or damaged entry raises."""
_ABANDONED = 24 * 3600  # seconds
_HEADER_BYTES = 128
_OPEN_SHARDS = 128


class ShardedTokens:
    """Files of tokens as one sequence, (N,): it has a length and slices, and numpy makes an array of it."""

    def __init__(
        self, paths: Sequence[Path], lengths: Sequence[int], dtype: np.dtype[np.unsignedinteger]
    ) -> None:
        self.dtype = dtype
        self._paths = [str(path) for path in paths]
        self._lengths = list(lengths)
        self._ends = np.cumsum(lengths, dtype=np.int64)

    @classmethod
    def joined(cls, parts: Sequence["ShardedTokens"]) -> Self:
        """The tokens of several, of one type, one after the other."""
        paths = [Path(path) for part in parts for path in part._paths]
        return cls(paths, [length for part in parts for length in part._lengths], parts[0].dtype)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._lengths else 0

    def __getitem__(self, places: slice) -> Tokens:
        start, stop, step = places.indices(len(self))
        if step != 1:
            raise ValueError(f"tokens are read one after the other, got a step of {step}")
        parts = []
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            first = int(self._ends[shard]) - self._lengths[shard]
            parts.append(self._shard(shard)[start - first : stop - first])
            start, shard = int(self._ends[shard]), shard + 1
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self.dtype), *parts])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self[:], dtype)

    @property
    def identity(self) -> list[str | int]:
        """The files' names in the cache, which are never written again, and their lengths."""
        return [*("/".join(Path(path).parts[-3:]) for path in self._paths), *self._lengths]

    def _shard(self, number: int) -> Tokens:
        return _mapped(self._paths[number], self.dtype, self._lengths[number])


@lru_cache(maxsize=_OPEN_SHARDS)
def _mapped(path: str, dtype: np.dtype[np.unsignedinteger], length: int) -> Tokens:
    """The tokens of a file; all corpora of a process together keep so many open."""
    return np.memmap(path, dtype, "r", shape=(length,))


@dataclass(frozen=True, kw_only=True)
class CorpusStats:
    """Counts of a corpus and of its two splits.

    A document that is cut in two counts in both splits. Characters are those of the documents, tokens
    include the end-of-text tokens between documents. Of `compared_blocks` blocks of 32 validation tokens,
    `duplicate_blocks` occur verbatim in the training split, of which `searched_tokens` were looked at (None:
    all).
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
    searched_tokens: int | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedCorpus:
    """Both splits as 1-D arrays of `token_dtype`, memory-mapped from the cache, and their tokenizer."""

    train: Tokens
    val: Tokens
    tokenizer: Tokenizer
    stats: CorpusStats


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardedCorpus:
    """As `EncodedCorpus`, of training tokens in many files."""

    train: ShardedTokens
    val: Tokens
    tokenizer: Tokenizer
    stats: CorpusStats


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """The smallest type that holds every token: two bytes up to 65,536 tokens, else four."""
    return np.dtype(np.uint16) if vocab_size <= 1 << 16 else np.dtype(np.uint32)


class TokenSink:
    """Collects the tokens of both splits, for an entry of the cache or, with none, in memory.

    Where the disk takes no more, what it has is read back and the rest collected in memory: `failure` is then
    the error. A context manager, which removes what is not committed.
    """

    def __init__(self, entry: Path | None, dtype: np.dtype[np.unsignedinteger]) -> None:
        self.failure: Exception | None = None
        self._entry = entry
        self._dtype = dtype
        self._lengths: dict[Part, int] = dict.fromkeys(PARTS, 0)  # complete in the file, also after a failure
        self._files: dict[Part, FileIO] = {}
        self._memory: dict[Part, list[Tokens]] = {part: [np.empty(0, dtype)] for part in PARTS}
        if entry is None:
            return
        self._folder = self._draft = entry.with_name(f"{entry.name}.{uuid.uuid4().hex}.partial")
        try:
            self._draft.mkdir(parents=True)
            for part in PARTS:
                # Unbuffered, or a failure would not show with the tokens that were lost.
                self._files[part] = self._path(part).open("xb", buffering=0)
                self._write_header(part)
        except OSError as error:
            self._to_memory(error)
        else:
            _remove_abandoned(entry.parent)

    def append(self, part: Part, tokens: Tokens) -> None:
        """Add 1-D `tokens` to a split."""
        tokens = tokens.astype(self._dtype)
        if self._files:
            try:
                data = memoryview(tokens.tobytes())
                while data:  # a disk that is nearly full takes a part first
                    data = data[self._files[part].write(data) :]
                self._lengths[part] += len(tokens)
                return
            except OSError as error:
                self._to_memory(error)
        self._memory[part].append(tokens)

    def tokens(self) -> tuple[Tokens, Tokens]:
        """Both splits, complete; from files once these are on disk (fsync)."""
        try:
            for part, file in self._files.items():
                file.seek(0)
                self._write_header(part)
                os.fsync(file.fileno())
            if self._files:
                train, val = (npy_format.open_memmap(self._path(part), mode="r") for part in PARTS)
                return train, val
        except OSError as error:
            self._to_memory(error)
        return np.concatenate(self._memory["train"]), np.concatenate(self._memory["val"])

    def committed(self, stats: CorpusStats, tokenizer: Tokenizer) -> EncodedCorpus:
        """The corpus, from its entry, which is put in its place unless another process has done so."""
        try:
            if self._files and self._entry is not None:
                self._commit(self._entry, stats, tokenizer)
                return open_entry(self._entry, tokenizer)
        except DAMAGE as error:  # of another's entry, too, which is there and cannot be removed
            self._to_memory(error)
        train, val = self.tokens()
        return EncodedCorpus(train=train, val=val, tokenizer=tokenizer, stats=stats)

    def _commit(self, entry: Path, stats: CorpusStats, tokenizer: Tokenizer) -> None:
        with (self._draft / "stats.json").open("w", encoding="utf-8") as file:
            json.dump({"stats": asdict(stats), "tokenizer": tokenizer.state()}, file)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self._draft)
        self._close()  # Windows renames no folder with an open file in it
        try:
            self._draft.rename(entry)
        except OSError:
            if not entry.is_dir():
                raise
        else:
            self._folder = entry
        sync_folder(entry.parent)

    def _path(self, part: Part) -> Path:
        return self._folder / f"{part}.npy"

    def _write_header(self, part: Part) -> None:
        """NumPy leaves room for a larger length: the header has 128 bytes whatever the length."""
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._lengths[part],)}
        npy_format.write_array_header_1_0(self._files[part], header)

    def _to_memory(self, error: Exception) -> None:
        self.failure = error
        self._close()
        for part, length in self._lengths.items() if self._files else ():
            try:
                found = np.fromfile(self._path(part), self._dtype, length, offset=_HEADER_BYTES)
            except OSError:
                found = np.empty(0, self._dtype)
            if len(found) != length:
                raise InputError(f"{self._path(part)} cannot be read back: set GPTPL_CACHE to another disk")
            self._memory[part].append(found)
        self._files = {}
        shutil.rmtree(self._draft, ignore_errors=True)

    def _close(self) -> None:
        for file in self._files.values():
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        if self._entry is not None:
            shutil.rmtree(self._draft, ignore_errors=True)


def _remove_abandoned(cache: Path) -> None:
    """Remove drafts of processes that were killed: nothing has been written to them for a day."""
    for draft in cache.glob("*.partial"):
        with suppress(OSError):  # another process removes it, or has just finished it
            if time.time() - max(path.stat().st_mtime for path in (draft, *draft.iterdir())) > _ABANDONED:
                shutil.rmtree(draft)
                log.info("removed %s, which a killed process had left", draft)


def read_entry(entry: Path, tokenizer: Tokenizer | None) -> EncodedCorpus | None:
    """Open an entry without reading its tokens; None if there is none.

    `tokenizer` is the one that the entry was made with, if it is at hand; None: it is rebuilt from the entry.
    A damaged entry (incomplete, cut short, of another type) is removed, with a warning. One that the system
    cannot read now, for example with too many open files, stays where it is.
    """
    try:
        return open_entry(entry, tokenizer) if entry.is_dir() else None
    except (FileNotFoundError, ValueError, KeyError, TypeError) as damage:
        log.warning("the cached tokens in %s are damaged (%s): the text is encoded again", entry, damage)
    except OSError as error:
        log.warning("the cached tokens in %s cannot be read (%s): the text is encoded again", entry, error)
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
    """As `read_entry`, but remove nothing, and raise one of DAMAGE for a missing or damaged entry."""
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
