"""nanoGPT's `ckpt.pt`: a dictionary with the `model` and its `model_args`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gptpl.model import GPTConfig, GPTModel
from gptpl.weights.model_files import described_config, required, writing
from gptpl.weights.tables import HEAD, Head, Row, Table, both
from gptpl.weights.transfer import export_tensors

FILE = "ckpt.pt"
COMPILED = "_orig_mod."
"""What torch.compile puts before the names of a module that was compiled as a whole."""

TABLE = Table(
    format="nanogpt",
    rows=(
        Row("tok_emb.weight", ("transformer.wte.weight",)),
        Row("pos_emb.weight", ("transformer.wpe.weight",)),
        *both("blocks.{i}.norm1", "transformer.h.{i}.ln_1"),
        *both("blocks.{i}.attn.qkv", "transformer.h.{i}.attn.c_attn"),
        *both("blocks.{i}.attn.out_proj", "transformer.h.{i}.attn.c_proj"),
        *both("blocks.{i}.norm2", "transformer.h.{i}.ln_2"),
        *both("blocks.{i}.ff.up_proj", "transformer.h.{i}.mlp.c_fc"),
        *both("blocks.{i}.ff.down_proj", "transformer.h.{i}.mlp.c_proj"),
        *both("final_norm", "transformer.ln_f"),
        Row(HEAD, ("lm_head.weight",)),
    ),
    head=Head.TWIN,
    mask="transformer.h.{i}.attn.bias",  # where it was run without flash attention
    bias_free=True,
)

_NAMES = {
    "vocab_size": "vocab_size",
    "context_length": "block_size",
    "emb_dim": "n_embd",
    "n_heads": "n_head",
    "n_layers": "n_layer",
}


def config_of(model_args: Mapping[str, Any], path: Path) -> GPTConfig:
    """The configuration that `model_args` are of."""
    return described_config(
        path,
        required(model_args, _NAMES, path),
        drop_rate=model_args.get("dropout", 0.0),
        qkv_bias=bool(model_args.get("bias", True)),
        tie_weights=True,
        init="gpt2",
    )


def write_files(net: GPTModel, folder: Path, *, dtype: torch.dtype | None, eot_id: int) -> None:
    """`ckpt.pt`, as nanoGPT's `sample.py` reads it; it holds no optimizer to resume with."""
    del eot_id
    config = net.config
    model_args = {theirs: getattr(config, ours) for ours, theirs in _NAMES.items()}
    checkpoint = {
        "model": export_tensors(net, TABLE, dtype=dtype),
        "model_args": {**model_args, "dropout": config.drop_rate, "bias": True},
        "config": {"dataset": "openwebtext"},  # has no meta.pkl: sample.py takes GPT-2's tokenizer
        "iter_num": 0,
    }
    with writing(folder, RuntimeError):
        torch.save(checkpoint, folder / FILE)
