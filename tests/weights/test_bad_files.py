"""Files that are damaged, that lie, that hold code, or are of something else: one line says which and why."""

import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptpl.checkpoints.loading import load_foreign
from gptpl.errors import InputError
from gptpl.tokenizers import BytesTokenizer
from gptpl.weights.formats import FORMATS, open_model
from gptpl.weights.starting import FileWeights, PublishedWeights


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as refused:
        open_model(path)
    said = str(refused.value)
    assert "\n" not in said
    return said


# --------------------------------------------------------------------------------------------- safetensors


def damage(folder: Path, change: Callable[[bytes], bytes]) -> str:
    file = folder / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    return refusal(folder)


def with_header(data: bytes, change: Callable[[Any], object]) -> bytes:
    """The file with something done to its header, whose length comes first, in eight bytes."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def shift_end(header: Any) -> None:
    last = max(
        (entry for entry in header.values() if "data_offsets" in entry), key=lambda e: e["data_offsets"]
    )
    last["data_offsets"][1] += 4
    last["shape"][0] += 1


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda data: data[:-100], id="cut short"),
        pytest.param(lambda data: data[:5], id="cut in the length"),
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: data + b"tail", id="with a tail"),
        pytest.param(lambda data: (2**40).to_bytes(8, "little") + data[8:], id="header longer than the file"),
        pytest.param(lambda data: (2**63).to_bytes(8, "little") + data[8:], id="header of 2^63 bytes"),
        pytest.param(lambda data: with_header(data, shift_end), id="a tensor beyond the end"),
        pytest.param(lambda data: data[:8] + b"x" + data[9:], id="header that is no JSON"),
        pytest.param(lambda data: pickle.dumps({"a": 1}), id="a pickle under that name"),
    ],
)
def test_a_safetensors_file_that_is_not_whole(hugging_face, change):
    said = damage(hugging_face().path, change)
    assert "model.safetensors is damaged or cut short (" in said
    assert said.endswith("fetch it again")


def test_shards_that_are_not_all_there(hugging_face):
    folder = hugging_face(shard="40KB").path
    first, second, *_ = sorted(folder.glob("model-*.safetensors"))
    data = second.read_bytes()
    second.unlink()
    assert refusal(folder).startswith(f"{second} does not exist")
    second.write_bytes(first.read_bytes())
    assert "and another shard hold " in refusal(folder)
    second.write_bytes(data)
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"]["more"] = first.name
    index.write_text(json.dumps(listed))
    assert "lists 'more', which no shard holds" in refusal(folder)
    listed["weight_map"]["more"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(listed))
    assert "must list files in its own folder" in refusal(folder)
    for text in (
        "[]",
        '{"weight_map": {}}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": 1, "b": "c"}}',
    ):
        index.write_text(text)
        assert re.search("does not list shards|must list files", refusal(folder))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model_type", "llama", "has model_type='llama', gptpl 'gpt2': use another model"),
        ("activation_function", "relu", "has activation_function='relu'"),
        ("layer_norm_epsilon", 1e-6, "has layer_norm_epsilon=1e-06"),
        ("scale_attn_by_inverse_layer_idx", True, "has scale_attn_by_inverse_layer_idx=True"),
        ("n_inner", 100, "has n_inner=100, gptpl None or 128"),
        ("n_head", 5, "emb_dim=32, n_heads=5"),
        (
            "n_embd",
            None,
            "describes an impossible model: emb_dim must be a positive whole number, got None",
        ),
        ("tie_word_embeddings", "false", "has tie_word_embeddings='false', gptpl True or False"),
        (
            "n_layer",
            "three",
            "describes an impossible model: n_layers must be a positive whole number, got 'three'",
        ),
        ("resid_pdrop", None, "the dropout rate must be a number from 0 to 1, got None"),
    ],
)
def test_a_config_json_of_a_model_that_gptpl_does_not_have(hugging_face, key, value, words):
    folder = hugging_face().path
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {key: value}))
    assert words in refusal(folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not a JSON file"),
        ("[1]", "must hold a JSON object"),
        ("{}", "lacks vocab_size, n_positions"),
        ("{\xff", "is not a JSON file"),
    ],
)
def test_a_config_json_that_is_none(hugging_face, text, words):
    folder = hugging_face().path
    (folder / "config.json").write_text(text, encoding="latin-1")
    assert words in refusal(folder)


# ---------------------------------------------------------------------------------------------- torch files


class Trap:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("name", ["model.pth", "ckpt.pt", "pytorch_model.bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, name, zipped):
    content = {"tok_emb.weight": torch.zeros(2), "trap": Trap(tmp_path / "sprung")}
    torch.save(content, tmp_path / name, _use_new_zipfile_serialization=zipped)
    assert "is not a plain checkpoint of tensors and data" in refusal(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


def test_a_file_that_is_cut_short_or_empty(book):
    path = book().path
    data = path.read_bytes()
    for length in (len(data) - 10, len(data) // 2, 100, 0):
        path.write_bytes(data[:length])
        assert f"{path} is " in refusal(path)


def test_a_file_of_torch_without_a_model(tmp_path):
    path = tmp_path / "model.pth"
    torch.save([torch.zeros(2)], path)
    assert "does not hold a state dict" in refusal(path)
    torch.save({"conv1.weight": torch.zeros(2)}, path)
    assert "does not hold a GPT-2 that gptpl knows (its first tensor is 'conv1.weight')" in refusal(path)
    torch.save({}, path)
    assert "does not hold a state dict" in refusal(path)


def test_files_from_before_torch_1_6_are_read(book):
    theirs = book()
    content = torch.load(theirs.path, weights_only=True)
    torch.save(content, theirs.path, _use_new_zipfile_serialization=False)
    assert open_model(theirs.path).table.format == "book"


def test_no_files_at_all(tmp_path):
    assert refusal(tmp_path / "none").endswith("does not exist: give a folder or file that holds a model")
    assert "does not hold a model that gptpl knows: give a folder with config.json" in refusal(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "does not describe its model: give its folder" in refusal(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"init\.path is not set"):
        FileWeights(path=None).open()


# ------------------------------------------------------------------------------------- TensorFlow checkpoints


@pytest.mark.parametrize(
    ("hparams", "words"),
    [
        ({"n_layer": 4}, "lacks 'model/h3/attn/c_attn/b'"),
        ({"n_layer": 2}, "holds 'model/h2/attn/c_attn/b'"),
        ({"n_embd": 64}, "'model/wte' as (61, 32), the model wants (61, 64)"),
        ({"n_ctx": 32}, "'model/wpe' as (24, 32), the model wants (32, 32): set model.context_length=24"),
        ({"n_vocab": 62}, "'model/wte' as (61, 32), the model wants (62, 32): set model.vocab_size=61"),
    ],
)
def test_an_hparams_json_that_disagrees_with_the_tensors(openai, read, hparams, words):
    with pytest.raises(InputError) as refused:
        read(openai(hparams=hparams).path)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("hparams", "words"),
    [
        ({"n_layer": 10**9}, "n_layers must be at most 10,000, got 1000000000"),
        (
            {"n_layer": 999},
            "more tensors, which the model needs: give the weights of a model with as",
        ),
        ({"n_ctx": 10**15}, "context_length=1000000000000000 makes a model of 32,000,000,000,0"),
        ({"n_embd": 10**9}, "emb_dim=1000000000 makes a model of 36,000,000,"),
        ({"n_ctx": 10**12}, "'model/wpe' as (24, 32), the model wants (1000000000000, 32)"),
        ({"n_vocab": 10**12}, "'model/wte' as (61, 32), the model wants (1000000000000, 32)"),
    ],
)
def test_a_description_that_no_memory_could_hold(openai, hparams, words):
    with pytest.raises(InputError) as refused:
        load_foreign(open_model(openai(hparams=hparams).path), tokenizer=BytesTokenizer())
    assert words in str(refused.value)


def test_a_variable_that_is_missing(openai, read):
    with pytest.raises(InputError, match="lacks 'model/h1/ln_1/g', which the model needs"):
        read(openai(without="model/h1/ln_1/g").path)


def test_a_tensorflow_checkpoint_that_is_damaged(openai, read):
    folder = openai().path
    data = folder / "model.ckpt.data-00000-of-00001"
    whole = data.read_bytes()
    for damaged in (whole[:-5000], whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:]):
        data.write_bytes(damaged)
        with pytest.raises(InputError, match="is damaged or cut short"):
            read(folder)
    data.unlink()
    assert f"{data} does not exist" in refusal(folder)


def test_an_index_that_is_damaged(openai):
    folder = openai().path
    (folder / "model.ckpt.index").write_bytes(b"nonsense" * 20)
    assert "is damaged or cut short" in refusal(folder)


def test_without_tensorflow_the_command_that_installs_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # which makes its import fail
    sizes = {"n_vocab": 61, "n_ctx": 24, "n_embd": 32, "n_head": 4, "n_layer": 3}
    (tmp_path / "hparams.json").write_text(json.dumps(sizes))
    for part in ("index", "data-00000-of-00001"):
        (tmp_path / f"model.ckpt.{part}").write_bytes(b"")
    said = refusal(tmp_path)
    assert "not installed: pip install tensorflow-cpu" in said
    assert "init=gpt2_hf, the same weights without TensorFlow" in said


# ---------------------------------------------------------------------------------------- gptpl's own record


def test_a_gptpl_json_that_contradicts_the_files(hugging_face):
    folder = hugging_face().path
    model = {
        "vocab_size": 61, "context_length": 24, "emb_dim": 32, "n_heads": 8, "n_layers": 3, "drop_rate": 0.1,
        "qkv_bias": True, "tie_weights": True, "init": "gpt2",
    }  # fmt: skip
    hashes = {"model.safetensors": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()}
    lineage = {"step": 1, "start": {"init": "random"}}
    record = {
        "format_version": 1, "model": model, "tokenizer": {}, "lineage": lineage, "weights_sha256": hashes
    }  # fmt: skip
    path = folder / "gptpl.json"
    path.write_text(json.dumps(record))
    assert "says n_heads=4, gptpl.json next to it 8: restore the one that was changed" in refusal(folder)
    path.write_text(json.dumps(record | {"format_version": 9}))
    assert "has format version 9, this gptpl reads 1" in refusal(folder)
    path.write_text(json.dumps(record | {"lineage": 3}))
    assert "lacks lineage" in refusal(folder)
    for damaged in ({}, {"step": "x", "start": {}}, {"step": 1, "start": None}):
        path.write_text(json.dumps(record | {"lineage": damaged}))
        assert "lacks step or start in its lineage" in refusal(folder)
    path.write_text(json.dumps(record | {"model": model | {"wings": 2}}))
    assert "does not describe a model (" in refusal(folder)


# ---------------------------------------------------------------------------------------- a disk that is full


def test_a_disk_that_is_full_is_one_line_in_every_format_and_tensorflow_is_silent(tmp_path, openai):
    """In a process that may write no file of more than 20 kB, without settings for TensorFlow."""
    code = """
