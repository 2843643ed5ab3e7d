"""Corpora of any size: divided by documents, encoded in shards, continued after interruptions."""

import errno
import hashlib
import json
import logging
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptpl.data.pretraining import shards, token_cache
from gptpl.data.pretraining.datamodule import TextDataModule
from gptpl.data.pretraining.shards import encode_documents
from gptpl.data.pretraining.token_cache import ShardedCorpus, ShardedTokens
from gptpl.data.sources import Corpus, TextFiles, formats
from gptpl.errors import InputError
from gptpl.files.durable import new_file
from gptpl.tokenizers import BytesTokenizer, GPT2Tokenizer, Tokenizer, WordsTokenizer

EOT = BytesTokenizer.eot_id


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that encode are copies of this one: new ones import torch for seconds."""
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: fork)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards and pieces as small as the corpora of these tests."""
    monkeypatch.setattr(shards, "SMALLEST_SHARD", 1000)
    monkeypatch.setattr(shards, "BATCH", 300)
    monkeypatch.setattr(formats, "PIECE_BYTES", 800)


def texts_of(count: int, seed: int = 0) -> list[str]:
    draw = np.random.default_rng(seed)
    words = [" ".join(map(str, draw.integers(0, 1000, draw.integers(0, 50)))) for _ in range(count)]
    return [f"Document {n}. {text} word" for n, text in enumerate(words)]


def write(folder: Path, texts: Sequence[str], *, files: int = 1) -> TextFiles:
    folder.mkdir(exist_ok=True)
    for n in range(files):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[n::files])
        (folder / f"{n:03}.jsonl").write_text(lines, encoding="utf-8")
    return TextFiles(folder, pattern=None)


def encode(corpus: Corpus, cache: Path, **changes: Any) -> ShardedCorpus:
    wanted: dict[str, Any] = {"val_tokens": 1000, "workers": 1, "cache_dir": cache} | changes
    return encode_documents(corpus, wanted.pop("tokenizer", BytesTokenizer()), **wanted)


