"""From a corpus to token arrays, once: the result is kept in the cache and opened from there."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptpl.data.corpora import Corpus
from gptpl.data.duplicates import count_duplicates
from gptpl.data.encoded_corpus import CorpusStats, EncodedCorpus
from gptpl.data.split import PARTS, Part, check_train_ratio, split_documents, training_characters
from gptpl.data.token_cache import DAMAGE, CacheUnwritableError, DraftEntry, open_entry, read_entry
from gptpl.data.token_file import Tokens, token_dtype
from gptpl.data.tokenizers import Tokenizer
from gptpl.errors import InputError
from gptpl.files.download import cache_dir as default_cache_dir

log = logging.getLogger(__name__)

FORMAT_VERSION = 1  # raise it when the same text would be encoded, or stored, in another way
BATCH_CHARACTERS = 1 << 22  # text given to the tokenizer at a time; a document is never cut for it


def encode_corpus(
    corpus: Corpus, tokenizer: Tokenizer, *, train_ratio: float, cache_dir: Path | None = None
) -> EncodedCorpus:
    """Encode both splits of a corpus, or open them from the cache if that has been done before.

    The first `train_ratio` of the characters are training text, the rest validation text; each is encoded by
    itself, documents joined by the one end-of-text token. A tokenizer without a vocabulary takes it from the
    whole text, as in the book (so that no validation word is unknown).

    The cache is `cache_dir` (default: the project's cache folder); the key of an entry is made of content,
    tokenizer and ratio. A damaged entry is made again; with a cache that cannot be written the tokens
    stay in memory; both are logged. Raises InputError for a ratio outside (0, 1), and what the corpus and the
    tokenizer raise.
    """
    check_train_ratio(train_ratio)
    content_sha256 = corpus.content_sha256()
    vocabulary = _vocabulary_sha256(tokenizer)
    key = _cache_key(content_sha256, tokenizer.name, vocabulary, train_ratio)
    entry = _folder(cache_dir) / key
    fitted = tokenizer if vocabulary else None
    if (cached := read_entry(entry, fitted)) is not None:
        return cached
    log.info("encoding the corpus %s with the %s tokenizer", corpus.name, tokenizer.name)
    source = _survey(corpus, tokenizer, train_ratio, content_sha256)
    try:
        _encode_into_cache(source, entry)
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
        entry = _folder(cache_dir) / _cache_key(content_sha256, tokenizer.name, vocabulary, train_ratio)
        with suppress(*DAMAGE):
            found = open_entry(entry)
            if found.tokenizer.sha256 == tokenizer.sha256:
                return found
    return None


def encode_in_memory(corpus: Corpus, tokenizer: Tokenizer, *, train_ratio: float) -> EncodedCorpus:
    """What `encode_corpus` gives, without the cache."""
    return _encode_in_memory(_survey(corpus, tokenizer, train_ratio, corpus.content_sha256()))


def _folder(cache_dir: Path | None) -> Path:
    return (cache_dir or default_cache_dir()) / "encoded"


@dataclass(frozen=True, kw_only=True)
class _Source:
    """A corpus read once: its tokenizer fitted and its characters counted."""

    corpus: Corpus
    tokenizer: Tokenizer
    content_sha256: str
    documents: int
    characters: int
    train_characters: int


def _vocabulary_sha256(tokenizer: Tokenizer) -> str | None:
    """Return the hash of the vocabulary; None when there is none yet, and the content will decide it."""
    try:
        return tokenizer.sha256
    except InputError:  # how a tokenizer says that it has not been fitted
        return None


def _cache_key(content_sha256: str, tokenizer: str, vocabulary: str | None, train_ratio: float) -> str:
    identity = [FORMAT_VERSION, content_sha256, tokenizer, vocabulary, train_ratio]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def _survey(corpus: Corpus, tokenizer: Tokenizer, train_ratio: float, content_sha256: str) -> _Source:
    lengths = [len(document) for document in corpus.documents()]
    characters = sum(lengths)
    return _Source(
        corpus=corpus,
        tokenizer=tokenizer.fitted_to(corpus.documents()),
        content_sha256=content_sha256,
        documents=len(lengths),
        characters=characters,
        train_characters=training_characters(characters, train_ratio=train_ratio),
    )


def _encode_into_cache(source: _Source, entry: Path) -> None:
    with DraftEntry(entry, token_dtype(source.tokenizer.vocab_size)) as draft:
        documents = _encode(source, draft.append)
        stats = _stats(source, documents, draft.written("train"), draft.written("val"))
        draft.commit(stats, source.tokenizer)


def _encode_in_memory(source: _Source) -> EncodedCorpus:
    dtype = token_dtype(source.tokenizer.vocab_size)
    pieces: dict[Part, list[Tokens]] = {part: [np.empty(0, dtype)] for part in PARTS}
    documents = _encode(source, lambda part, tokens: pieces[part].append(tokens.astype(dtype)))
    train, val = np.concatenate(pieces["train"]), np.concatenate(pieces["val"])
    stats = _stats(source, documents, train, val)
    return EncodedCorpus(train=train, val=val, tokenizer=source.tokenizer, stats=stats)


def _encode(source: _Source, append: Callable[[Part, Tokens], None]) -> Counter[Part]:
    """Give the tokens of both splits to `append`, in order; return the number of documents in each."""
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
    """Group the pieces of the corpus into batches of BATCH_CHARACTERS or a little more."""
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


def _stats(source: _Source, documents: Counter[Part], train: Tokens, val: Tokens) -> CorpusStats:
    duplicates = count_duplicates(train, val)
    return CorpusStats(
        documents=source.documents,
        train_documents=documents["train"],
        val_documents=documents["val"],
        train_characters=source.train_characters,
        val_characters=source.characters - source.train_characters,
        train_tokens=len(train),
        val_tokens=len(val),
        duplicate_blocks=duplicates.duplicated,
        compared_blocks=duplicates.blocks,
        content_sha256=source.content_sha256,
    )
