"""The text of a model is found by its hash; what a checkpoint says of where it is counts for nothing."""

import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gptpl.callbacks.checkpoints import LastCheckpoint
from gptpl.checkpoints.format import HEADER_KEY, checkpoint_header
from gptpl.checkpoints.loading import LoadedCheckpoint, load_model
from gptpl.data.pretraining.encoding import encode_corpus
from gptpl.data.sources import Tale, TextFiles
from gptpl.errors import InputError
from gptpl.evaluation.memorisation import TrainingText, memorisation_lines, training_corpus
from gptpl.generation import Completion
from gptpl.tokenizers import BytesTokenizer, WordsTokenizer


@pytest.fixture
def loaded(pretraining, tmp_path) -> Callable[..., LoadedCheckpoint]:
    """A model from a lone file with these words about its text."""

    def make(sha256: object, tokenizer: Any = None, data: object = None) -> LoadedCheckpoint:
        tokenizer = tokenizer or BytesTokenizer()
        net = pretraining.net(vocab_size=tokenizer.vocab_size)
        config = {"data": {"train_ratio": 0.9} if data is None else data}
        header = checkpoint_header(net.config, tokenizer, config) | {"data_sha256": sha256}
        weights = {f"net.{name}": tensor for name, tensor in net.state_dict().items()}
        torch.save({"state_dict": weights, HEADER_KEY: header}, tmp_path / "lone.ckpt")
        return load_model(tmp_path / "lone.ckpt")

    return make


def test_a_text_in_the_cache_is_found_by_its_hash(pretraining, tmp_path):
    module = pretraining.module(total_steps=4, run_config={"data": {"train_ratio": 0.9}})
    data = pretraining.data()
    module.data_sha256 = data.content_sha256()
    pretraining.fit(LastCheckpoint(dirpath=str(tmp_path / "checkpoints")), module=module, data=data)
    loaded = load_model(tmp_path / "checkpoints/last.ckpt")
    pretraining.text.unlink()
    found = training_corpus(loaded, cache_dir=pretraining.cache)
    assert np.asarray(found.train).tolist() == data.encoded.train.tolist()
    assert found.val.tolist() == data.encoded.val.tolist()


def test_words_that_the_text_has_given_are_found_too(loaded, tmp_path):
    (tmp_path / "a.txt").write_text("the sea was still and the keeper sang " * 20)
    corpus = TextFiles(tmp_path / "a.txt")
    encoded = encode_corpus(corpus, WordsTokenizer(), train_ratio=0.9, cache_dir=tmp_path / "cache")
    hers = loaded(corpus.content_sha256(), encoded.tokenizer)
    assert (
        np.asarray(training_corpus(hers, cache_dir=tmp_path / "cache").train).tolist()
        == encoded.train.tolist()
    )
    other = loaded(corpus.content_sha256(), WordsTokenizer(["the", "sea", "<|endoftext|>", "<|unk|>"]))
    with pytest.raises(InputError, match="is not in this machine's cache"):
        training_corpus(other, cache_dir=tmp_path / "cache")
    entries = sorted((tmp_path / "cache").rglob("*"))
    assert training_corpus(hers, cache_dir=tmp_path / "cache") is not None
    assert sorted((tmp_path / "cache").rglob("*")) == entries  # nothing was taken for damaged


def test_the_text_that_ships_with_gptpl_needs_no_cache_and_makes_none(loaded, tmp_path):
    found = training_corpus(loaded(Tale().content_sha256()), cache_dir=tmp_path / "cache")
    (text,) = Tale().documents()
    assert bytes(np.asarray(found.train).tolist()).decode() == text[: int(0.9 * len(text))]
    assert not (tmp_path / "cache").exists()


def test_the_caller_names_any_other(loaded, tmp_path, caplog):
    (tmp_path / "a.txt").write_text("abcdefghij" * 20)
    corpus, cache = TextFiles(tmp_path / "a.txt"), tmp_path / "cache"
    own = loaded(corpus.content_sha256(), data={"train_ratio": 0.5})
    assert len(training_corpus(own, corpus, cache_dir=cache).train) == 100
    assert len(training_corpus(own, corpus, train_ratio=0.25, cache_dir=cache).train) == 50
    assert not caplog.records
    assert len(training_corpus(loaded("0" * 64), corpus, cache_dir=cache).train) == 180
    assert "text_file is not the text that" in caplog.text


