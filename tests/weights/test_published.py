"""The published sizes: their shapes, what must fit, and fetching them from a server that the test runs."""

import hashlib
import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gptpl.errors import InputError
from gptpl.files import download
from gptpl.model import count_parameters
from gptpl.tokenizers import BytesTokenizer, GPT2Tokenizer
from gptpl.weights import published
from gptpl.weights.published import SIZES, cached_bytes, fetch, files_of, weights_folder
from gptpl.weights.starting import PublishedWeights

GPT2 = GPT2Tokenizer().state()


class Handler(BaseHTTPRequestHandler):
    server: "Server"

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        content = self.server.files.get(self.path)
        self.send_response(200 if content is not None else 404)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        self.wfile.write(content or b"")

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("GPTPL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GPTPL_MIRROR", raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


HUB = "/openai-community/gpt2-large/resolve/32b71b12589c2f8d625668d2335a01cac3249519"


@pytest.fixture
def large(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """Has what stands for GPT-2 large, of which neither size nor hash are pinned."""
    server.files = {f"{HUB}/config.json": b"{}", f"{HUB}/model.safetensors": b"weights" * 1000}
    small = published.Size(name="774M", emb_dim=1, n_heads=1, n_layers=1, choice="gpt2_large")
    monkeypatch.setitem(published.SIZES, "774M", small)
    monkeypatch.setattr(published, "_WEIGHTS_FILES", ())
    return server


# ----------------------------------------------------------------------------------------------- the sizes


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("124M", 124_439_808), ("355M", 354_823_168), ("774M", 774_030_080), ("1558M", 1_557_611_200)],
)
def test_the_sizes_have_as_many_parameters_as_was_published(name, parameters):
    assert count_parameters(SIZES[name].config).total == parameters


def test_pinned_lengths_hold_the_parameters():
    """A file is its parameters in fp32, on the hub with a mask of 1,024 x 1,024 a block, and a header."""
    for size in SIZES.values():
        count = 4 * count_parameters(size.config).total
        for source, masks in (("hf", 4 * 1024**2 * size.n_layers), ("openai", 0)):
            *_, largest = files_of(size, source)
            if largest.size is not None:
                assert 0 <= largest.size - count - masks < 100_000, (size.name, source)


def test_openais_files_are_the_seven_that_it_published():
    names = {file.name for file in files_of(SIZES["355M"], "openai")}
    assert names == {
        "checkpoint", "encoder.json", "hparams.json", "model.ckpt.data-00000-of-00001", "model.ckpt.index",
        "model.ckpt.meta", "vocab.bpe",
    }  # fmt: skip
    assert {file.path.rpartition("/")[0] for file in files_of(SIZES["355M"], "openai")} == {
        "gpt-2/models/355M"
    }


# ------------------------------------------------------------------------------------------- what must fit


def check(tokenizer: Any = GPT2, *, source: str = "hf", **changes: Any) -> str:
    """Why weights do not fit GPT-2 small with changes; empty if they do."""
    options = {name: changes.pop(name) for name in ("size", "crop_context") if name in changes}
    try:
        PublishedWeights(source=source, **options).check(replace(SIZES["124M"].config, **changes), tokenizer)
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("source", ["hf", "openai"])
def test_the_published_shape_fits(source):
    assert check(source=source) == ""
    assert check(source=source, drop_rate=0.0, init="torch") == ""


def test_the_size_is_the_one_with_the_models_shape():
    weights = PublishedWeights(source="hf")
    assert [weights.size_for(size.config) for size in SIZES.values()] == list(SIZES.values())
    assert weights.size_for(None) is SIZES["124M"]


@pytest.mark.parametrize(
    ("changes", "fact", "remedy"),
    [
        ({"qkv_bias": False}, "model.qkv_bias=false, they have true", "set model.qkv_bias=true"),
        ({"tie_weights": False}, "model.tie_weights=false, they have true", "set model.tie_weights=true"),
        (
            {"context_length": 2048},
            "model.context_length=2048, they have 1024",
            "set model.context_length=1024",
        ),
        ({"n_heads": 6}, "model.n_heads=6, they have 12", "set model.n_heads=12"),
        ({"vocab_size": 50304}, "model.vocab_size=50304, they have 50257", "set model.vocab_size=50257"),
        (
            {"context_length": 256},
            "model.context_length=256, they have 1024",
            "set model.context_length=1024, or init.crop_context=true to leave out the rest of their context"
            " length",
        ),
        (
            {"context_length": 256, "qkv_bias": False, "tie_weights": False},
            "model.context_length=256, they have 1024; model.qkv_bias=false, they have true;"
            " model.tie_weights=false, they have true",
            "set model=gpt2_small, or init.crop_context=true to leave out the rest of their context length",
        ),
        ({"size": "355M"}, "model.emb_dim=768, they have 1024; model.n_heads=12", "set model=gpt2_medium"),
    ],
)
def test_a_mismatch_names_the_field_both_values_and_the_remedy(changes, fact, remedy):
    said = check(**changes)
    assert fact in said
    assert said.endswith(remedy)


def test_a_shape_that_no_size_has_names_the_models_that_do():
    said = check(emb_dim=64, n_heads=4, n_layers=2)
    assert "no weights for emb_dim=64 with n_layers=2" in said
    assert said.endswith("set model= to one of gpt2_small, gpt2_medium, gpt2_large, gpt2_xl")


def test_a_shorter_context_fits_when_it_is_asked_for():
    assert check(context_length=256, crop_context=True) == ""
    assert "model.context_length=2048" in check(context_length=2048, crop_context=True)


def test_another_tokenizer_does_not_fit():
    said = check(BytesTokenizer().state())
    assert "has weights for GPT-2's tokens, this run has tokenizer=bytes: set tokenizer=gpt2" in said


