"""From a corpus to token arrays, once: the result is kept in the cache and opened from there."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gptpl.data.pretraining.token_cache import (
    DAMAGE,
    PARTS,
    CorpusStats,
    EncodedCorpus,
    Part,
    ShardedTokens,
    Tokens,
    keep,
    open_entry,
    token_dtype,
)
from gptpl.data.sources import Corpus
from gptpl.data.sources.base import grouped
from gptpl.data.splits import check_ratios
from gptpl.errors import InputError
from gptpl.files.download import cache_dir as default_cache_dir
from gptpl.tokenizers import Tokenizer

log = logging.getLogger(__name__)

FORMAT_VERSION = 1  # raise it when the same text would be encoded, or stored, in another way
BATCH_CHARACTERS = 1 << 22  # text given to the tokenizer at a time; no document is cut for it
BLOCK_TOKENS = 32  # a power of two
CHUNK_TOKENS = 1 << 20  # tokens hashed at a time, whole blocks: about 8 MB an array
# Odd, so that a multiplication loses no bit modulo 2^64.
_BASE = 0x9E3779B97F4A7C15
_SPREAD = 0xBF58476D1CE4E5B9
_MODULUS_MASK = (1 << 64) - 1


def encode_corpus(
    corpus: Corpus, tokenizer: Tokenizer, *, train_ratio: float, cache_dir: Path | None = None
) -> EncodedCorpus:
    """Encode both splits of a corpus, or open them from the cache.

    The first `train_ratio` of the characters are training text, the rest validation text; each is encoded by
    itself, documents joined by the one end-of-text token. A tokenizer without a vocabulary takes it from the
    whole text, as in the book (so that no validation word is unknown).

    The cache is `cache_dir` (default: the project's cache folder). Processes that want the same text wait for
    the one that encodes it. A damaged entry is encoded again; what the disk does not take stays in memory;
    both are logged. Raises InputError for a ratio outside (0, 1), and as the corpus and the tokenizer.
    """
    check_ratios(train_ratio=train_ratio)
    content_sha256 = corpus.content_sha256()
    vocabulary = vocabulary_sha256(tokenizer)
    entry = _entry(cache_dir, content_sha256, tokenizer.name, vocabulary, train_ratio)
    known = tokenizer if vocabulary else None
    with suppress(*DAMAGE):
        return open_entry(entry, known)
    with alone(entry):
        try:
            return open_entry(entry, known)
        except DAMAGE as damage:
            if (entry / "stats.json").exists():
                log.warning(
                    "the cached tokens in %s cannot be used (%s): the text is encoded again", entry, damage
                )
        log.info("encoding the corpus %s with the %s tokenizer", corpus.name, tokenizer.name)
        encoded = encode_in_memory(corpus, tokenizer, content_sha256=content_sha256, train_ratio=train_ratio)
        return keep(entry, encoded)


def cached_corpus(
    content_sha256: str, tokenizer: Tokenizer, *, train_ratio: float, cache_dir: Path | None = None
) -> EncodedCorpus | None:
    """The text of that hash in the tokens of a tokenizer with a vocabulary, if the cache has it.

    Nothing is written or removed: the hash may come from anybody.
    """
    for vocabulary in (tokenizer.sha256, None):  # None: that of the text
        entry = _entry(cache_dir, content_sha256, tokenizer.name, vocabulary, train_ratio)
        with suppress(*DAMAGE):
            found = open_entry(entry)
            if found.tokenizer.sha256 == tokenizer.sha256:
                return found
    return None


def encode_in_memory(
    corpus: Corpus, tokenizer: Tokenizer, *, content_sha256: str, train_ratio: float
) -> EncodedCorpus:
    """As `encode_corpus`, without the cache, for a corpus whose `content_sha256()` is known."""
    check_ratios(train_ratio=train_ratio)
    lengths = [len(document) for document in corpus.documents()]
    fitted = tokenizer.fitted_to(corpus.documents())
    train_characters = int(train_ratio * sum(lengths))  # rounded down, as in the book
    dtype = token_dtype(fitted.vocab_size)
    end_of_text = np.array([fitted.eot_id], dtype).tobytes()
    data: dict[Part, bytearray] = {part: bytearray() for part in PARTS}
    documents: Counter[Part] = Counter()
    pieces = split_documents(corpus.documents(), train_characters=train_characters)
    for batch in grouped(pieces, lambda piece: len(piece[1]), BATCH_CHARACTERS):
        encoded = fitted.encode_many([text for _, text in batch])
        for (part, _), tokens in zip(batch, encoded, strict=True):
            if documents[part]:
                data[part] += end_of_text
            data[part] += tokens.astype(dtype).tobytes()
            documents[part] += 1
    train, val = (np.frombuffer(data[part], dtype) for part in PARTS)
    duplicated, compared = count_duplicates(train, val)
    stats = CorpusStats(
        documents=len(lengths),
        train_documents=documents["train"],
        val_documents=documents["val"],
        train_characters=train_characters,
        val_characters=sum(lengths) - train_characters,
        train_tokens=len(train),
        val_tokens=len(val),
        duplicate_blocks=duplicated,
        compared_blocks=compared,
        content_sha256=content_sha256,
    )
    return EncodedCorpus(train=train, val=val, tokenizer=fitted, stats=stats)


def vocabulary_sha256(tokenizer: Tokenizer) -> str | None:
    """The hash of the vocabulary; None: it will be made from the text."""
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


@contextmanager
def alone(entry: Path) -> Iterator[None]:
    """Make other processes that want the same entry wait, where the file system has locks."""
    import filelock

    lock = filelock.FileLock(f"{entry}.lock")
    with suppress(OSError, NotImplementedError):  # without the lock the last one's entry counts
        entry.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            log.info("waiting for another process that encodes the same text")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def split_documents(documents: Iterable[str], *, train_characters: int) -> Iterator[tuple[Part, str]]:
    """Yield every document, in order, with its split; the one that the cut falls into comes as two.

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


# --- validation text that also occurs in the training text ----------------------------------------------


def count_duplicates(train: Tokens | ShardedTokens, val: Tokens) -> tuple[int, int]:
    """How many non-overlapping validation blocks occur verbatim, at any offset, in training; and of how many.

    Validation text that a model has read during training does not test it.

    A last, shorter block is not counted, nor is anything found in a training split shorter than a block.
    Blocks are compared by a rolling polynomial hash modulo 2^64: the work is linear in the tokens, the memory
    bounded, and two different blocks have the same hash with a probability of about 2^-64.
    """
    whole = val[: len(val) // BLOCK_TOKENS * BLOCK_TOKENS]
    parts = (whole[start : start + CHUNK_TOKENS] for start in range(0, len(whole), CHUNK_TOKENS))
    blocks = [_rolling_hashes(part)[::BLOCK_TOKENS] for part in parts]
    if not blocks:
        return 0, 0
    hashes, inverse = np.unique(np.concatenate(blocks), return_inverse=True)
    # Most training positions match nothing: a table of the top bits dismisses them without a binary search.
    shift = np.uint64(64 - min(26, len(hashes).bit_length() + 5))
    table = np.zeros(1 << (64 - int(shift)), dtype=bool)
    table[hashes >> shift] = True
    seen = np.zeros(len(hashes), dtype=bool)
    for start in range(0, max(0, len(train) - BLOCK_TOKENS + 1), CHUNK_TOKENS):
        rolled = _rolling_hashes(train[start : start + CHUNK_TOKENS + BLOCK_TOKENS - 1])
        candidates = rolled[table[rolled >> shift]]
        places = np.searchsorted(hashes, candidates).clip(max=len(hashes) - 1)
        seen[places[hashes[places] == candidates]] = True
    return int(seen[inverse].sum()), len(inverse)


def _rolling_hashes(tokens: Tokens) -> NDArray[np.uint64]:
    """Hashes of the block from every position on, by doubling: h_2k[i] = h_k[i] b^k + h_k[i + k]."""
    hashes = tokens.astype(np.uint64) * np.uint64(_SPREAD)
    power, width = _BASE, 1
    while width < BLOCK_TOKENS:
        hashes = hashes[:-width] * np.uint64(power) + hashes[width:]
        power, width = power * power & _MODULUS_MASK, 2 * width
    return hashes
