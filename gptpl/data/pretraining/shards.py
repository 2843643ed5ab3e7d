"""A corpus of any size as shards of tokens, encoded by several processes, and continued when interrupted.

An entry of the cache is a folder, with a folder in it for each state of the files by their times. A shard is
a job whose result does not depend on who does it, or when: `N.bin` has its training tokens,
`N.candidates.bin` and `N.npy` the sections that may become validation text, `N.json`, written last, counts
and hashes. When all are there, `val.bin` is chosen from the candidates, `rest.bin` has the others, and
`manifest.json` describes them.
"""

# U sections that may become validation text

import errno
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from gptpl.data.pretraining.encoding import alone, count_duplicates, vocabulary_sha256
from gptpl.data.pretraining.token_cache import (
    DAMAGE,
    CorpusStats,
    ShardedCorpus,
    ShardedTokens,
    Tokens,
    token_dtype,
)
from gptpl.data.sources import Corpus
from gptpl.data.sources.base import Files, Piece, Section, grouped, sampled
from gptpl.data.splits import check_ratios
from gptpl.errors import InputError
from gptpl.files.download import cache_dir as default_cache_dir
from gptpl.files.durable import new_file, write_atomically
from gptpl.settings import SIZE
from gptpl.text import bytes_text, count_text
from gptpl.tokenizers import Tokenizer, tokenizer_from_state
from gptpl.tokenizers.base import END_OF_TEXT

log = logging.getLogger(__name__)

Count = Callable[[int, int], None]

VERSION = 1
"""Raise it when the same text would be encoded, divided or stored in another way."""
LARGEST_SHARD = 400_000_000  # bytes of text, about 100 million tokens
SMALLEST_SHARD = 1 << 22
SHARDS = 32  # of a corpus between the two: enough for all processes to be done at about the same time
PER_TOKEN = 4
"""Characters that count as a validation token, whatever the tokenizer: all validate on the same text."""
SPARE = 4 * PER_TOKEN
"""Bytes of text that may become validation text, for each token of it."""
BATCH = 1 << 20  # characters encoded at a time
CANDIDATE = np.dtype([("hash", "<u8"), ("tokens", "<i8"), ("characters", "<i8"), ("whole", "?")])
"""A section that may become validation text; `whole`: it is a document."""
_LEAK_SAMPLE = 1 << 25  # training tokens that validation text is searched for in
_POOL = "GPTPL_ENCODING_POOL"
"""The process whose workers encode, who inherit it: one that runs its script again must not encode again."""


# ------------------------------------------------------------------------------------------- one shard


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What all shards of an entry are made with. Sections with a hash below `limit` are candidates."""

    corpus: Corpus
    tokenizer: Tokenizer
    folder: Path
    limit: int


def _encode_shard(work: _Work, number: int, pieces: Sequence[Piece], count: Count) -> None:
    """Write the files of a shard; `count` takes bytes of text and tokens."""
    folder, digests = work.folder, []
    with ExitStack() as stack:
        files = [
            stack.enter_context(new_file(folder / f"{number:06}{kind}", durable=True))
            for kind in (".bin", ".candidates.bin")
        ]
        writer = _ShardWriter(work, *files, within=pieces[0].within)
        for piece in pieces:
            digest, read = hashlib.sha256(), 0
            for section in work.corpus.sections(piece):
                own = _hash(section)
                digest.update(own)
                read += len(section.text)
                count(len(section.text), writer.add(section, own))
            count(piece.size - read, 0)
            digests.append(digest.hexdigest())
        count(0, writer.flush())
        with new_file(folder / f"{number:06}.npy", durable=True) as file:
            np.save(file, np.array(writer.candidates, CANDIDATE))
    entry = {"counts": writer.counts, "pieces": digests}
    write_atomically(folder / f"{number:06}.json", json.dumps(entry), durable=True)


def _hash(section: Section) -> bytes:
    """The hash of a section's text and of whether it ends its document; the first 8 bytes draw its side."""
    data = section.text.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(data, digest_size=16, person=b"end" if section.ends else b"").digest()


