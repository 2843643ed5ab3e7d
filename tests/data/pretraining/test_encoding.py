import dataclasses
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptpl.data.pretraining import encoding
from gptpl.data.pretraining.datamodule import TextDataModule
from gptpl.data.pretraining.encoding import count_duplicates, encode_corpus
from gptpl.data.pretraining.token_cache import EncodedCorpus
from gptpl.data.sources import Corpus
from gptpl.errors import InputError
from gptpl.tokenizers import BytesTokenizer, TokenIds, Tokenizer, WordsTokenizer

TEXT = "Every effort moves you — closer, if only by an inch. " * 20


class Texts(Corpus):
    """Documents in memory; counts how often they have been read."""

    name = "texts"

    def __init__(self, *texts: str) -> None:
        self.texts = texts
        self.readings = 0

    def files(self) -> list[Path]:
        return []

    def documents(self) -> Iterator[str]:
        self.readings += 1
        yield from self.texts

    def content_sha256(self) -> str:
        return hashlib.sha256(repr(self.texts).encode()).hexdigest()


def joined(tokenizer: Tokenizer, pieces: Sequence[str]) -> list[int]:
    """The tokens of the pieces with the end of text between them, the slow way."""
    tokens: list[int] = []
    for number, piece in enumerate(pieces):
        tokens += [tokenizer.eot_id] * (number > 0) + tokenizer.encode(piece).tolist()
    return tokens


def entries(cache: Path) -> list[Path]:
    return sorted(path for path in (cache / "encoded").iterdir() if path.is_dir())


def same(a: EncodedCorpus, b: EncodedCorpus) -> bool:
    states_agree = a.tokenizer.state() == b.tokenizer.state()
    return (
        np.array_equal(a.train, b.train)
        and np.array_equal(a.val, b.val)
        and a.stats == b.stats
        and states_agree
    )


def test_one_document_is_split_by_characters_and_each_part_encoded_by_itself(tmp_path: Path):
    tokenizer = BytesTokenizer()
    encoded = encode_corpus(Texts(TEXT), tokenizer, train_ratio=0.9, cache_dir=tmp_path)
    cut = int(0.9 * len(TEXT))
    assert encoded.train.tolist() == tokenizer.encode(TEXT[:cut]).tolist()
    assert encoded.val.tolist() == tokenizer.encode(TEXT[cut:]).tolist()
    assert encoded.train.dtype == encoded.val.dtype == np.uint16
    stats = encoded.stats
    assert (stats.documents, stats.train_documents, stats.val_documents) == (1, 1, 1)
    assert (stats.train_characters, stats.val_characters) == (cut, len(TEXT) - cut)
    assert (stats.train_tokens, stats.val_tokens) == (len(encoded.train), len(encoded.val))
    duplicates = count_duplicates(encoded.train, encoded.val)
    assert (stats.duplicate_blocks, stats.compared_blocks) == duplicates
    assert stats.duplicate_blocks == stats.compared_blocks > 0  # the same sentence again and again


@settings(max_examples=25)
@given(
    st.lists(st.text(alphabet="ab é\n", min_size=1, max_size=8), min_size=1, max_size=8), st.floats(0.1, 0.9)
)
def test_documents_are_joined_by_the_end_of_text(tmp_path_factory, texts: list[str], ratio: float):
    left, train, val = int(ratio * sum(map(len, texts))), [], []
    for text in texts:
        train += [text[:left]] if left else []
        val += [text[left:]] if left < len(text) else []
        left = max(0, left - len(text))
    tokenizer = BytesTokenizer()
    cache = tmp_path_factory.mktemp("cache")
    encoded = encode_corpus(Texts(*texts), tokenizer, train_ratio=ratio, cache_dir=cache)
    assert encoded.train.tolist() == joined(tokenizer, train)
    assert encoded.val.tolist() == joined(tokenizer, val)
    assert (encoded.stats.train_documents, encoded.stats.val_documents) == (len(train), len(val))


def test_batches_of_documents_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    corpus = Texts(*(f"document {number}" for number in range(20)))
    at_once = encode_corpus(corpus, BytesTokenizer(), train_ratio=0.7, cache_dir=tmp_path / "a")
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 25)
    in_batches = encode_corpus(corpus, BytesTokenizer(), train_ratio=0.7, cache_dir=tmp_path / "b")
    assert same(at_once, in_batches)


def test_the_second_time_nothing_is_read_and_the_tokens_are_mapped(tmp_path: Path):
    corpus = Texts(TEXT)
    first = encode_corpus(corpus, BytesTokenizer(), train_ratio=0.9, cache_dir=tmp_path)
    readings = corpus.readings
    second = encode_corpus(corpus, BytesTokenizer(), train_ratio=0.9, cache_dir=tmp_path)
    assert corpus.readings == readings
    assert same(first, second)
    assert isinstance(second.train, np.memmap)
    assert not second.train.flags.writeable


