"""OpenAI's TensorFlow checkpoints: `hparams.json` and `model.ckpt.*`; no other module imports tensorflow."""

import logging
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptpl.errors import InputError
from gptpl.model import GPTModel
from gptpl.weights.model_files import (
    ModelFiles,
    TensorSource,
    described_config,
    read_json,
    sizes_of,
    with_record,
    write_json,
    writing,
)
from gptpl.weights.tables import POSITIONS, TOKENS, Head, Layout, Row, Table, both
from gptpl.weights.transfer import export_tensors

_HPARAMS_FILE = "hparams.json"
_CHECKPOINT = "model.ckpt"
_SIZES = ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")


def _linear(ours: str, theirs: str) -> tuple[Row, Row]:
    return both(ours, theirs, "/w", "/b", Layout.ONE_TRANSPOSED)


def _norm(ours: str, theirs: str) -> tuple[Row, Row]:
    return both(ours, theirs, "/g", "/b")


_TABLE = Table(
    format="openai-tf",
    rows=(
        Row(TOKENS, ("model/wte",)),
        Row(POSITIONS, ("model/wpe",)),
        *_norm("blocks.{i}.norm1", "model/h{i}/ln_1"),
        *_linear("blocks.{i}.attn.qkv", "model/h{i}/attn/c_attn"),
        *_linear("blocks.{i}.attn.out_proj", "model/h{i}/attn/c_proj"),
        *_norm("blocks.{i}.norm2", "model/h{i}/ln_2"),
        *_linear("blocks.{i}.ff.up_proj", "model/h{i}/mlp/c_fc"),
        *_linear("blocks.{i}.ff.down_proj", "model/h{i}/mlp/c_proj"),
        *_norm("final_norm", "model/ln_f"),
    ),
    head=Head.NEVER,
)


def recognises(path: Path) -> bool:
    """Whether this is a folder with OpenAI's files."""
    return (path / _HPARAMS_FILE).is_file()


def open_files(path: Path) -> ModelFiles:
    """The model of a folder. Raises InputError for one that is not whole, or without tensorflow."""
    where = path / _HPARAMS_FILE
    said = described_config(read_json(where), _SIZES, where, drop_rate=0.1, qkv_bias=True, tie_weights=True)
    return with_record(path, _TABLE, _variables_of(path / _CHECKPOINT), said, where)


def _variables_of(prefix: Path) -> TensorSource:
    """The variables of a checkpoint, read one at a time; TensorFlow checks each one's CRC-32C."""
    data = prefix.with_name(f"{prefix.name}.data-00000-of-00001")
    for part in (prefix.with_name(f"{prefix.name}.index"), data):
        if not part.is_file():
            raise InputError(f"{part} does not exist: give the folder that holds it, or fetch it anew")
    tf = _tensorflow()

    def damaged(error: object) -> InputError:
        reason = " ".join(str(error).split())[:200]
        return InputError(f"{prefix} is no whole TensorFlow checkpoint ({reason}): fetch it anew")

    try:
        reader = tf.train.load_checkpoint(str(prefix))
        shapes = {name: tuple(shape) for name, shape in reader.get_variable_to_shape_map().items()}
        dtypes = reader.get_variable_to_dtype_map()
        claimed = sum(math.prod(shapes[name]) * dtypes[name].size for name in shapes)
    except (tf.errors.OpError, ValueError, RuntimeError) as error:
        raise damaged(error) from error
    if claimed > (held := data.stat().st_size):
        raise damaged(f"its index has {claimed:,} bytes of numbers, its data {held:,}")

    def read(name: str) -> Tensor:
        try:
            array = reader.get_tensor(name)
            if dtypes[name].name == "bfloat16":  # which NumPy does not have: TensorFlow's own, bit for bit
                return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
            return torch.from_numpy(array)
        except (tf.errors.OpError, ValueError, RuntimeError, LookupError) as error:
            raise damaged(error) from error

    words = {name: str(dtypes[name].name) for name in shapes}
    return TensorSource(where=str(prefix), shapes=shapes, dtypes=words, read=read)


def write_files(net: GPTModel, folder: Path, *, eot_id: int) -> None:
    """`hparams.json`, `checkpoint` and `model.ckpt.*`, which OpenAI's program restores its variables from."""
    del eot_id  # OpenAI's program knows it
    tf = _tensorflow()
    tensors = export_tensors(net, _TABLE, dtype=torch.float32)
    names = list(tensors)
    with writing(folder, tf.errors.OpError):
        tf.raw_ops.SaveV2(
            prefix=str(folder / _CHECKPOINT),
            tensor_names=names,
            shape_and_slices=[""] * len(names),
            # TensorFlow copies: each one of ours goes as its copy comes.
            tensors=[tf.convert_to_tensor(tensors.pop(name).numpy()) for name in names],
        )
    lines = [f'model_checkpoint_path: "{_CHECKPOINT}"', f'all_model_checkpoint_paths: "{_CHECKPOINT}"']
    (folder / "checkpoint").write_text("\n".join(lines) + "\n", encoding="ascii")
    write_json(folder / _HPARAMS_FILE, sizes_of(net.config, _SIZES))


def _tensorflow() -> Any:
    """TensorFlow, without the lines that it writes when it is imported, and without a GPU."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    try:
        import tensorflow as tf  # type: ignore[import-untyped]
    except ImportError as error:
        raise InputError(
            "OpenAI's checkpoints are TensorFlow's, which is not installed: pip install tensorflow-cpu (on a"
            " Mac: tensorflow); or use init=gpt2_hf, the same weights without TensorFlow"
        ) from error
    tf.config.set_visible_devices([], "GPU")  # it would take all memory of the GPU
    return tf