@pytest.mark.parametrize(
    ("sha256", "data"),
    [
        *(("", {"train_ratio": 2.0}), ("../../x", {"train_ratio": "0.9"}), (64 * "Z", [])),
        *(("", {}), ("../../x", {"corpus": [1]})),
    ],
)
def test_an_invalid_hash_or_ratio(loaded, sha256, data, tmp_path):
    with pytest.raises(InputError, match="its SHA-256 is not recorded") as refused:
        training_corpus(loaded(sha256, data=data), cache_dir=tmp_path)
    assert str(tmp_path / "lone.ckpt") in str(refused.value)


CORPORA = "gptpl.data.sources"


class Asked(BaseHTTPRequestHandler):
    """A server that must not be asked."""

    times = 0

    def do_GET(self) -> None:
        type(self).times += 1
        self.send_error(404)

    def log_message(self, format: str, *args: Any) -> None:
        pass


_watching: list[list[tuple[str, str]]] = []
_ACTS = (
    "open",
    "socket",
    "subprocess",
    "os.system",
    "os.exec",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "shutil",
)


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event.startswith(_ACTS) and threading.current_thread() is threading.main_thread():
        _watching[-1].append((event, str(arguments[0]) if arguments else ""))


@contextmanager
def watched() -> Iterator[list[tuple[str, str]]]:
    """What this thread opens, connects to, starts and moves. A hook stays, so there is one for all."""
    if _note not in _HOOKS:
        _HOOKS.append(_note)
        sys.addaudithook(_note)
    _watching.append([])
    try:
        yield _watching[-1]
    finally:
        _watching.pop()


_HOOKS: list[Any] = []


@pytest.mark.parametrize(
    "corpus",
    [
        {"_target_": f"{CORPORA}.Downloaded", "url": "URL", "filename": "../x", "sha256": "0" * 64},
        {"_target_": f"{CORPORA}.Downloaded", "url": "URL", "name": "n", "sha256": None},
        {"_target_": f"{CORPORA}.TextFiles", "path": "/etc/passwd"},
        {"_target_": f"{CORPORA}.PythonStdlib", "root": "/etc"},
        {
            "_target_": "gptpl.data.sources.SmsSpam",
            "url": "URL",
            "member": "../x",
            "sha256": "0",
        },
        {"_target_": "os.system", "command": "touch x"},
        {"_target_": "shutil.copyfile", "src": "/etc/passwd", "dst": "x"},
        {"_target_": "urllib.request.urlopen", "url": "URL"},
    ],
)
def test_a_lone_checkpoint_opens_fetches_and_writes_nothing(corpus, loaded, tmp_path, monkeypatch):
    """Whatever its config says: watched by Python's own audit hooks, and by a server."""
    Asked.times = 0
    server = HTTPServer(("127.0.0.1", 0), Asked)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/story.txt"
        named = {key: url if value == "URL" else value for key, value in corpus.items()}
        model = loaded("0" * 64, data={"train_ratio": 0.9, "corpus": named})
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("GPTPL_CACHE", str(tmp_path / "cache"))
        before = sorted(tmp_path.rglob("*"))
        with watched() as seen, pytest.raises(InputError, match="name it, training_text=FILE"):
            training_corpus(model)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert sorted(tmp_path.rglob("*")) == before
    assert Asked.times == 0
    opened = {name for event, name in seen if event == "open"}
    assert not [name for name in opened if "passwd" in name or name.endswith("/x")]
    own = (tmp_path / "cache", sysconfig.get_path("stdlib"), sys.prefix, Path(__file__).parents[2])
    allowed = tuple(map(str, own))
    assert [name for name in opened if not name.startswith(allowed)] == []
    assert not [event for event, _ in seen if event != "open"]


def test_lines_of_memorisation(loaded):
    text = "".join(Tale().documents())
    samples = [
        Completion(prompt=0, sample=0, text=part, tokens=tuple(part.encode()), finish="length", details=None)
        for part in (text[5:30], "\x01\x02")
    ]
    training = TrainingText(np.asarray(training_corpus(loaded(Tale().content_sha256())).train))
    head, first, second = memorisation_lines(samples, training, decode=BytesTokenizer().decode)
    assert head == f"in the training text of {training.tokens:,} tokens word for word:"
    assert first.startswith(f"  text 1: 25 tokens in a row ({text[5:30]!r}), 100% of its 4-grams")
    assert second == "  text 2: 0 tokens in a row ('')"