class _ShardWriter:
    """Divides sections into training text and candidates, and writes their tokens.

    `within`: the first section does not begin a document.
    """

    def __init__(self, work: _Work, train: BinaryIO, candidates: BinaryIO, *, within: bool) -> None:
        self._work, self._train, self._candidates = work, train, candidates
        self._dtype = token_dtype(work.tokenizer.vocab_size)
        self._texts: list[str] = []
        self._waiting = 0  # characters
        self._begun = within  # a document whose end is still to come
        self._open = within  # the training text ends within a document
        self.counts = dict.fromkeys(("documents", "blank", "train_characters", "train_tokens"), 0)
        self.candidates: list[tuple[int, int, int, bool]] = []

    def add(self, section: Section, own: bytes) -> int:
        """Take a section with its `_hash`; returns how many tokens were written."""
        text, ends = section
        begins, self._begun = not self._begun, not ends
        self.counts["documents"] += ends
        if not text:
            self.counts["blank"] += ends
            return 0
        drawn = int.from_bytes(own[:8], "little")
        if drawn < self._work.limit:
            tokens = self._work.tokenizer.encode(text + END_OF_TEXT).astype(self._dtype)
            self._candidates.write(tokens.tobytes())
            self.candidates.append((drawn, len(tokens), len(text), begins and ends))
            if self._open:  # what comes next does not follow what is before
                self._texts.append(END_OF_TEXT)
                self._open = False
            return len(tokens)
        self._texts.append(text)
        self._open = not ends
        if ends:
            self._texts.append(END_OF_TEXT)
        self.counts["train_characters"] += len(text)
        self._waiting += len(text)
        return self.flush() if self._waiting >= BATCH else 0

    def flush(self) -> int:
        """Encode what waits; returns the number of its tokens."""
        if not self._texts:
            return 0
        tokens = self._work.tokenizer.encode("".join(self._texts)).astype(self._dtype)
        self._train.write(tokens.tobytes())
        self.counts["train_tokens"] += len(tokens)
        self._texts, self._waiting = [], 0
        return len(tokens)


# ----------------------------------------------------------------------------------------- all shards


def encode_documents(
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    val_tokens: int,
    train_ratio: float = 0.9,
    workers: int | None = None,
    check: bool = False,
    cache_dir: Path | None = None,
) -> ShardedCorpus:
    """Encode a corpus of any size, or open it from the cache.

    Each document, or section of a long one, is training or validation text. A hash of its text decides:
    those with the lowest hashes are for validation, up to `val_tokens` times 4 characters and to the part of
    all characters that `train_ratio` leaves. So equal texts are on one side, texts that are added move few
    others, and every tokenizer validates on the same. The end-of-text token follows every document. A
    tokenizer without a vocabulary takes it from all.

    `workers` processes (None: one for each core) encode shards; whatever stops them, the next call continues
    with the shards that are missing. An entry is known by its files' names, sizes and times; where only times
    differ, and with `check`, the texts are read again and compared.

    Raises InputError for numbers out of range, where there is not text enough for both sides, where the disk
    is full, where a file changes meanwhile, and as the corpus.
    """
    check_ratios(train_ratio=train_ratio)
    SIZE.check("data.val_tokens", val_tokens)
    if workers is not None:
        SIZE.check("data.encode_workers", workers)
    if os.environ.get(_POOL, str(os.getpid())) != str(os.getpid()):
        raise InputError("an encoding process runs the script that started it, see the error of that one")
    files = corpus.listing()
    vocabulary = vocabulary_sha256(tokenizer)
    named = [(name, size) for name, size, _ in files]
    identity = [VERSION, corpus.reading, named, tokenizer.name, vocabulary, val_tokens, train_ratio]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    entry = (cache_dir or default_cache_dir()) / "shards" / key
    # A folder is never written again: a run that reads it may be running.
    folder = entry / hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]
    known = tokenizer if vocabulary else None
    if not check and (found := _open(folder, known)) is not None:
        return found
    with alone(entry):
        found = None if check else _open(folder, known)
        found = found or _with_same_texts(folder, known, corpus, files, check=check)
        if found is not None:
            return found
        fitted = tokenizer.fitted_to(sampled(corpus))
        try:
            return _encode(folder, corpus, fitted, files, val_tokens, train_ratio, workers)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise _full(entry, sum(size for _, size in named), fitted) from error


