"""State dicts of the book's `GPTModel`: `model.pth`, and `model_and_optimizer.pth`."""

from pathlib import Path

import torch

from gptpl.model import GPTModel
from gptpl.weights.model_files import writing
from gptpl.weights.tables import HEAD, Head, Row, Table, both
from gptpl.weights.transfer import export_tensors

FILE = "model.pth"


def _norm(ours: str, theirs: str) -> tuple[Row, Row]:
    return Row(f"{ours}.weight", (f"{theirs}.scale",)), Row(f"{ours}.bias", (f"{theirs}.shift",))


def _three(kind: str) -> tuple[str, ...]:
    return tuple(f"trf_blocks.{{i}}.att.W_{part}.{kind}" for part in ("query", "key", "value"))


TABLE = Table(
    format="book",
    rows=(
        Row("tok_emb.weight", ("tok_emb.weight",)),
        Row("pos_emb.weight", ("pos_emb.weight",)),
        *_norm("blocks.{i}.norm1", "trf_blocks.{i}.norm1"),
        Row("blocks.{i}.attn.qkv.weight", _three("weight")),
        Row("blocks.{i}.attn.qkv.bias", _three("bias")),
        *both("blocks.{i}.attn.out_proj", "trf_blocks.{i}.att.out_proj"),
        *_norm("blocks.{i}.norm2", "trf_blocks.{i}.norm2"),
        *both("blocks.{i}.ff.up_proj", "trf_blocks.{i}.ff.layers.0"),
        *both("blocks.{i}.ff.down_proj", "trf_blocks.{i}.ff.layers.2"),
        *_norm("final_norm", "final_norm"),
        Row(HEAD, ("out_head.weight",)),
    ),
    head=Head.ALWAYS,
    qkv_bias=False,
    mask="trf_blocks.{i}.att.mask",
    mask_of_ones="upper",
    writes_mask=True,
)


def write_files(net: GPTModel, folder: Path, *, dtype: torch.dtype | None, eot_id: int) -> None:
    """`model.pth`, for the book's `load_state_dict`."""
    del eot_id
    tensors = export_tensors(net, TABLE, dtype=dtype)
    with writing(folder, RuntimeError):
        torch.save(tensors, folder / FILE)