import resource, signal, sys
from pathlib import Path
from gptpl.errors import InputError
from gptpl.model import GPTConfig, GPTModel
from gptpl.tokenizers import BytesTokenizer
from gptpl.weights.formats import FORMATS, open_model

net = GPTModel(GPTConfig(vocab_size=61, context_length=24, emb_dim=32, n_heads=4, n_layers=3, drop_rate=0.0,
                         qkv_bias=True, tie_weights=True))
open_model(Path(sys.argv[2]))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
for name in FORMATS:
    folder = Path(sys.argv[1], name)
    folder.mkdir()
    try:
        FORMATS[name].write(net, folder, tokenizer=BytesTokenizer(), dtype="float32")
    except InputError as error:
        print(name, error)
"""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TF_")}
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-c", code, out, openai().path]
    done = subprocess.run(command, env=clean, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(FORMATS), done.stderr
    assert all(f"{out} does not take the files (" in line and "make room" in line for line in lines)
    assert done.stderr == ""


# ------------------------------------------------------------------------------------------------- settings


def test_a_wrong_size_or_source():
    with pytest.raises(InputError, match="size=125M is unknown: choose one of 124M, 355M, 774M, 1558M"):
        PublishedWeights(source="hf", size="125M")
    with pytest.raises(InputError, match="source=hub is unknown: choose one of hf, openai"):
        PublishedWeights(source="hub")