def _encode(
    folder: Path,
    corpus: Corpus,
    tokenizer: Tokenizer,
    files: Files,
    val_tokens: int,
    train_ratio: float,
    workers: int | None,
) -> ShardedCorpus:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot write {folder} ({error.strerror}): set GPTPL_CACHE to a folder that can be written"
        ) from error
    for left in folder.glob(".*.tmp"):  # by a killed process
        left.unlink(missing_ok=True)
    for other in folder.parent.iterdir():  # of files that have changed since
        if other != folder and not (other / "manifest.json").exists():
            shutil.rmtree(other, ignore_errors=True)
    pieces = corpus.pieces()
    if not pieces:
        raise InputError(f"{corpus.name} has no documents: give files with text in them")
    total = sum(piece.size for piece in pieces)
    share = SPARE * val_tokens / total if total else 1.0
    limit = min(1 << 64, int(share * (1 << 64)))
    work = _Work(corpus=corpus, tokenizer=tokenizer, folder=folder, limit=limit)
    enough = min(max(total // SHARDS, SMALLEST_SHARD), LARGEST_SHARD)
    shards = list(grouped(pieces, lambda piece: piece.size, enough))
    todo = {n: shard for n, shard in enumerate(shards) if not _is_done(work, n)}
    if shutil.disk_usage(folder).free < sum(piece.size for shard in todo.values() for piece in shard) // 8:
        raise _full(folder, total, tokenizer)
    log.info(
        "encoding %s (%s) with the %s tokenizer into %s%s",
        corpus.name, bytes_text(total), tokenizer.name, count_text(len(shards), "shard"),
        f", of which {len(shards) - len(todo)} are there" if len(todo) < len(shards) else "",
    )  # fmt: skip
    if todo:
        _encode_shards(work, todo, workers or _cores())
    if (now := corpus.listing()) != files:
        changed = next(iter(set(files) ^ set(now)))[0]
        raise InputError(f"{changed} has changed while {corpus.name} was encoded: start again")
    return _finish(work, len(shards), files, val_tokens, train_ratio)


def _is_done(work: _Work, number: int) -> bool:
    """Whether a shard has been encoded."""
    base, bytes_each = work.folder / f"{number:06}", token_dtype(work.tokenizer.vocab_size).itemsize
    try:
        entry = _read_json(base.with_suffix(".json"))
        candidates = int(np.load(base.with_suffix(".npy"))["tokens"].sum())
        sizes = [base.with_suffix(kind).stat().st_size for kind in (".bin", ".candidates.bin")]
        return bool(sizes == [entry["counts"]["train_tokens"] * bytes_each, candidates * bytes_each])
    except DAMAGE:
        return False


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _full(entry: Path, text_bytes: int, tokenizer: Tokenizer) -> InputError:
    per_token = 4 if tokenizer.vocab_size > 1000 else 1  # bytes of text
    needed = text_bytes // per_token * token_dtype(tokenizer.vocab_size).itemsize
    free = bytes_text(shutil.disk_usage(entry.parent).free)
    return InputError(
        f"the disk of {entry.parent} is full, the tokens take about {bytes_text(needed)}, {free} are free:"
        " make room, or set GPTPL_CACHE to a folder on another disk (finished shards are kept)"
    )


def _counter(counts: Any, number: int) -> Count:
    """Adds to the counts of a shard. Raises InterruptedError once all shall stop."""

    def count(read: int, tokens: int) -> None:
        counts[2 * number] += read
        counts[2 * number + 1] += tokens
        if counts[-1]:
            raise InterruptedError

    return count


def _encode_shards(work: _Work, todo: Mapping[int, Sequence[Piece]], workers: int) -> None:
    context = multiprocessing.get_context("spawn")
    # Bytes of text and tokens of each shard in turn, and whether to stop, in memory that processes share:
    # without a lock, which a process that is killed would keep, as each shard is counted by one process.
    counts = context.RawArray("q", 2 * (max(todo) + 1) + 1)
    total = sum(piece.size for pieces in todo.values() for piece in pieces)
    with _bar(counts, total):
        if workers == 1 or len(todo) == 1 or total < SHARDS * SMALLEST_SHARD // 4:
            for number, pieces in todo.items():
                _encode_shard(work, number, pieces, _counter(counts, number))
            return
        pool = ProcessPoolExecutor(
            min(workers, len(todo)), mp_context=context, initializer=_start_worker, initargs=(work, counts)
        )
        os.environ[_POOL] = str(os.getpid())
        try:
            for done in as_completed([pool.submit(_in_worker, *shard) for shard in todo.items()]):
                done.result()
        except BrokenProcessPool as error:
            raise InputError(
                "a process that encodes has been killed, or could not start: in a script, call gptpl below"
                " `if __name__ == '__main__':`, or run gptpl data encode first; finished shards are kept"
            ) from error
        finally:
            counts[-1] = 1  # what still runs has no use after an error
            pool.shutdown(cancel_futures=True)
            del os.environ[_POOL]


_worker: tuple[_Work, Any]


def _start_worker(work: _Work, counts: Any) -> None:
    global _worker
    _worker = (work, counts)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _in_worker(number: int, pieces: Sequence[Piece]) -> None:
    work, counts = _worker
    _encode_shard(work, number, pieces, _counter(counts, number))


@contextmanager
def _bar(counts: Any, total: int) -> Iterator[None]:
    """Shows bytes of text, tokens per second and the time that is left, in a terminal; logs the speed."""
    stop, started = threading.Event(), time.monotonic()

    def show() -> None:
        with tqdm(total=total, unit="B", unit_scale=True, desc="encoding", disable=None) as bar:
            while True:
                ended = stop.wait(0.5)
                speed = sum(counts[1::2]) / (time.monotonic() - started)
                bar.set_postfix_str(f"{speed:,.0f} tokens/s", refresh=False)
                bar.update(sum(counts[:-1:2]) - bar.n)
                if ended:
                    return

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    tokens, seconds = sum(counts[1::2]), time.monotonic() - started
    log.info("encoded %s tokens in %.1f s: %s a second", f"{tokens:,}", seconds, f"{tokens / seconds:,.0f}")


# --------------------------------------------------------------------------------- the corpus as a whole


def _finish(work: _Work, shards: int, files: Files, val_tokens: int, train_ratio: float) -> ShardedCorpus:
    """Choose the validation text, count, write the manifest, and open what it describes."""
    folder, dtype = work.folder, token_dtype(work.tokenizer.vocab_size)
    entries = [_read_json(folder / f"{n:06}.json") for n in range(shards)]
    of_shards = [np.load(folder / f"{n:06}.npy") for n in range(shards)]
    candidates = np.concatenate(of_shards)  # (U,)
    counts = {name: sum(entry["counts"][name] for entry in entries) for name in entries[0]["counts"]}
    characters = counts["train_characters"] + int(candidates["characters"].sum())
    chosen = _lowest(candidates, min(PER_TOKEN * val_tokens, int((1 - train_ratio) * characters)))  # (U,)
    of_val, rest = (int(candidates["tokens"][side].sum()) for side in (chosen, ~chosen))
    documents = counts["documents"] - counts["blank"]
    if not of_val or not counts["train_tokens"] + rest:
        raise InputError(
            f"{work.corpus.name} has {count_text(documents, 'document')}, too few to validate on some of"
            " them: use data=text_file, which divides the text by characters, or give more"
        )
    with (
        new_file(folder / "val.bin", durable=True) as val_file,
        new_file(folder / "rest.bin", durable=True) as rest_file,
    ):
        start = 0
        for number, each in enumerate(of_shards):
            with (folder / f"{number:06}.candidates.bin").open("rb") as file:
                for length in each["tokens"].tolist():
                    (val_file if chosen[start] else rest_file).write(file.read(length * dtype.itemsize))
                    start += 1
    lengths = {f"{n:06}.bin": entry["counts"]["train_tokens"] for n, entry in enumerate(entries)}
    lengths["rest.bin"] = rest
    digests = [digest for entry in entries for digest in entry["pieces"]]
    train, val = _of_train(folder, lengths, dtype), np.memmap(folder / "val.bin", dtype, "r")
    searched = leak_sample(train)
    duplicated, compared = count_duplicates(searched, val)
    val_characters = int(candidates["characters"][chosen].sum())
    stats = CorpusStats(
        documents=documents,
        train_documents=documents - int(candidates["whole"][chosen].sum()),
        val_documents=int(chosen.sum()),
        train_characters=characters - val_characters,
        val_characters=val_characters,
        train_tokens=len(train),
        val_tokens=len(val),
        duplicate_blocks=duplicated,
        compared_blocks=compared,
        content_sha256=hashlib.sha256(json.dumps([work.corpus.reading, digests]).encode()).hexdigest(),
        searched_tokens=None if len(searched) == len(train) else len(searched),
    )
    if counts["blank"]:
        log.info("%s: %s left out", work.corpus.name, count_text(counts["blank"], "empty document"))
    manifest = {
        "folder": folder.name,
        "split": [val_tokens, train_ratio],
        "stats": asdict(stats),
        "tokenizer": work.tokenizer.state(),
        "shards": lengths,
        "pieces": digests,
        "files": files,
    }
    write_atomically(folder / "manifest.json", json.dumps(manifest), durable=True)
    return ShardedCorpus(train=train, val=val, tokenizer=work.tokenizer, stats=stats)


def _lowest(candidates: NDArray[Any], most: int) -> NDArray[np.bool_]:
    """Which candidates have the lowest hashes, of at most so many characters, at least one: (U,) bool."""
    hashes, group = np.unique(candidates["hash"], return_inverse=True)
    characters = np.bincount(group, weights=candidates["characters"], minlength=len(hashes)).cumsum()
    return group < max(1, int(np.searchsorted(characters, most, side="right")))


def _of_train(folder: Path, lengths: Mapping[str, int], dtype: np.dtype[Any]) -> ShardedTokens:
    there = {folder / name: length for name, length in lengths.items() if length}
    return ShardedTokens(list(there), list(there.values()), dtype)


def leak_sample(tokens: ShardedTokens) -> Tokens | ShardedTokens:
    """The training tokens that validation text is searched for in: all, or 64 parts at equal distances."""
    if len(tokens) <= _LEAK_SAMPLE:
        return tokens
    parts = 64
    starts = [len(tokens) * n // parts for n in range(parts)]
    return np.concatenate([tokens[start : start + _LEAK_SAMPLE // parts] for start in starts])


def _open(folder: Path, tokenizer: Tokenizer | None) -> ShardedCorpus | None:
    """The tokens of files in a state, if they are complete."""
    try:
        return _read(folder, _read_json(folder / "manifest.json"), tokenizer)
    except DAMAGE as damage:
        if (folder / "manifest.json").exists():
            log.warning("the tokens in %s are damaged (%s): what is missing is encoded again", folder, damage)
    return None


def _read(folder: Path, manifest: Mapping[str, Any], tokenizer: Tokenizer | None) -> ShardedCorpus:
    """The tokens that a manifest describes. Raises one of DAMAGE where they are not as it says."""
    stats = CorpusStats(**manifest["stats"])
    fitted = tokenizer or tokenizer_from_state(manifest["tokenizer"])
    dtype, place = token_dtype(fitted.vocab_size), folder.parent / Path(manifest["folder"]).name
    for name, length in (*manifest["shards"].items(), ("val.bin", stats.val_tokens)):
        if (place / name).stat().st_size != length * dtype.itemsize:
            raise ValueError(f"{name} is not of {length:,} tokens")
    train = _of_train(place, manifest["shards"], dtype)
    val = np.memmap(place / "val.bin", dtype, "r")
    return ShardedCorpus(train=train, val=val, tokenizer=fitted, stats=stats)


def cached_documents(
    content_sha256: str,
    tokenizer: Tokenizer,
    *,
    val_tokens: int,
    train_ratio: float,
    cache_dir: Path | None = None,
) -> ShardedCorpus | None:
    """The corpus with that hash of its texts in the tokens of a tokenizer, if the cache has it.

    Nothing is written or removed: the hash may come from anybody.
    """
    for path in ((cache_dir or default_cache_dir()) / "shards").glob("*/*/manifest.json"):
        with suppress(*DAMAGE):
            manifest = _read_json(path)
            is_of = (manifest["stats"]["content_sha256"], manifest["tokenizer"]["sha256"], manifest["split"])
            if is_of == (content_sha256, tokenizer.sha256, [val_tokens, train_ratio]):
                return _read(path.parent, manifest, tokenizer)
    return None


def _with_same_texts(
    folder: Path, tokenizer: Tokenizer | None, corpus: Corpus, files: Files, *, check: bool
) -> ShardedCorpus | None:
    """The tokens of another state of the files, if their texts are the same; with `check` also of this one.

    All files that have another time are read again, with `check` all; one of this state with other texts is
    removed.
    """
    manifests = folder.parent.glob("*/manifest.json")
    for path in sorted(manifests, key=lambda path: (path.parent != folder, -path.stat().st_mtime)):
        try:
            manifest = _read_json(path)
            found = _read(path.parent, manifest, tokenizer)
            recorded, digests = [tuple(file) for file in manifest["files"]], list(manifest["pieces"])
        except DAMAGE:
            continue
        log.info("%s: reading the files that may have changed", corpus.name)
        if (changed := _changed(corpus, files, recorded, digests, check=check)) is None:
            if path.parent != folder:
                with suppress(OSError):  # a cache that cannot be written: they are compared again next time
                    folder.mkdir(exist_ok=True)
                    kept = json.dumps(manifest | {"files": files})
                    write_atomically(folder / "manifest.json", kept, durable=True)
            return found
        log.warning("%s has changed since %s was encoded: it is encoded again", changed, corpus.name)
        if path.parent == folder:
            shutil.rmtree(folder)
        return None
    return None


def _changed(corpus: Corpus, files: Files, recorded: Files, digests: list[str], *, check: bool) -> str | None:
    """The first part of the corpus whose texts are not those of the digests; None: there is none."""
    paths = zip(corpus.files(), files, recorded, strict=True)
    doubtful = {str(path) for path, now, then in paths if check or now != then}
    pieces = corpus.pieces()
    if len(pieces) != len(digests):
        return corpus.name
    for piece, digest in zip(pieces, digests, strict=True):
        if piece.path is None or str(piece.path) in doubtful:
            found = hashlib.sha256()
            for section in corpus.sections(piece):
                found.update(_hash(section))
            if found.hexdigest() != digest:
                return str(piece.path or corpus.name)
    return None