def divided(tokens: Any, eot: int = EOT) -> list[list[int]]:
    """The documents of a stream of tokens, each with the end-of-text token behind it."""
    stream = np.asarray(tokens).tolist()
    ends = [place + 1 for place, token in enumerate(stream) if token == eot]
    assert not stream or ends[-1] == len(stream)
    return [stream[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def by_hash(texts: Sequence[str], most: int, ratio: float) -> set[str]:
    """The validation documents, found the slow way."""

    def drawn(text: str) -> int:
        found = hashlib.blake2b(text.encode(), digest_size=16, person=b"end").digest()
        return int.from_bytes(found[:8], "little")

    sizes = [len(text) for text in texts]
    most = min(4 * most, int((1 - ratio) * sum(sizes)))
    chosen: set[str] = set()
    for text in sorted(set(texts), key=drawn):
        chosen.add(text)
        if sum(size for each, size in zip(texts, sizes, strict=True) if each in chosen) > most:
            return chosen - {text} or chosen
    return chosen


@pytest.mark.parametrize("tokenizer", [BytesTokenizer(), GPT2Tokenizer()])
@pytest.mark.parametrize("val_tokens", [150, 3000, 10**9])
@pytest.mark.parametrize("files", [1, 4])
def test_every_document_is_on_the_side_that_its_hash_decides(
    tokenizer: Tokenizer, val_tokens: int, files: int, tmp_path: Path
):
    texts = texts_of(100) * 2  # every document twice
    corpus = write(tmp_path / "in", texts, files=files)
    found = encode(corpus, tmp_path, tokenizer=tokenizer, val_tokens=val_tokens, train_ratio=0.8)
    val = by_hash(texts, val_tokens, 0.8)
    ids = {text: [*tokenizer.encode(text).tolist(), tokenizer.eot_id] for text in texts}
    assert sorted(divided(found.val, tokenizer.eot_id)) == sorted(ids[text] for text in texts if text in val)
    train = sorted(ids[text] for text in texts if text not in val)
    assert sorted(divided(found.train, tokenizer.eot_id)) == train
    stats = found.stats
    assert (stats.documents, stats.val_documents) == (200, 2 * len(val))
    assert stats.train_documents == 200 - 2 * len(val)
    assert stats.val_characters == 2 * sum(map(len, val))
    assert stats.train_characters == sum(map(len, texts)) - stats.val_characters
    assert (stats.train_tokens, stats.val_tokens) == (len(found.train), len(found.val))


def test_added_documents_leave_most_where_they_are(tmp_path: Path):
    def val(texts: list[str], name: str) -> set[tuple[int, ...]]:
        return set(map(tuple, divided(encode(write(tmp_path / name, texts), tmp_path).val)))

    before, after = val(texts_of(300), "a"), val(texts_of(300) + texts_of(30, seed=1), "b")
    assert len(before) > 5
    assert len(before - after) <= 2


@pytest.mark.parametrize("val_tokens", [600, 100_000])  # some sections may be for validation, or all
def test_a_long_text_goes_to_both_sides_in_sections(
    val_tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from gptpl.data.sources import base

    monkeypatch.setattr(base, "SECTION", 150)
    lines = [f"Line {n} of a long text without an end." for n in range(2000)]
    (tmp_path / "long.txt").write_text("\n".join(lines), encoding="utf-8")
    found = encode(TextFiles(tmp_path / "long.txt"), tmp_path, val_tokens=val_tokens)
    assert found.stats.documents == 1
    assert found.stats.val_documents > 1
    assert found.stats.train_documents == 1
    text = "\n".join(lines).encode()
    parts = [bytes(part[:-1]) for side in (found.val, found.train) for part in divided(side) if len(part) > 1]
    # Nothing but the end-of-text tokens is added, nothing is lost, and what was not together is not joined.
    assert sorted(b"".join(parts)) == sorted(text)
    assert all(part in text for part in parts)


@pytest.mark.parametrize("tokenizer", [BytesTokenizer(), WordsTokenizer()])
def test_blank_documents_are_left_out_and_counted(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    found = encode(write(tmp_path / "in", [*texts_of(20), "", " \n"]), tmp_path, tokenizer=tokenizer)
    assert found.stats.documents == 20
    assert "2 empty documents left out" in caplog.text
    eot = found.tokenizer.eot_id
    assert [] not in [document[:-1] for document in divided(found.train, eot) + divided(found.val, eot)]


def test_a_vocabulary_from_the_text(tmp_path: Path):
    texts = texts_of(50)
    corpus = write(tmp_path / "in", texts)
    found = encode(corpus, tmp_path, tokenizer=WordsTokenizer())
    again = encode(corpus, tmp_path, tokenizer=WordsTokenizer())
    assert found.tokenizer.sha256 == again.tokenizer.sha256 == WordsTokenizer().fitted_to(texts).sha256


# --- processes and interruptions ------------------------------------------------------------------------


def contents(cache: Path) -> dict[str, bytes]:
    """The tokens of the only entry."""
    (entry,) = (cache / "shards").glob("*/*/")
    assert not list(entry.glob(".*"))
    return {path.name: path.read_bytes() for path in entry.iterdir() if path.suffix in (".bin", ".npy")}


def manifest(cache: Path) -> Path:
    return next((cache / "shards").glob("*/*/manifest.json"))


def test_several_processes_write_the_same(tmp_path: Path):
    corpus = write(tmp_path / "in", texts_of(200), files=3)
    one, two = encode(corpus, tmp_path / "a"), encode(corpus, tmp_path / "b", workers=2)
    assert len(contents(tmp_path / "a")) > 20
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert one.stats == two.stats


class Stop(BaseException):
    """As a kill: nothing may handle it."""


@pytest.mark.parametrize("at", [1, 7, 20, 43])
def test_what_was_interrupted_is_continued(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    corpus = write(tmp_path / "in", texts_of(150))
    encode(corpus, tmp_path / "good")
    calls, encoded = 0, []

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise Stop

    real = shards._encode_shard

    def counted(work: Any, number: int, *rest: Any) -> None:
        real(work, number, *rest)
        encoded.append(number)

    monkeypatch.setattr(shards, "_encode_shard", counted)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        # A killed process cannot tidy up.
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(Stop):
            encode(corpus, tmp_path / "cut")
    encode(corpus, tmp_path / "cut")
    assert contents(tmp_path / "cut") == contents(tmp_path / "good")
    assert len(encoded) == len(set(encoded))


def test_a_second_process_waits_and_takes_what_the_first_made(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    from concurrent.futures import ThreadPoolExecutor

    caplog.set_level(logging.INFO)
    corpus = write(tmp_path / "in", texts_of(100))
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(lambda _: encode(corpus, tmp_path), range(2))
    assert first.stats == second.stats
    assert caplog.text.count("encoding text_file") == 1


@pytest.mark.usefixtures("forks")
def test_a_process_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shards, "_start_worker", dies)
    with pytest.raises(InputError, match="a process that encodes has been killed"):
        encode(write(tmp_path / "in", texts_of(200)), tmp_path, workers=2)


def dies(*_: Any) -> None:
    os._exit(9)


# --- is the entry still that of the files? --------------------------------------------------------------


def later(path: Path, seconds: int = 10) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + seconds * 10**9))


def test_later_starts_read_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    corpus = write(tmp_path / "in", texts_of(50))
    before = encode(corpus, tmp_path)
    monkeypatch.setattr(TextFiles, "sections", lambda *_: pytest.fail("read"))
    monkeypatch.setattr(TextFiles, "pieces", lambda *_: pytest.fail("read"))
    after = encode(corpus, tmp_path)
    assert after.stats == before.stats
    assert np.array_equal(after.train, before.train)


def test_other_times_with_the_same_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    corpus = write(tmp_path / "in", texts_of(50), files=3)
    before = encode(corpus, tmp_path)
    later(tmp_path / "in/001.jsonl")
    monkeypatch.setattr(shards, "_encode_shard", lambda *_: pytest.fail("encoded again"))
    assert encode(corpus, tmp_path).stats == before.stats
    monkeypatch.setattr(TextFiles, "sections", lambda *_: pytest.fail("read a second time"))
    assert encode(corpus, tmp_path).stats == before.stats
    shutil.copytree(tmp_path / "in", tmp_path / "moved")  # with its times
    assert encode(TextFiles(tmp_path / "moved", pattern=None), tmp_path).stats == before.stats


@pytest.mark.parametrize("hidden", [False, True])
def test_an_edited_file_is_found(hidden: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    corpus = write(tmp_path / "in", texts_of(50), files=3)
    path = tmp_path / "in/001.jsonl"
    before, time = encode(corpus, tmp_path), path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes().replace(b"word", b"WORD", 1))
    if hidden:
        os.utime(path, ns=(time, time))
        assert encode(corpus, tmp_path).stats == before.stats
    else:
        later(path)
    read = np.asarray(before.train).copy()
    found = encode(corpus, tmp_path, check=hidden)
    assert f"{path} has changed" in caplog.text
    if not hidden:  # a run that reads what was encoded before is not disturbed
        assert np.array_equal(pickle.loads(pickle.dumps(before.train)), read)  # noqa: S301
    assert found.stats.content_sha256 != before.stats.content_sha256
    assert b"WORD" in np.concatenate([found.train, found.val]).astype(np.uint8).tobytes()


def test_other_files_or_settings_are_another_entry(tmp_path: Path):
    folder = tmp_path / "in"
    corpus = write(folder, texts_of(50), files=2)
    hashes = {encode(corpus, tmp_path).stats.content_sha256}
    (folder / "000.jsonl").rename(folder / "002.jsonl")  # another order
    hashes.add(encode(corpus, tmp_path).stats.content_sha256)
    (folder / "001.jsonl").unlink()
    hashes.add(encode(corpus, tmp_path).stats.content_sha256)
    assert len(hashes) == 3
    encode(corpus, tmp_path, val_tokens=500)
    encode(corpus, tmp_path, tokenizer=GPT2Tokenizer())
    assert len(list((tmp_path / "shards").glob("*/*/manifest.json"))) == 5


class Shouted(TextFiles):
    """Reads in its own way, by a setting of its own."""

    def __init__(self, path: Path, mark: str) -> None:
        super().__init__(path, pattern=None)
        self.mark = mark

    def documents(self) -> Iterator[str]:
        for text in super().documents():
            yield text + self.mark


class InMemory(Corpus):
    name = "in_memory"

    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def files(self) -> list[Path]:
        return []

    def documents(self) -> Iterator[str]:
        yield from self.texts


def test_a_corpus_that_reads_in_its_own_way_is_known_by_its_texts(tmp_path: Path):
    write(tmp_path / "in", texts_of(50))
    for mark in ("!", "?"):
        found = encode(Shouted(tmp_path / "in", mark), tmp_path)
        assert all(chr(document[-2]) == mark for document in divided(found.train) + divided(found.val))
    first, second = (encode(InMemory(*texts_of(30, seed)), tmp_path) for seed in (0, 1))
    assert first.stats.content_sha256 != second.stats.content_sha256
    assert bytes(divided(second.val)[0][:-1]).decode() in texts_of(30, 1)


@pytest.mark.parametrize("damage", ["cut", "gone", "manifest", "no JSON"])
def test_what_is_damaged_is_encoded_again(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    corpus = write(tmp_path / "in", texts_of(100))
    encode(corpus, tmp_path)
    before, entry = contents(tmp_path), manifest(tmp_path).parent
    if damage == "cut":
        with (entry / "000002.bin").open("r+b") as file:
            file.truncate(10)
    elif damage == "gone":
        (entry / "000002.bin").unlink()
    elif damage == "manifest":
        (entry / "manifest.json").write_text("{}")
    else:
        (entry / "manifest.json").write_bytes(manifest(tmp_path).read_bytes()[:50])
    encoded: list[int] = []
    real = shards._encode_shard

    def counted(work: Any, number: int, *rest: Any) -> None:
        encoded.append(number)
        real(work, number, *rest)

    monkeypatch.setattr(shards, "_encode_shard", counted)
    encode(corpus, tmp_path)
    assert contents(tmp_path) == before
    assert encoded == ([2] if damage in ("cut", "gone") else [])
    assert "are damaged" in caplog.text


# --- bad input ------------------------------------------------------------------------------------------


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    corpus = write(tmp_path / "in", texts_of(100))
    real, calls = new_file, 0

    def full(path: Path, *, durable: bool) -> Any:
        nonlocal calls
        calls += 1
        if calls == 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, durable=durable)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "new_file", full)
        with pytest.raises(InputError, match=r"disk of .* is full, the tokens take about .* kB, .* are free"):
            encode(corpus, tmp_path)
    done = len(list((tmp_path / "shards").glob("*/*/??????.json")))
    assert done == 3
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
        with pytest.raises(InputError, match="is full"):
            encode(corpus, tmp_path)
    encode(corpus, tmp_path)


def test_a_cache_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(InputError, match=r"cannot write .*: set GPTPL_CACHE to a folder that can be written"):
        encode(write(tmp_path / "in", texts_of(20)), tmp_path / "cache")


def test_a_file_that_changes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    corpus = write(tmp_path / "in", texts_of(50), files=3)
    real = shards._encode_shards

    def and_edit(*given: Any) -> None:
        real(*given)
        later(tmp_path / "in/001.jsonl")

    with monkeypatch.context() as patch:
        patch.setattr(shards, "_encode_shards", and_edit)
        with pytest.raises(InputError, match=r"001\.jsonl has changed while text_file was encoded"):
            encode(corpus, tmp_path)
    assert encode(corpus, tmp_path).stats.documents == 50


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val_tokens": 0}, "val_tokens must be a positive whole number, got 0"),
        ({"workers": 0}, "encode_workers must be a positive whole number, got 0"),
        ({"train_ratio": 1.0}, r"train_ratio=1\.0 must lie between"),
    ],
)
def test_numbers_out_of_range(changes: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(InputError, match=message):
        encode(write(tmp_path / "in", texts_of(9)), tmp_path, **changes)


def test_no_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(TextFiles, "pieces", lambda _: [])
    with pytest.raises(InputError, match="text_file has no documents: give files with text in them"):
        encode(write(tmp_path / "in", texts_of(9)), tmp_path)


SCRIPT = """
import sys
from pathlib import Path
from gptpl.data.pretraining import shards
from gptpl.data.sources import TextFiles
from gptpl.tokenizers import BytesTokenizer

shards.SMALLEST_SHARD = 1000
corpus = TextFiles(sys.argv[1], pattern=None)
shards.encode_documents(corpus, BytesTokenizer(), val_tokens=100, workers=2, cache_dir=Path(sys.argv[2]))
"""


def test_a_script_that_is_not_guarded_is_told_so(tmp_path: Path):
    write(tmp_path / "in", texts_of(200), files=5)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(tmp_path / "in"), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "call gptpl below `if __name__ == '__main__':`" in done.stderr


@pytest.mark.parametrize("texts", [["one document"], ["the same"] * 5, ["", " "]])
def test_too_few_documents(texts: list[str], tmp_path: Path):
    with pytest.raises(InputError, match="too few to validate on some of them: use data=text_file"):
        encode(write(tmp_path / "in", texts), tmp_path)


@pytest.mark.usefixtures("forks")
def test_a_broken_line_is_named_and_nothing_is_lost(tmp_path: Path):
    corpus = write(tmp_path / "in", texts_of(200))
    path = tmp_path / "in/000.jsonl"
    good = path.read_bytes()
    lines = good.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:150]) + b"broken" + lines[150][6:] + b"".join(lines[151:]))
    with pytest.raises(InputError, match=r"000\.jsonl, line 151 is not valid JSON"):
        encode(corpus, tmp_path)
    with pytest.raises(InputError, match=r"000\.jsonl, line 151 is not valid JSON"):
        encode(corpus, tmp_path, workers=2)


