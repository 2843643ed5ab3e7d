"""Hugging Face's GPT-2: `config.json` and `model.safetensors`, as transformers reads them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptpl.errors import InputError
from gptpl.files.plain import read_plain
from gptpl.model import GPTConfig, GPTModel
from gptpl.weights.model_files import (
    ModelFiles,
    config_with_record,
    described_config,
    read_json,
    read_record,
    required,
    writing,
)
from gptpl.weights.sources import StateDict, TensorSource, safetensors_of
from gptpl.weights.tables import HEAD, Head, Layout, Row, Table, both
from gptpl.weights.transfer import export_tensors

CONFIG_FILE = "config.json"
OLD_FILE = "pytorch_model.bin"
PREFIX = "transformer."
SCORE = "score.weight"
"""The head of their classifiers."""

# Their linear layers are `Conv1D`, whose weight is (in, out).
TABLE = Table(
    format="hf",
    rows=(
        Row("tok_emb.weight", ("wte.weight",)),
        Row("pos_emb.weight", ("wpe.weight",)),
        *both("blocks.{i}.norm1", "h.{i}.ln_1"),
        *both("blocks.{i}.attn.qkv", "h.{i}.attn.c_attn", Layout.TRANSPOSED),
        *both("blocks.{i}.attn.out_proj", "h.{i}.attn.c_proj", Layout.TRANSPOSED),
        *both("blocks.{i}.norm2", "h.{i}.ln_2"),
        *both("blocks.{i}.ff.up_proj", "h.{i}.mlp.c_fc", Layout.TRANSPOSED),
        *both("blocks.{i}.ff.down_proj", "h.{i}.mlp.c_proj", Layout.TRANSPOSED),
        *both("final_norm", "ln_f"),
        Row(HEAD, ("lm_head.weight",)),
    ),
    head=Head.UNTIED,
    mask="h.{i}.attn.bias",  # in files that older versions of transformers wrote, OpenAI's among them
    ignored=("h.{i}.attn.masked_bias",),
)

_NAMES = {
    "vocab_size": "vocab_size",
    "context_length": "n_positions",
    "emb_dim": "n_embd",
    "n_heads": "n_head",
    "n_layers": "n_layer",
}
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}
"""What a GPT-2 can have otherwise, and `GPTModel` cannot."""


def with_prefix(table: Table, prefix: str) -> Table:
    """The table where every name but the head's begins with a prefix."""
    return table.renamed(lambda name: name if name == "lm_head.weight" else prefix + name)


def recognises(path: Path) -> bool:
    """Whether this is a folder with Hugging Face's files."""
    has_weights = any(path.glob("*.safetensors*")) or (path / OLD_FILE).is_file()
    return (path / CONFIG_FILE).is_file() and has_weights


def open_files(path: Path) -> ModelFiles:
    """The model of a folder. Raises InputError for one that is no GPT-2, or not whole."""
    record = read_record(path)
    said = described(read_json(path / CONFIG_FILE), path / CONFIG_FILE)
    tensors = tensors_of(path)
    prefixed = any(name.startswith(PREFIX) for name in tensors.shapes())
    if SCORE in tensors.shapes():
        raise InputError(
            f"{path} holds a classifier, no language model: use gptpl classify checkpoint={path}"
        )
    return ModelFiles(
        path=path,
        table=with_prefix(TABLE, PREFIX) if prefixed else TABLE,
        tensors=tensors,
        config=config_with_record(said, record, where=path / CONFIG_FILE),
        record=record,
    )


def tensors_of(path: Path) -> TensorSource:
    """Those of the safetensors; of `pytorch_model.bin` in a folder from before there were any."""
    if any(path.glob("*.safetensors*")):
        return safetensors_of(path)
    content = read_plain(path / OLD_FILE)
    if not isinstance(content, dict):
        raise InputError(f"{path / OLD_FILE} holds no state dict: fetch it anew")
    return StateDict(content, str(path / OLD_FILE))


def described(content: Mapping[str, Any], path: Path) -> GPTConfig:
    """The model of a `config.json`. Raises InputError for one that is no GPT-2, or another than gptpl has."""
    for name, allowed in _FIXED.items():
        if content.get(name, allowed[0]) not in allowed:
            raise InputError(
                f"{path} says {name}={content[name]}, gptpl's model has {allowed[0]}: use another model"
            )
    fields = required(content, _NAMES, path)
    tied = content.get("tie_word_embeddings", True)
    if not isinstance(tied, bool):
        raise InputError(f"{path} says tie_word_embeddings={tied!r}: give true or false")
    config = described_config(
        path,
        fields,
        drop_rate=content.get("resid_pdrop", 0.1),
        qkv_bias=True,
        tie_weights=tied,
        init="gpt2",
    )
    if content.get("n_inner") not in (None, 4 * config.emb_dim):
        raise InputError(
            f"{path} says n_inner={content['n_inner']}, gptpl has {4 * config.emb_dim}: use another model"
        )
    return config


def write_files(net: GPTModel, folder: Path, *, dtype: torch.dtype | None, eot_id: int) -> None:
    """`config.json`, `generation_config.json` and `model.safetensors`."""
    table = with_prefix(TABLE, PREFIX)
    stored = write_tensors(export_tensors(net, table, dtype=dtype), folder)
    write_json(folder / CONFIG_FILE, their_config(net.config, stored, eot_id))
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": eot_id, "eos_token_id": eot_id, "pad_token_id": eot_id},
    )


def write_tensors(tensors: dict[str, Tensor], folder: Path) -> str:
    """`model.safetensors`; returns the name of their data type."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with writing(folder, SafetensorError):
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(next(iter(tensors.values())).dtype).removeprefix("torch.")


def their_config(config: GPTConfig, dtype: str, eot_id: int) -> dict[str, Any]:
    """The content of `config.json`."""
    ours = {theirs: getattr(config, name) for name, theirs in _NAMES.items()}
    fixed = {name: allowed[0] for name, allowed in _FIXED.items()}
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.drop_rate)
    return {
        "architectures": ["GPT2LMHeadModel"],
        **fixed,
        **ours,
        **drops,
        "n_inner": None,
        "tie_word_embeddings": config.tie_weights,
        "bos_token_id": eot_id,
        "eos_token_id": eot_id,
        "dtype": dtype,
        "torch_dtype": dtype,  # as transformers called it before version 5
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON file that people can read."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
