"""From a corpus to token arrays, once: the result is kept in the cache and opened from there."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gptpl.data.pretraining.token_cache import (
    DAMAGE,
    PARTS,
    CacheUnwritableError,
    CorpusStats,
    DraftEntry,
    EncodedCorpus,
    Part,
    Tokens,
    open_entry,
    read_entry,
    token_dtype,
)
from gptpl.data.sources import Corpus
from gptpl.errors import InputError
from gptpl.files.download import cache_dir as default_cache_dir
from gptpl.tokenizers import Tokenizer

log = logging.getLogger(__name__)

FORMAT_VERSION = 1  # raise it when the same text would be encoded, or stored, in another way
BATCH_CHARACTERS = 1 << 22  # text given to the tokenizer at a time; a document is never cut for it
BLOCK_TOKENS = 32
CHUNK_TOKENS = 1 << 20  # tokens hashed at a time: about 8 MB an array
# Odd, so that a multiplication loses no bit modulo 2^64.
_BASE = 0x9E3779B97F4A7C15
_SPREAD = 0xBF58476D1CE4E5B9
_MODULUS_MASK = (1 << 64) - 1


def encode_corpus(
    corpus: Corpus, tokenizer: Tokenizer, *, train_ratio: float, cache_dir: Path | None = None
) -> EncodedCorpus:
    """Encode both splits of a corpus, or open them from the cache if that has been done before.

    The first `train_ratio` of the characters are training text, the rest validation text; each is encoded by
    itself, documents joined by the one end-of-text token. A tokenizer without a vocabulary takes it from the
    whole text, as in the book (so that no validation word is unknown).

    The cache is `cache_dir` (default: the project's cache folder). A damaged entry is made again; with a
    cache that cannot be written the tokens stay in memory; both are logged. Raises InputError for a ratio
    outside (0, 1), and what the corpus and the tokenizer raise.
    """
    content_sha256 = corpus.content_sha256()
    vocabulary = _vocabulary_sha256(tokenizer)
    entry = _entry(cache_dir, content_sha256, tokenizer.name, vocabulary, train_ratio)
    if (cached := read_entry(entry, tokenizer if vocabulary else None)) is not None:
        return cached
    log.info("encoding the corpus %s with the %s tokenizer", corpus.name, tokenizer.name)
    source = _survey(corpus, tokenizer, train_ratio, content_sha256)
    try:
        with DraftEntry(entry, token_dtype(source.tokenizer.vocab_size)) as draft:
            documents = _encode(source, draft.append)
            draft.commit(_stats(source, documents, *draft.written()), source.tokenizer)
    except CacheUnwritableError as error:
        log.warning(
            "cannot keep the encoded corpus in %s (%s): encoding it in memory, and again in every run; "
            "set GPTPL_CACHE to a folder that can be written",
            entry.parent,
            error,
        )
        return _encode_in_memory(source)
    return read_entry(entry, source.tokenizer) or _encode_in_memory(source)


def cached_corpus(
    content_sha256: str, tokenizer: Tokenizer, *, train_ratio: float, cache_dir: Path | None = None
) -> EncodedCorpus | None:
    """The text of that hash in the tokens of a tokenizer with a vocabulary, if the cache has it.

    Nothing is written or removed: who asks may have the hash from anybody.
    """
    for vocabulary in (tokenizer.sha256, None):  # None: the text has given it
        entry = _entry(cache_dir, content_sha256, tokenizer.name, vocabulary, train_ratio)
        with suppress(*DAMAGE):
            found = open_entry(entry)
            if found.tokenizer.sha256 == tokenizer.sha256:
                return found
    return None


def encode_in_memory(corpus: Corpus, tokenizer: Tokenizer, *, train_ratio: float) -> EncodedCorpus:
    """What `encode_corpus` gives, without the cache."""
    return _encode_in_memory(_survey(corpus, tokenizer, train_ratio, corpus.content_sha256()))


def check_train_ratio(train_ratio: float) -> None:
    """Raise InputError unless `train_ratio` lies strictly between 0 and 1."""
    if not 0 < train_ratio < 1:
        raise InputError(
            f"data.train_ratio={train_ratio} leaves nothing for one of the two splits: "
            "give the share of the text to train on, between 0 and 1, such as 0.9"
        )


def _vocabulary_sha256(tokenizer: Tokenizer) -> str | None:
    """The hash of the vocabulary; None when there is none yet, and the content will decide it."""
    try:
        return tokenizer.sha256
    except InputError:  # how a tokenizer says that it has not been fitted
        return None


def _entry(
    cache_dir: Path | None, content_sha256: str, tokenizer: str, vocabulary: str | None, train_ratio: float
) -> Path:
    identity = [FORMAT_VERSION, content_sha256, tokenizer, vocabulary, train_ratio]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    return (cache_dir or default_cache_dir()) / "encoded" / key


# --- encoding -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Source:
    """A corpus read once: its tokenizer fitted and its characters counted."""

    corpus: Corpus
    tokenizer: Tokenizer
    content_sha256: str
    documents: int
    characters: int
    train_characters: int


def _survey(corpus: Corpus, tokenizer: Tokenizer, train_ratio: float, content_sha256: str) -> _Source:
    check_train_ratio(train_ratio)
    lengths = [len(document) for document in corpus.documents()]
    characters = sum(lengths)
    return _Source(
        corpus=corpus,
        tokenizer=tokenizer.fitted_to(corpus.documents()),
        content_sha256=content_sha256,
        documents=len(lengths),
        characters=characters,
        train_characters=int(train_ratio * characters),  # rounded down, as in the book
    )


def _encode_in_memory(source: _Source) -> EncodedCorpus:
    dtype = token_dtype(source.tokenizer.vocab_size)
    pieces: dict[Part, list[Tokens]] = {part: [np.empty(0, dtype)] for part in PARTS}
    documents = _encode(source, lambda part, tokens: pieces[part].append(tokens.astype(dtype)))
    train, val = np.concatenate(pieces["train"]), np.concatenate(pieces["val"])
    stats = _stats(source, documents, train, val)
    return EncodedCorpus(train=train, val=val, tokenizer=source.tokenizer, stats=stats)


def _encode(source: _Source, append: Callable[[Part, Tokens], None]) -> Counter[Part]:
    """Gives the tokens of both splits to `append`, in order; returns the number of documents in each."""
    end_of_text = np.array([source.tokenizer.eot_id], dtype=np.uint32)
    documents: Counter[Part] = Counter()
    for batch in _batches(source):
        for (part, _), tokens in zip(batch, source.tokenizer.encode_many([t for _, t in batch]), strict=True):
            if documents[part]:
                append(part, end_of_text)
            append(part, tokens)
            documents[part] += 1
    return documents


def _batches(source: _Source) -> Iterator[list[tuple[Part, str]]]:
    """The pieces of the corpus in batches of BATCH_CHARACTERS or a little more."""
    batch: list[tuple[Part, str]] = []
    waiting = 0
    for piece in split_documents(source.corpus.documents(), train_characters=source.train_characters):
        batch.append(piece)
        waiting += len(piece[1])
        if waiting >= BATCH_CHARACTERS:
            yield batch
            batch, waiting = [], 0
    if batch:
        yield batch


def split_documents(documents: Iterable[str], *, train_characters: int) -> Iterator[tuple[Part, str]]:
    """Yield every document, in order, with the part it belongs to; the one the cut falls into comes as two.

    The first `train_characters` characters of the documents, counted without anything between them, are
    the training text. No piece is empty, so that a cut between two documents leaves no stray separator.
    """
    left = train_characters
    for document in documents:
        head, tail = document[:left], document[left:]
        left -= len(head)
        if head:
            yield "train", head
        if tail:
            yield "val", tail


def _stats(source: _Source, documents: Counter[Part], train: Tokens, val: Tokens) -> CorpusStats:
    duplicated, compared = count_duplicates(train, val)
    return CorpusStats(
        documents=source.documents,
        train_documents=documents["train"],
        val_documents=documents["val"],
        train_characters=source.train_characters,
        val_characters=source.characters - source.train_characters,
        train_tokens=len(train),
        val_tokens=len(val),
        duplicate_blocks=duplicated,
        compared_blocks=compared,
        content_sha256=source.content_sha256,
    )


# --- validation text that stands in the training text, too ----------------------------------------------


def count_duplicates(
    train: Tokens, val: Tokens, *, block_tokens: int = BLOCK_TOKENS, chunk_tokens: int = CHUNK_TOKENS
) -> tuple[int, int]:
    """How many non-overlapping validation blocks occur verbatim, at any offset, in training; and of how many.

    A model that has read validation text during training is not tested by it.

    `block_tokens` must be a power of two. A last, shorter block is not counted, nor is anything found in a
    training split shorter than a block. Blocks are compared by a rolling polynomial hash modulo 2^64, so that
    the work is linear in the tokens and the memory bounded; two different ones share a hash with a chance of
    about 2^-64.
    """
    if block_tokens < 1 or block_tokens & (block_tokens - 1):
        raise ValueError(f"block_tokens={block_tokens} is not a power of two")
    whole = val[: len(val) // block_tokens * block_tokens]
    step = max(1, chunk_tokens // block_tokens) * block_tokens
    parts = (whole[start : start + step] for start in range(0, len(whole), step))
    blocks = [_rolling_hashes(part, block_tokens)[::block_tokens] for part in parts]
    if not blocks:
        return 0, 0
    hashes, inverse = np.unique(np.concatenate(blocks), return_inverse=True)
    # Most training positions match nothing: a table of the top bits dismisses them without a binary search.
    shift = np.uint64(64 - min(26, len(hashes).bit_length() + 5))
    table = np.zeros(1 << (64 - int(shift)), dtype=bool)
    table[hashes >> shift] = True
    seen = np.zeros(len(hashes), dtype=bool)
    for start in range(0, max(0, len(train) - block_tokens + 1), chunk_tokens):
        rolled = _rolling_hashes(train[start : start + chunk_tokens + block_tokens - 1], block_tokens)
        candidates = rolled[table[rolled >> shift]]
        places = np.searchsorted(hashes, candidates).clip(max=len(hashes) - 1)
        seen[places[hashes[places] == candidates]] = True
    return int(seen[inverse].sum()), len(inverse)


def _rolling_hashes(tokens: Tokens, size: int) -> NDArray[np.uint64]:
    """Of the `size` tokens from every position on, doubling: h_2k[i] = h_k[i] b^k + h_k[i + k]."""
    hashes = tokens.astype(np.uint64) * np.uint64(_SPREAD)
    power, width = _BASE, 1
    while width < size:
        hashes = hashes[:-width] * np.uint64(power) + hashes[width:]
        power, width = power * power & _MODULUS_MASK, 2 * width
    return hashes
