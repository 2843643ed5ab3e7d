"""Files of torch with a model's tensors: the book's, nanoGPT's, Hugging Face's older ones, and ours."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gptpl.errors import InputError
from gptpl.files.plain import read_plain
from gptpl.model import GPTModel
from gptpl.weights import hugging_face
from gptpl.weights.model_files import (
    ModelFiles,
    described_config,
    read_record,
    recorded_config,
    sizes_of,
    state_dict_source,
    writing,
)
from gptpl.weights.tables import HEAD, OWN, POSITIONS, TOKENS, Head, Layout, Row, Table, both, gpt2_rows
from gptpl.weights.transfer import export_tensors

BOOK_FILE = "model.pth"
NANOGPT_FILE = "ckpt.pt"
_NANOGPT_SIZES = ("vocab_size", "block_size", "n_embd", "n_head", "n_layer")
_COMPILED = "_orig_mod."
"""What torch.compile puts before the names of a module that was compiled as a whole."""
_WRAPPERS = ("model_state_dict", "state_dict", "model")
"""Under what a state dict stands beside an optimizer's."""


def _three(kind: str) -> tuple[str, ...]:
    return tuple(f"trf_blocks.{{i}}.att.W_{part}.{kind}" for part in ("query", "key", "value"))


def _norm(ours: str, theirs: str) -> tuple[Row, Row]:
    return both(ours, theirs, ".scale", ".shift")


def _linear(ours: str, theirs: str) -> tuple[Row, Row]:
    return both(ours, theirs, ".weight", ".bias")


BOOK = Table(
    format="book",
    rows=(
        Row(TOKENS, (TOKENS,)),
        Row(POSITIONS, (POSITIONS,)),
        *_norm("blocks.{i}.norm1", "trf_blocks.{i}.norm1"),
        Row("blocks.{i}.attn.qkv.weight", _three("weight")),
        Row("blocks.{i}.attn.qkv.bias", _three("bias")),
        *_linear("blocks.{i}.attn.out_proj", "trf_blocks.{i}.att.out_proj"),
        *_norm("blocks.{i}.norm2", "trf_blocks.{i}.norm2"),
        *_linear("blocks.{i}.ff.up_proj", "trf_blocks.{i}.ff.layers.0"),
        *_linear("blocks.{i}.ff.down_proj", "trf_blocks.{i}.ff.layers.2"),
        *_norm("final_norm", "final_norm"),
        Row(HEAD, (HEAD,)),
    ),
    head=Head.ALWAYS,
    qkv_bias=False,
    masks=("trf_blocks.{i}.att.mask",),
    mask_of_ones="upper",
    writes_masks=True,
)
NANOGPT = Table(
    format="nanogpt",
    rows=gpt2_rows(Layout.SAME, prefix="transformer."),
    head=Head.TWIN,
    masks=("transformer.h.{i}.attn.bias",),  # where it was run without flash attention
    bias_free=True,
)
OURS = Table(
    format=OWN,
    rows=(
        *(Row(row.ours, (row.ours,)) for row in BOOK.rows),
        *_linear("blocks.{i}.ff.gate_proj", "blocks.{i}.ff.gate_proj"),
    ),
    head=Head.ALWAYS,
    qkv_bias=False,
)
"""`GPTModel.state_dict()` itself; a row may name a parameter that only some models have."""


def write_book(net: GPTModel, folder: Path, *, eot_id: int) -> None:
    """`model.pth`, for the book's `load_state_dict`."""
    del eot_id
    _save(export_tensors(net, BOOK), folder / BOOK_FILE)


def write_nanogpt(net: GPTModel, folder: Path, *, eot_id: int) -> None:
    """`ckpt.pt`, as nanoGPT's `sample.py` reads it; it holds no optimizer to resume with."""
    del eot_id
    sizes = sizes_of(net.config, _NANOGPT_SIZES)
    checkpoint = {
        "model": export_tensors(net, NANOGPT),
        "model_args": {**sizes, "dropout": net.config.drop_rate, "bias": True},
        "config": {"dataset": "openwebtext"},  # has no meta.pkl: sample.py takes GPT-2's tokenizer
        "iter_num": 0,
    }
    _save(checkpoint, folder / NANOGPT_FILE)


def _save(content: Mapping[str, Any], path: Path) -> None:
    with writing(path.parent, RuntimeError):
        torch.save(content, path)


def open_state_dict(path: Path) -> ModelFiles:
    """The model of a file that torch wrote.

    Raises InputError for a file that is cut short, that holds code, or that is no state dict of a GPT-2.
    """
    content = read_plain(path)
    found = content if isinstance(content, dict) else {}
    config, model_args = None, found.get("model_args")
    if isinstance(model_args, dict):
        config = described_config(
            model_args,
            _NANOGPT_SIZES,
            path,
            drop_rate=model_args.get("dropout", 0.0),
            qkv_bias=bool(model_args.get("bias", True)),
            tie_weights=True,
        )
    held = next((found[key] for key in _WRAPPERS if isinstance(found.get(key), dict)), found)
    if not found:
        raise InputError(
            f"{path} holds no state dict: give a file that torch.save(model.state_dict(), ...) wrote"
        )
    named = {str(name).removeprefix(_COMPILED): tensor for name, tensor in held.items()}
    tensors = state_dict_source(named, str(path))
    record = read_record(path.parent)
    # It has no other description: where the model is another one now, its tensors will tell.
    if model := record.get("model", record.get("model_before")):
        config = recorded_config(model, path.parent)
    table = _table(tensors.shapes, path)
    return ModelFiles(path=path, table=table, tensors=tensors, config=config, record=record)


def _table(shapes: Mapping[str, tuple[int, ...]], path: Path) -> Table:
    """The table whose names these are. Hugging Face's and nanoGPT's names are the same, not their layout."""
    if "trf_blocks.0.att.W_query.weight" in shapes:
        return BOOK
    if "blocks.0.attn.qkv.weight" in shapes:
        return OURS
    for prefix in ("transformer.", ""):
        if projection := shapes.get(f"{prefix}h.0.attn.c_attn.weight"):
            is_conv1d = len(projection) == 2 and projection[0] < projection[1]
            return hugging_face.table(prefix) if is_conv1d or not prefix else NANOGPT
    raise InputError(
        f"{path} holds tensors of no GPT-2 that gptpl knows (the first is {next(iter(shapes), None)!r}): give"
        " a state dict of the book's GPTModel, of nanoGPT, of Hugging Face's GPT-2, or of gptpl"
    )