def test_text_tokenizer_and_ratio_each_have_an_entry_of_their_own(tmp_path: Path):
    encode_corpus(Texts(TEXT), BytesTokenizer(), train_ratio=0.9, cache_dir=tmp_path)
    encode_corpus(Texts(TEXT), BytesTokenizer(), train_ratio=0.8, cache_dir=tmp_path)
    encode_corpus(Texts(TEXT + "!"), BytesTokenizer(), train_ratio=0.9, cache_dir=tmp_path)
    words = encode_corpus(Texts(TEXT), WordsTokenizer(), train_ratio=0.9, cache_dir=tmp_path).tokenizer
    encode_corpus(Texts(TEXT + " more"), words, train_ratio=0.9, cache_dir=tmp_path)
    encode_corpus(Texts(TEXT + " more"), WordsTokenizer(), train_ratio=0.9, cache_dir=tmp_path)
    assert len(entries(tmp_path)) == 6
    assert all(
        sorted(file.name for file in entry.iterdir()) == ["stats.json", "train.npy", "val.npy"]
        for entry in entries(tmp_path)
    )


def test_words_come_from_the_whole_text_and_back_from_the_cache(tmp_path: Path):
    corpus = Texts("one two three", "four")
    first = encode_corpus(corpus, WordsTokenizer(), train_ratio=0.5, cache_dir=tmp_path)
    readings = corpus.readings
    second = encode_corpus(corpus, WordsTokenizer(), train_ratio=0.5, cache_dir=tmp_path)
    assert corpus.readings == readings
    assert same(first, second)
    assert second.tokenizer.decode(second.val.tolist()).endswith("four")


def test_a_vocabulary_that_is_there_already_is_kept(tmp_path: Path):
    words = WordsTokenizer().fitted_to(["one two"])
    for _ in range(2):
        encoded = encode_corpus(Texts("two three one two"), words, train_ratio=0.5, cache_dir=tmp_path)
        assert encoded.tokenizer is words


def test_a_large_vocabulary_takes_four_bytes_a_token(tmp_path: Path):
    text = " ".join(f"w{number}" for number in range(66_000))
    for _ in range(2):
        encoded = encode_corpus(Texts(text), WordsTokenizer(), train_ratio=0.9, cache_dir=tmp_path)
        assert encoded.train.dtype == encoded.val.dtype == np.uint32
        assert encoded.tokenizer.decode(encoded.val[-1:].tolist()) == "w65999"


def test_a_split_may_be_empty(tmp_path: Path):
    for _ in range(2):
        encoded = encode_corpus(Texts("a"), BytesTokenizer(), train_ratio=0.9, cache_dir=tmp_path)
        assert encoded.train.tolist() == []
        assert encoded.val.tolist() == [ord("a")]


def test_a_ratio_outside_0_to_1_is_refused_before_anything_is_written(tmp_path: Path):
    with pytest.raises(InputError, match=r"data\.train_ratio=1\.0"):
        encode_corpus(Texts(TEXT), BytesTokenizer(), train_ratio=1.0, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- damage -------------------------------------------------------------------------------------------


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 10)


def without_counts(path: Path) -> None:
    path.write_text(json.dumps({"stats": {}}))


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "tokens cut short": ("train.npy", cut_short),
    "an empty token file": ("val.npy", lambda path: os.truncate(path, 0)),
    "no token file": ("val.npy", Path.unlink),
    "other tokens": ("train.npy", lambda path: np.save(path, np.zeros(3, np.uint16))),
    "another type of token": ("val.npy", lambda path: np.save(path, np.load(path).astype(np.uint32))),
    "half a stats.json": ("stats.json", cut_short),
    "bytes in stats.json": ("stats.json", lambda path: path.write_bytes(b"\xff\xfe")),
    "no counts": ("stats.json", without_counts),
    "nothing in stats.json": ("stats.json", lambda path: path.write_text("{}")),
    "a list in stats.json": ("stats.json", lambda path: path.write_text("[]")),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("make_tokenizer", [BytesTokenizer, WordsTokenizer])