# --- the tokens -----------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=12), st.data())
def test_shards_are_one_sequence(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], data: st.DataObject
):
    folder = tmp_path_factory.mktemp("tokens")
    tokens = np.arange(sum(lengths), dtype=np.uint16)
    paths, start = [], 0
    for number, length in enumerate(lengths):
        paths.append(folder / str(number))
        tokens[start : start + length].tofile(paths[-1])
        start += length
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_cache, "_mapped", lru_cache(maxsize=2)(token_cache._mapped.__wrapped__))
        found = ShardedTokens(paths, lengths, np.dtype(np.uint16))
        assert len(found) == len(tokens)
        for _ in range(10):
            place = slice(data.draw(st.integers(-5, 60)), data.draw(st.integers(-5, 60)))
            assert np.array_equal(found[place], tokens[place])
        assert np.array_equal(np.asarray(found), tokens)
        assert token_cache._mapped.cache_info().currsize <= 2
        again = pickle.loads(pickle.dumps(found))  # noqa: S301
        assert np.array_equal(again[:], tokens)


def test_a_datamodule_reads_sequences_across_shards(tmp_path: Path):
    corpus = write(tmp_path / "in", texts_of(200))
    data = TextDataModule(
        corpus=corpus,
        tokenizer=BytesTokenizer(),
        split="documents",
        val_tokens=1000,
        max_length=64,
        batch_size=4,
        encode_workers=1,
        cache_dir=tmp_path,
    )
    encoded = data.load()
    stream = np.asarray(encoded.train).astype(np.int64)
    sequences = data.examples("train")
    assert len(sequences) == (len(stream) - 1) // 64
    rows = {tuple(row.tolist()) for inputs, _ in data.train_dataloader() for row in inputs}
    assert rows <= {tuple(stream[i * 64 : i * 64 + 64].tolist()) for i in range(len(sequences))}
    assert len(rows) == len(sequences) // 4 * 4
    assert data.content_sha256() == encoded.stats.content_sha256
    assert data.steps_per_epoch(world_size=2) > 0
    scored = sum(int((targets >= 0).sum()) for _, targets in data.evaluation_dataloader("all"))
    assert scored == len(encoded.train) + len(encoded.val) - 1
    assert "200" in data.report(parameters=None, world_size=1)[0]


def test_a_sample_is_searched_for_validation_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    corpus = write(tmp_path / "in", texts_of(300))
    monkeypatch.setattr(shards, "_LEAK_SAMPLE", 6400)
    stats = encode(corpus, tmp_path).stats
    assert stats.searched_tokens == 6400 < stats.train_tokens
    assert stats.compared_blocks > 0
