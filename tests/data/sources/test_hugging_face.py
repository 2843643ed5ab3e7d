"""Data sets of Hugging Face: saved, of the hub, streamed, and from the library's cache."""

import json
import logging
import multiprocessing
import pickle
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptpl.data.pretraining import shards
from gptpl.data.pretraining.shards import encode_documents
from gptpl.data.pretraining.token_cache import ShardedCorpus
from gptpl.data.sources import Corpus, HuggingFaceDataset, TextFiles, formats, hugging_face
from gptpl.errors import InputError
from gptpl.tokenizers import BytesTokenizer

datasets = pytest.importorskip("datasets", reason="datasets comes with the extra `hub`")
pyarrow = pytest.importorskip("pyarrow")

TEXTS = [f"Story {n}: {n * n} gulls.\n" + "and boats, naïve 東京 " * (n % 7) for n in range(120)]
OLD, NEW = "a" * 40, "b" * 40
NAME = "owner/stories"


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces and shards as small as these data, and a cache of the library's for each test."""
    for module in (formats, hugging_face):
        monkeypatch.setattr(module, "PIECE_BYTES", 1000)
    monkeypatch.setattr(shards, "SMALLEST_SHARD", 200)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "library")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def saved(folder: Path, texts: Sequence[str | None] = TEXTS, field: str = "text", **how: Any) -> Path:
    rows = {"number": list(range(len(texts))), field: texts}
    features = datasets.Features({"number": datasets.Value("int64"), field: datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features).save_to_disk(folder, **how)
    return folder


class Hub:
    """Commits of one data set, each a folder of Parquet files, the newest last."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.asked = folder, 0
        self.commits: list[str] = []
        self._open = datasets.load_dataset_builder
        monkeypatch.setattr(datasets, "load_dataset_builder", self.builder)

    def commit(self, commit: str, *, readme: str = "", **splits: Sequence[str]) -> None:
        folder = self.folder / "stories" / commit
        for split, texts in splits.items():
            for n in range(3):
                part = {"text": texts[len(texts) * n // 3 : len(texts) * (n + 1) // 3]}
                features = datasets.Features({"text": datasets.Value("string")})
                datasets.Dataset.from_dict(part, features).to_parquet(folder / f"data/{split}-{n}.parquet")
        configs = [
            {"config_name": name, "data_files": [{"split": s, "path": f"data/{s}-*"} for s in splits]}
            for name in ("english", "other")
        ]
        head = json.dumps({"configs": [configs[0] | {"default": True}, configs[1]]})  # JSON is YAML
        (folder / "README.md").write_text(f"---\n{head}\n---\n{readme}")
        self.commits.append(commit)

    def builder(self, name: str, subset: str | None = None, *, revision: str | None = None) -> Any:
        """As of the hub, but for the address of the files and the place in the cache."""
        assert name == NAME
        self.asked += 1
        commit = {None: self.commits[-1], "first": self.commits[0]}.get(revision, revision)
        found = self._open(str(self.folder / "stories" / str(commit)), subset)
        found.hash = commit
        return found


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "hub", monkeypatch)
    hub.commit(OLD, train=TEXTS, test=TEXTS[:9])
    return hub


def of_hub(**settings: Any) -> HuggingFaceDataset:
    return HuggingFaceDataset(f"hf://datasets/{NAME}", **settings)


def encode(corpus: Corpus, cache: Path, workers: int = 1) -> ShardedCorpus:
    return encode_documents(corpus, BytesTokenizer(), val_tokens=100, workers=workers, cache_dir=cache)


def documents(tokens: Any) -> list[bytes]:
    return bytes(np.where(np.asarray(tokens) == BytesTokenizer.eot_id, 255, tokens).astype(np.uint8)).split(
        b"\xff"
    )[:-1]


def failure(corpus: HuggingFaceDataset) -> str:
    with pytest.raises(InputError) as raised:
        list(corpus.documents())
    message = str(raised.value)
    assert "\n" not in message
    return message


# ------------------------------------------------------------------------------------- what it reads


@pytest.mark.parametrize("files", [1, 4])
def test_a_saved_one_is_read_row_by_row(files: int, tmp_path: Path) -> None:
    corpus = HuggingFaceDataset(saved(tmp_path / "saved", num_shards=files))
    assert list(corpus.documents()) == TEXTS
    pieces = corpus.pieces()
    assert len(pieces) > 5
    assert sum(piece.size for piece in pieces) == pytest.approx(len("".join(TEXTS).encode()), rel=0.1)
    other = pickle.loads(pickle.dumps(corpus))  # noqa: S301  # a worker's
    backwards = {piece: [text for text, _ in other.sections(piece)] for piece in reversed(pieces)}
    assert [text for piece in pieces for text in backwards[piece]] == TEXTS


def test_a_split_of_several(tmp_path: Path, hub: Hub) -> None:
    both = datasets.DatasetDict(
        train=datasets.Dataset.from_dict({"text": TEXTS}), test=datasets.Dataset.from_dict({"text": ["a"]})
    )
    both.save_to_disk(tmp_path / "saved")
    assert list(HuggingFaceDataset(tmp_path / "saved", split="test").documents()) == ["a"]
    for corpus in (HuggingFaceDataset(tmp_path / "saved", split="val"), of_hub(split="val")):
        assert "has no split 'val': choose one of train, test" in failure(corpus)
    assert list(of_hub(split="test", streaming=True).documents()) == TEXTS[:9]


@pytest.mark.parametrize("streaming", [False, True])
def test_of_the_hub(streaming: bool, hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    corpus = of_hub(streaming=streaming, subset="other")
    assert list(corpus.documents()) == TEXTS
    assert f"data.revision={OLD} is the newest" in caplog.text
    pieces = corpus.pieces()
    assert len(pieces) == 3 if streaming else len(pieces) > 5
    asked = hub.asked
    worker = pickle.loads(pickle.dumps(corpus))  # noqa: S301
    assert [text for piece in pieces for text, _ in worker.sections(piece)] == TEXTS
    assert hub.asked == asked
    assert bool(list((tmp_path / "library").rglob("*.arrow"))) != streaming


def test_encoded_as_the_same_texts_in_json_lines(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork = multiprocessing.get_context("fork")  # a new process imports torch for seconds
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: fork)
    (tmp_path / "in").mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / "in/texts.jsonl").write_text(lines)
    wanted = encode(TextFiles(tmp_path / "in", pattern=None), tmp_path)
    corpora = [HuggingFaceDataset(saved(tmp_path / "saved")), of_hub(), of_hub(streaming=True)]
    for workers, corpus in zip((1, 1, 2), corpora, strict=True):
        found = encode(corpus, tmp_path, workers)
        assert documents(found.val) == documents(wanted.val)
        assert sorted(documents(found.train)) == sorted(documents(wanted.train))
        assert (found.stats.documents, found.stats.val_tokens) == (120, wanted.stats.val_tokens)


# ----------------------------------------------------------------------------------- is it the same?


def test_a_saved_one_is_known_by_its_files(tmp_path: Path) -> None:
    corpus = HuggingFaceDataset(saved(tmp_path / "saved"))
    first = encode(corpus, tmp_path)
    assert HuggingFaceDataset(tmp_path / "saved").listing_sha256() == corpus.listing_sha256()
    shutil.copytree(tmp_path / "saved", tmp_path / "moved")  # with its times
    assert encode(HuggingFaceDataset(tmp_path / "moved"), tmp_path).stats == first.stats
    saved(tmp_path / "again")
    assert encode(HuggingFaceDataset(tmp_path / "again"), tmp_path).stats == first.stats
    other = HuggingFaceDataset(saved(tmp_path / "other", [*TEXTS[:50], TEXTS[50].upper(), *TEXTS[51:]]))
    assert other.listing_sha256() != corpus.listing_sha256()
    assert other.content_sha256() != corpus.content_sha256()
    found = encode(other, tmp_path)
    assert found.stats.content_sha256 != first.stats.content_sha256
    assert TEXTS[50].upper().encode() in documents(found.train) + documents(found.val)


@pytest.mark.parametrize("streaming", [False, True])
def test_one_of_the_hub_is_known_by_its_commit_and_settings(streaming: bool, hub: Hub) -> None:
    hub.commit(NEW, train=TEXTS, test=TEXTS[:9], readme="better explained")

    def identity(**settings: Any) -> str:
        return of_hub(streaming=streaming, **settings).listing_sha256()

    assert identity() == identity(revision=NEW) == identity()
    assert identity(revision="first") == identity(revision=OLD)
    changes: list[dict[str, Any]] = [{}, {"revision": OLD}, {"split": "test"}, {"subset": "other"}]
    assert len({identity(**each) for each in [*changes, {"field": "x"}]}) == 5


def test_another_commit_with_the_same_texts_goes_on(hub: Hub, tmp_path: Path) -> None:
    before = encode(of_hub(), tmp_path)
    hub.commit(NEW, train=TEXTS, test=TEXTS[:9], readme="better explained")
    assert encode(of_hub(), tmp_path).stats.content_sha256 == before.stats.content_sha256


def test_what_was_streamed_at_a_commit_needs_no_network(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = encode(of_hub(streaming=True, revision=OLD), tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert encode(of_hub(streaming=True, revision=OLD), tmp_path).stats == first.stats


def test_without_a_network_the_cache_gives_what_it_has(tmp_path: Path) -> None:
    texts = {OLD: TEXTS[:40], NEW: TEXTS[40:]}
    for commit, rows in texts.items():
        file = tmp_path / f"{commit}.parquet"
        datasets.Dataset.from_dict({"text": rows}).to_parquet(file)
        made = datasets.load_dataset_builder("parquet", data_files=str(file), cache_dir=tmp_path / "made")
        made.download_and_prepare()
        place = tmp_path / "library/owner___stories/default/0.0.0" / commit
        shutil.copytree(made.cache_dir, place)
        for path in place.glob("*.arrow"):
            path.rename(path.with_name(path.name.replace("parquet", "stories")))
        info = json.loads((place / "dataset_info.json").read_text())
        (place / "dataset_info.json").write_text(json.dumps(info | {"dataset_name": "stories"}))
    for commit, rows in texts.items():
        assert list(of_hub(revision=commit).documents()) == rows
        assert list(of_hub(revision=commit, streaming=True).documents()) == rows
    assert list(of_hub().documents()) == texts[NEW]
    assert f"data.revision=v1 of hf://datasets/{NAME} is not in the cache, which has {NEW}" in failure(
        of_hub(revision="v1")
    )


# ----------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("path", "named"),
    [
        (None, "data.path is not set: name a folder of save_to_disk, or hf://datasets/OWNER/NAME"),
        ("owner/stories", "no folder of save_to_disk (relative to"),
        (".", "a data set of the hub is hf://datasets/OWNER/NAME, and files are read by data=corpus"),
        ("hf://owner/stories", "must be a folder of save_to_disk, or hf://datasets/OWNER/NAME"),
        ("hf://datasets/stories", "must be a folder of save_to_disk, or hf://datasets/OWNER/NAME"),
        ("s3://bucket/stories", "must be a folder of save_to_disk, or hf://datasets/OWNER/NAME"),
        ("hf://datasets/owner/other", "data.path=hf://datasets/owner/other cannot be read"),
        ("hf://datasets/owner/here", "there is a folder owner/here here, too"),
    ],
)
def test_paths(path: str | None, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner/here").mkdir(parents=True)
    assert named in failure(HuggingFaceDataset(path))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"subset": "german"}, "['english', 'other']"),
        ({"field": "body"}, "has no column 'body' (it has 'text')"),
        ({"revision": NEW}, f"data.path=hf://datasets/{NAME} cannot be read"),
    ],
)
def test_settings_of_the_hub(settings: dict[str, Any], named: str, streaming: bool, hub: Hub) -> None:
    assert named in failure(of_hub(streaming=streaming, **settings))


def test_columns_and_rows(tmp_path: Path, hub: Hub) -> None:
    path = saved(tmp_path / "saved", [*TEXTS[:70], None, "", *TEXTS[:5]])
    assert "has no column 'body' (it has 'number', 'text')" in failure(HuggingFaceDataset(path, field="body"))
    assert "column 'number' holds int64, not texts" in failure(HuggingFaceDataset(path, field="number"))
    assert list(HuggingFaceDataset(path).documents()) == [*TEXTS[:70], "", "", *TEXTS[:5]]
    hub.commit(NEW, train=[*TEXTS[:70], None, *TEXTS[71:]])  # type: ignore[list-item]
    assert list(of_hub(streaming=True).documents()) == [*TEXTS[:70], "", *TEXTS[71:]]
    assert "is empty, it has no Arrow files" in failure(HuggingFaceDataset(saved(tmp_path / "empty", [])))
    hub.commit(NEW, train=[], test=TEXTS)
    assert '"train" corresponds to no data' in failure(of_hub())
    assert list(of_hub(split="test").documents()) == TEXTS
    empty = HuggingFaceDataset(saved(tmp_path / "none", [], num_shards=1))
    assert "the split 'train' has no rows: choose another" in failure(empty)


def test_a_damaged_folder(tmp_path: Path) -> None:
    path = saved(tmp_path / "saved", TEXTS[:3])
    [file] = path.glob("*.arrow")
    whole = file.read_bytes()
    for length in range(0, len(whole), 97):
        file.write_bytes(whole[:length])
        assert "copy or save it again" in failure(HuggingFaceDataset(path))
    saved(path, TEXTS * 20)  # in batches of 1,000 rows
    whole = file.read_bytes()
    with pyarrow.memory_map(str(file)) as mapped:
        pyarrow.ipc.open_stream(mapped).read_next_batch()
        end = mapped.tell()
    file.write_bytes(whole[:end])
    assert f"{file} is cut short: copy or save it again" in failure(HuggingFaceDataset(path))
    file.write_bytes(whole)
    assert list(HuggingFaceDataset(path).documents()) == TEXTS * 20
    for text in ("", "[]", "{}", (path / "state.json").read_text()[:90]):
        (path / "state.json").write_text(text)
        assert "copy or save it again" in failure(HuggingFaceDataset(path))


@pytest.mark.parametrize(
    ("library", "named"),
    [
        (None, "data=hub needs a package that is not installed: pip install datasets"),
        (type(datasets)("datasets"), "datasets 3.6.0 runs programs of data sets: pip install 'datasets>=4'"),
    ],
)
def test_the_library(library: Any, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if library is not None:
        library.__version__ = "3.6.0"
    path = saved(tmp_path / "saved")
    monkeypatch.setitem(sys.modules, "datasets", library)
    assert failure(HuggingFaceDataset(path)) == failure(of_hub()) == named