def test_a_damaged_entry_is_told_and_made_again(
    damage: str, make_tokenizer: type[Tokenizer], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    corpus = Texts(TEXT)
    first = encode_corpus(corpus, make_tokenizer(), train_ratio=0.9, cache_dir=tmp_path)
    before = dataclasses.replace(first, train=first.train.copy(), val=first.val.copy())
    del first
    (entry,) = entries(tmp_path)
    name, spoil = DAMAGES[damage]
    spoil(entry / name)
    with caplog.at_level(logging.WARNING):
        assert same(encode_corpus(corpus, make_tokenizer(), train_ratio=0.9, cache_dir=tmp_path), before)
    (record,) = caplog.records
    assert "cannot be used" in record.getMessage()
    assert str(entry) in record.getMessage()
    readings = corpus.readings
    assert same(encode_corpus(corpus, make_tokenizer(), train_ratio=0.9, cache_dir=tmp_path), before)
    assert corpus.readings == readings
    assert entries(tmp_path) == [entry]


def test_without_its_last_file_an_entry_is_not_there(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    first = encode_corpus(Texts(TEXT), BytesTokenizer(), train_ratio=0.9, cache_dir=tmp_path)
    (entry,) = entries(tmp_path)
    (entry / "stats.json").unlink()
    assert same(first, encode_corpus(Texts(TEXT), BytesTokenizer(), train_ratio=0.9, cache_dir=tmp_path))
    assert not caplog.records
    assert (entry / "stats.json").exists()


def test_an_entry_that_cannot_be_read_now_is_there_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    first = encode_corpus(Texts(TEXT), BytesTokenizer(), train_ratio=0.9, cache_dir=tmp_path)
    with monkeypatch.context() as patch:

        def too_many(*_: object, **__: object) -> None:
            raise OSError(24, "Too many open files")

        patch.setattr("gptpl.data.pretraining.token_cache.npy_format.open_memmap", too_many)
        again = encode_corpus(Texts(TEXT), BytesTokenizer(), train_ratio=0.9, cache_dir=tmp_path)
    assert same(first, again)
    assert "cannot be used ([Errno 24] Too many open files)" in caplog.text
    corpus = Texts(TEXT)
    (entry,) = entries(tmp_path)
    assert same(first, encode_corpus(corpus, BytesTokenizer(), train_ratio=0.9, cache_dir=tmp_path))
    assert (entry, corpus.readings) == (entries(tmp_path)[0], 0)


def test_a_damaged_entry_that_cannot_be_written_costs_no_second_encoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """As in a shared cache, where the entry is another user's."""
    once, corpus = Texts(TEXT), Texts(TEXT)
    first = encode_corpus(once, BytesTokenizer(), train_ratio=0.9, cache_dir=tmp_path)
    before = dataclasses.replace(first, train=first.train.copy(), val=first.val.copy())
    (entry,) = entries(tmp_path)
    (entry / "stats.json").write_text("{}")

    def refused(self: Path, target: Path) -> Path:
        raise PermissionError(1, "Operation not permitted", str(target))

    monkeypatch.setattr(Path, "replace", refused)
    assert same(encode_corpus(corpus, BytesTokenizer(), train_ratio=0.9, cache_dir=tmp_path), before)
    assert corpus.readings == once.readings
    assert "its tokens stay in memory" in caplog.text


def test_tokens_are_read_back_from_an_entry_that_cannot_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    once, corpus = Texts(TEXT), Texts(TEXT)
    wanted = encode_corpus(once, BytesTokenizer(), train_ratio=0.9, cache_dir=tmp_path / "other")
    opened = "gptpl.data.pretraining.token_cache.open_entry"
    monkeypatch.setattr(opened, lambda *_: (_ for _ in ()).throw(OSError(24, "Too many open files")))
    assert same(encode_corpus(corpus, BytesTokenizer(), train_ratio=0.9, cache_dir=tmp_path), wanted)
    assert corpus.readings == once.readings


def test_a_spoilt_vocabulary_is_damage_too(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    first = encode_corpus(Texts(TEXT), WordsTokenizer(), train_ratio=0.9, cache_dir=tmp_path)
    stats = entries(tmp_path)[0] / "stats.json"
    stats.write_text(stats.read_text().replace('"effort"', '"afford"'))
    second = encode_corpus(Texts(TEXT), WordsTokenizer(), train_ratio=0.9, cache_dir=tmp_path)
    assert "cannot be used" in caplog.text
    assert same(first, second)


def test_drafts_of_killed_processes_go_after_a_day(tmp_path: Path):
    first = encode_corpus(Texts(TEXT), BytesTokenizer(), train_ratio=0.9, cache_dir=tmp_path)
    (entry,) = entries(tmp_path)
    for name, hours in (("old", 25), ("new", 23)):
        draft = entry / f".train.npy.{name}.tmp"
        draft.touch()
        os.utime(draft, (time.time() - hours * 3600,) * 2)
    encode_corpus(Texts(TEXT), BytesTokenizer(), train_ratio=0.8, cache_dir=tmp_path)
    assert [path.name for path in entry.parent.glob("*/.*.tmp")] == [".train.npy.new.tmp"]
    assert same(first, encode_corpus(Texts(TEXT), BytesTokenizer(), train_ratio=0.9, cache_dir=tmp_path))


# --- a cache that cannot be written -------------------------------------------------------------------


def test_without_a_folder_for_the_cache_it_works_in_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    corpus = Texts("one two", TEXT)
    encoded = encode_corpus(corpus, WordsTokenizer(), train_ratio=0.9, cache_dir=blocked)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    for said in (str(blocked / "encoded"), "in memory", "GPTPL_CACHE"):
        assert said in record.getMessage()
    assert same(
        encoded, encode_corpus(corpus, WordsTokenizer(), train_ratio=0.9, cache_dir=tmp_path / "good")
    )


class Counting(BytesTokenizer):
    """Counts the texts that it encodes."""

    def __init__(self) -> None:
        self.texts = 0

    def encode(self, text: str) -> TokenIds:
        self.texts += 1
        return super().encode(text)


@pytest.mark.parametrize("call", ["new_file", "write_atomically", "npy_format.open_memmap"])
def test_a_disk_that_is_full_costs_no_second_encoding(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"gptpl.data.pretraining.token_cache.{call}", full)
    corpus, tokenizer = Texts(TEXT), Counting()
    encoded = encode_corpus(corpus, tokenizer, train_ratio=0.9, cache_dir=tmp_path)
    assert encoded.train.tolist() + encoded.val.tolist() == list(TEXT.encode())
    assert tokenizer.texts == 2
    assert corpus.readings == 2
    (record,) = caplog.records
    assert str(tmp_path / "encoded") in record.getMessage()
    assert "No space left" in record.getMessage()
    assert list((tmp_path / "encoded").glob("*/.*")) == []


def test_several_processes_do_not_each_encode_a_text_that_cannot_be_kept(tmp_path: Path):
    (tmp_path / "file").write_text("not a folder")
    settings: dict[str, Any] = {"corpus": Texts(TEXT), "tokenizer": BytesTokenizer(), "max_length": 8}
    data = TextDataModule(**settings, cache_dir=tmp_path / "file")
    assert data.steps_per_epoch() > 0
    with pytest.raises(InputError, match=r"each of 2 processes would encode .*GPTPL_CACHE"):
        data.steps_per_epoch(world_size=2)
    assert TextDataModule(**settings, cache_dir=tmp_path).steps_per_epoch(world_size=2) > 0


def test_trouble_with_the_corpus_is_not_mistaken_for_the_cache(tmp_path: Path):
    class Vanishing(Texts):
        def documents(self) -> Iterator[str]:
            if self.readings >= 1:
                raise FileNotFoundError("gone")
            yield from super().documents()

    with pytest.raises(FileNotFoundError, match="gone"):
        encode_corpus(Vanishing(TEXT), BytesTokenizer(), train_ratio=0.9, cache_dir=tmp_path)
    assert entries(tmp_path) == []


# --- several at once ----------------------------------------------------------------------------------


def test_without_locks_who_comes_second_takes_the_entry_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Overtaken(Texts):
        def documents(self) -> Iterator[str]:
            yield from super().documents()
            if self.readings == 2:  # the first is to count
                encode_corpus(Texts(TEXT), BytesTokenizer(), train_ratio=0.9, cache_dir=tmp_path)

    def no_locks(*_: object, **__: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr("filelock.FileLock.acquire", no_locks)
    encoded = encode_corpus(Overtaken(TEXT), BytesTokenizer(), train_ratio=0.9, cache_dir=tmp_path)
    (entry,) = entries(tmp_path)
    assert isinstance(encoded.train, np.memmap)
    assert Path(str(encoded.train.filename)).parent == entry


def encode_and_add_up(cache: Path) -> tuple[int, int]:
    corpus = Texts(TEXT)
    encoded = encode_corpus(corpus, BytesTokenizer(), train_ratio=0.9, cache_dir=cache)
    return corpus.readings, int(encoded.train.sum()) + int(encoded.val.sum())


def test_of_several_at_once_one_encodes(tmp_path: Path):
    """Threads wait for one another as processes do: each opens the lock file for itself."""
    with ThreadPoolExecutor(4) as pool:
        readings, sums = zip(*pool.map(encode_and_add_up, [tmp_path] * 4), strict=True)
    assert set(sums) == {sum(TEXT.encode())}
    assert sorted(readings) == [0, 0, 0, 2]
    assert len(entries(tmp_path)) == 1
