"""State dicts that torch has saved: the book's, nanoGPT's, Hugging Face's older ones, and ours."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gptpl.errors import InputError
from gptpl.files.plain import read_plain
from gptpl.model import GPTModel
from gptpl.tokenizers import Tokenizer
from gptpl.weights import hugging_face
from gptpl.weights.model_files import (
    LAYERS,
    OWN,
    ModelFiles,
    Row,
    Table,
    gpt2_rows,
    read_record,
    recorded_config,
    state_dict_source,
    writing,
)
from gptpl.weights.transfer import export_tensors

BOOK_FILE = "model.pth"
NANOGPT_FILE = "ckpt.pt"
_COMPILED = "_orig_mod."
"""What torch.compile puts before the names of a module that was compiled as a whole."""
_WRAPPERS = ("model_state_dict", "state_dict", "model")
"""Keys of a state dict in a checkpoint that also holds an optimizer's."""

BOOK = Table(
    format="book",
    rows=gpt2_rows(
        (
            "trf_blocks.{i}.norm1",
            tuple(f"trf_blocks.{{i}}.att.W_{part}" for part in ("query", "key", "value")),
            *("trf_blocks.{i}.att.out_proj", "trf_blocks.{i}.norm2"),
            *("trf_blocks.{i}.ff.layers.0", "trf_blocks.{i}.ff.layers.2", "final_norm"),
        ),
        norm=(".scale", ".shift"),
    ),
    writes_head=True,
    qkv_bias=False,
    masks=("trf_blocks.{i}.att.mask",),
    mask_is_upper=True,
    writes_masks=True,
)
NANOGPT = replace(
    hugging_face.table(transposed=False),  # the names are the same
    format="nanogpt",
    sizes=("vocab_size", "block_size", "n_embd", "n_head", "n_layer"),
    tied_only=True,
    writes_head=True,
    bias_free=True,
)
_GATE_LAYER = "blocks.{i}.ff.gate_proj"
_GATE = tuple(Row(name, (name,)) for name in (f"{_GATE_LAYER}.weight", f"{_GATE_LAYER}.bias"))
OURS = Table(format=OWN, rows=(*gpt2_rows(LAYERS), *_GATE), writes_head=True, qkv_bias=False)
"""`GPTModel.state_dict()` itself; a row may name a parameter that only some models have."""


def write_book(net: GPTModel, folder: Path, *, tokenizer: Tokenizer, dtype: str) -> None:
    """Write `model.pth`, for the book's `load_state_dict`."""
    _save(export_tensors(net, BOOK), folder / BOOK_FILE)


def write_nanogpt(net: GPTModel, folder: Path, *, tokenizer: Tokenizer, dtype: str) -> None:
    """Write `ckpt.pt` for nanoGPT's `sample.py`, without an optimizer to resume with."""
    checkpoint = {
        "model": export_tensors(net, NANOGPT),
        "model_args": {**NANOGPT.sizes_of(net.config), "dropout": net.config.drop_rate, "bias": True},
        "config": {"dataset": "openwebtext"},  # it has no meta.pkl: sample.py takes GPT-2's tokenizer
        "iter_num": 0,
    }
    _save(checkpoint, folder / NANOGPT_FILE)


def _save(content: Mapping[str, Any], path: Path) -> None:
    with writing(path.parent, RuntimeError):
        torch.save(content, path)


def open_state_dict(path: Path) -> ModelFiles:
    """The model in a file of torch.

    Raises InputError for a file that is cut short, holds code, or has no state dict of a GPT-2.
    """
    content = read_plain(path)
    if not isinstance(content, dict) or not content:
        raise InputError(
            f"{path} does not hold a state dict: give a file of torch.save(model.state_dict(), ...)"
        )
    config, model_args = None, content.get("model_args")
    if isinstance(model_args, dict):
        config = NANOGPT.described(
            model_args,
            path,
            drop_rate=model_args.get("dropout", 0.0),
            qkv_bias=bool(model_args.get("bias", True)),
            tie_weights=True,
        )
    held = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), dict)), content)
    named = {str(name).removeprefix(_COMPILED): tensor for name, tensor in held.items()}
    tensors = state_dict_source(named, str(path))
    record = read_record(path.parent)
    # Nothing else describes it: if the model has changed since, its tensors will tell.
    if model := record.get("model", record.get("model_before")):
        config = recorded_config(model, path.parent)
    table = _table(tensors.shapes, path)
    return ModelFiles(path=path, table=table, tensors=tensors, config=config, record=record)


def _table(shapes: Mapping[str, tuple[int, ...]], path: Path) -> Table:
    """The table with these names; Hugging Face and nanoGPT have the same names in another layout."""
    if "trf_blocks.0.att.W_query.weight" in shapes:
        return BOOK
    if "blocks.0.attn.qkv.weight" in shapes:
        return OURS
    for prefix in (hugging_face.PREFIX, ""):
        if projection := shapes.get(f"{prefix}h.0.attn.c_attn.weight"):
            is_conv1d = len(projection) == 2 and projection[0] < projection[1]
            return hugging_face.table(prefix) if is_conv1d or not prefix else NANOGPT
    raise InputError(
        f"{path} does not hold a GPT-2 that gptpl knows (its first tensor is {next(iter(shapes), None)!r}):"
        " give a state dict of the book's GPTModel, of nanoGPT, of Hugging Face's GPT-2, or of gptpl"
    )