# ----------------------------------------------------------------------------------------------- fetching


def test_fetching_once_is_enough(large, caplog):
    caplog.set_level(logging.INFO)
    folder = fetch(SIZES["774M"], "hf", mirror=large.url)
    assert folder == weights_folder(SIZES["774M"], "hf")
    assert (folder / "model.safetensors").read_bytes() == b"weights" * 1000
    assert cached_bytes(SIZES["774M"], "hf")[1]
    assert large.asked == [f"{HUB}/config.json", f"{HUB}/model.safetensors"]
    digest = hashlib.sha256(b"weights" * 1000).hexdigest()
    assert f"no SHA-256 is published, {digest} is recorded" in caplog.text
    assert (folder / "model.safetensors.sha256").read_text() == f"{digest}  model.safetensors\n"
    large.files.clear()
    assert fetch(SIZES["774M"], "hf", mirror=large.url) == folder
    assert len(large.asked) == 2, "the second time nothing is asked for"


def test_later_starts_hash_nothing_again(large, monkeypatch):
    hashed: list[str] = []

    def counted(path: Path) -> str:
        hashed.append(path.name)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr(download, "sha256_of", counted)
    monkeypatch.setattr(download, "_LARGE_BYTES", 100)  # the weights have 7,000, config.json 2
    for _ in range(3):
        fetch(SIZES["774M"], "hf", mirror=large.url)
    assert hashed.count("model.safetensors.part") == 1
    assert "model.safetensors" not in hashed


def test_a_trailing_slash_and_the_environment(large, monkeypatch):
    monkeypatch.setenv("GPTPL_MIRROR", f"{large.url}/")
    assert (fetch(SIZES["774M"], "hf") / "config.json").read_bytes() == b"{}"


def test_what_was_recorded_holds(large):
    folder = fetch(SIZES["774M"], "hf", mirror=large.url)
    (folder / "model.safetensors").write_bytes(b"damaged")
    large.files[f"{HUB}/model.safetensors"] = b"another file"
    with pytest.raises(InputError, match=r"has SHA-256 .*\(as recorded in .*model\.safetensors\.sha256\)"):
        fetch(SIZES["774M"], "hf", mirror=large.url)
    assert (folder / "model.safetensors").read_bytes() == b"damaged", "the user's file is left alone"
    large.files[f"{HUB}/model.safetensors"] = b"weights" * 1000
    fetch(SIZES["774M"], "hf", mirror=large.url)
    assert (folder / "model.safetensors").read_bytes() == b"weights" * 1000


def test_a_pinned_hash_is_not_taken_from_the_server(server):
    path = "/openai-community/gpt2-xl/resolve/15ea56dee5df4983c59b2538573817e1667135e2"
    server.files = {f"{path}/config.json": b"{}"}
    with pytest.raises(InputError, match=r"has SHA-256 .*, not be48115d"):
        fetch(SIZES["1558M"], "hf", mirror=server.url)
    assert not (weights_folder(SIZES["1558M"], "hf") / "config.json").exists()


def test_a_pinned_length_is_checked_before_the_download(server):
    server.files = {f"/gpt-2/models/124M/{name}": b"short" for name in ("encoder.json", "vocab.bpe")}
    with pytest.raises(InputError, match="it has 5 bytes there, not 1,042,301"):
        fetch(SIZES["124M"], "openai", mirror=server.url)


def test_without_a_network_it_says_how_to_fetch_elsewhere(large):
    with pytest.raises(InputError) as refused:
        fetch(SIZES["355M"], "hf", mirror=large.url)
    said = str(refused.value)
    assert "(HTTP 404 Not Found)" in said
    assert "gptpl weights fetch size=355M source=hf on a machine with one" in said
    assert f"copy its folder to {weights_folder(SIZES['355M'], 'hf')}" in said


def test_a_page_that_asks_for_a_login_is_not_taken_for_a_file(large):
    large.files[f"{HUB}/config.json"] = b"\n<html>please log in</html>"
    with pytest.raises(InputError, match=r"config\.json of GPT-2 774M came as a web page: it was removed"):
        fetch(SIZES["774M"], "hf", mirror=large.url)
    assert not list(weights_folder(SIZES["774M"], "hf").glob("config.json*[!k]"))
    large.files[f"{HUB}/config.json"] = b"{}"
    assert fetch(SIZES["774M"], "hf", mirror=large.url).is_dir()


def test_a_file_that_cannot_hold_the_weights_is_not_taken(server):
    server.files = {f"{HUB}/config.json": b"{}", f"{HUB}/model.safetensors": b"weights" * 1000}
    with pytest.raises(InputError, match=r"came as 7,000 bytes, fewer than the weights have"):
        fetch(SIZES["774M"], "hf", mirror=server.url)
    assert not (weights_folder(SIZES["774M"], "hf") / "model.safetensors").exists()


def test_files_that_were_copied_by_hand_are_taken(server, monkeypatch):
    monkeypatch.setattr(published, "_WEIGHTS_FILES", ())
    folder = weights_folder(SIZES["355M"], "hf")
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes(b"by hand")
    assert fetch(SIZES["355M"], "hf", mirror=server.url) == folder
    assert server.asked == []
    assert (folder / "config.json.sha256").is_file(), "recorded on first use"


def test_a_part_counts_as_in_part(server):
    folder = weights_folder(SIZES["355M"], "hf")
    folder.mkdir(parents=True)
    (folder / "model.safetensors.part").write_bytes(b"half")
    assert cached_bytes(SIZES["355M"], "hf") == (4, False)


def test_the_default_servers():
    assert published.SERVERS == {
        "hf": "https://huggingface.co",
        "openai": "https://openaipublic.blob.core.windows.net",
    }
