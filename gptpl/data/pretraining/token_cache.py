"""Encoded corpora, in memory and on disk, where each is one folder, an entry: complete or absent.

An entry holds `train.npy`, `val.npy` and `stats.json` (counts, tokenizer's state). Each file is written under
another name next to its place, and renamed when it is on disk, `stats.json` last: neither an interrupted run
nor two runs at once leave half an entry.
"""

import json
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from gptpl.files.durable import new_file, write_atomically
from gptpl.tokenizers import Tokenizer, tokenizer_from_state

log = logging.getLogger(__name__)

Tokens = NDArray[np.unsignedinteger]
Part = Literal["train", "val"]
PARTS: tuple[Part, ...] = get_args(Part)
DAMAGE = (OSError, ValueError, KeyError, TypeError)
"""What opening a missing or damaged entry raises."""
_ABANDONED = 24 * 3600  # seconds
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
            tokens = _mapped(self._paths[shard], self.dtype, self._lengths[shard])
            parts.append(tokens[start - first : stop - first])
            start, shard = int(self._ends[shard]), shard + 1
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self.dtype), *parts])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self[:], dtype)

    @property
    def identity(self) -> list[str | int]:
        """The files' names in the cache, which are never written again, and their lengths."""
        return [*("/".join(Path(path).parts[-3:]) for path in self._paths), *self._lengths]


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


AnyCorpus = EncodedCorpus | ShardedCorpus


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """The smallest type that holds every token: two bytes up to 65,536 tokens, else four."""
    return np.dtype(np.uint16) if vocab_size <= 1 << 16 else np.dtype(np.uint32)


def keep(entry: Path, encoded: EncodedCorpus) -> EncodedCorpus:
    """Write an entry and open it. Where that fails the corpus stays in memory, with a warning."""
    try:
        entry.mkdir(parents=True, exist_ok=True)
        for left in entry.parent.glob("*/.*.tmp"):  # by a process that was killed, if it is a day old
            with suppress(OSError):  # another process removes it, or has just finished it
                if time.time() - left.stat().st_mtime > _ABANDONED:
                    left.unlink()
        for part, tokens in zip(PARTS, (encoded.train, encoded.val), strict=True):
            with new_file(entry / f"{part}.npy", durable=True) as file:
                np.save(file, tokens)
        description = {"stats": asdict(encoded.stats), "tokenizer": encoded.tokenizer.state()}
        write_atomically(entry / "stats.json", json.dumps(description), durable=True)
        return open_entry(entry, encoded.tokenizer)
    except DAMAGE as error:
        log.warning(
            "cannot keep the encoded corpus in %s (%s): its tokens stay in memory, and every run encodes it"
            " again; set GPTPL_CACHE to a folder that can be written",
            entry.parent,
            error,
        )
        return encoded


def open_entry(entry: Path, tokenizer: Tokenizer | None = None) -> EncodedCorpus:
    """Open an entry without reading its tokens. Raises one of DAMAGE for a missing or damaged one.

    `tokenizer` is the one that it was made with, if it is at hand; None: it is rebuilt from the entry.
    """
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
