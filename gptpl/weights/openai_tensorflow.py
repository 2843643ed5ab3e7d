"""OpenAI's TensorFlow checkpoints: `hparams.json` and `model.ckpt.*`; no other module imports tensorflow."""

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptpl.errors import InputError
from gptpl.model import GPTModel
from gptpl.weights.model_files import (
    ModelFiles,
    config_with_record,
    described_config,
    read_json,
    read_record,
    required,
    writing,
)
from gptpl.weights.tables import Head, Layout, Row, Shape, Table
from gptpl.weights.transfer import export_tensors

HPARAMS_FILE = "hparams.json"
CHECKPOINT = "model.ckpt"
INSTALL = "pip install tensorflow-cpu (on a Mac: tensorflow)"


def _linear(ours: str, theirs: str) -> tuple[Row, Row]:
    return (
        Row(f"{ours}.weight", (f"{theirs}/w",), Layout.ONE_TRANSPOSED),
        Row(f"{ours}.bias", (f"{theirs}/b",)),
    )


def _norm(ours: str, theirs: str) -> tuple[Row, Row]:
    return Row(f"{ours}.weight", (f"{theirs}/g",)), Row(f"{ours}.bias", (f"{theirs}/b",))


TABLE = Table(
    format="openai-tf",
    rows=(
        Row("tok_emb.weight", ("model/wte",)),
        Row("pos_emb.weight", ("model/wpe",)),
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

_NAMES = {
    "vocab_size": "n_vocab",
    "context_length": "n_ctx",
    "emb_dim": "n_embd",
    "n_heads": "n_head",
    "n_layers": "n_layer",
}


def recognises(path: Path) -> bool:
    """Whether this is a folder with OpenAI's files."""
    return (path / HPARAMS_FILE).is_file()


def open_files(path: Path) -> ModelFiles:
    """The model of a folder. Raises InputError for one that is not whole, or without tensorflow."""
    record = read_record(path)
    fields = required(read_json(path / HPARAMS_FILE), _NAMES, path / HPARAMS_FILE)
    said = described_config(
        path / HPARAMS_FILE, fields, drop_rate=0.1, qkv_bias=True, tie_weights=True, init="gpt2"
    )
    return ModelFiles(
        path=path,
        table=TABLE,
        tensors=TensorFlowCheckpoint(path / CHECKPOINT),
        config=config_with_record(said, record, where=path / HPARAMS_FILE),
        record=record,
    )


class TensorFlowCheckpoint:
    """The variables of a checkpoint, read one at a time; TensorFlow checks each one's CRC-32C."""

    def __init__(self, prefix: Path) -> None:
        self._prefix = prefix
        for part in (".index", ".data-00000-of-00001"):
            if not prefix.with_name(prefix.name + part).is_file():
                raise InputError(
                    f"{prefix}{part} does not exist: give the folder that holds it, or fetch it anew"
                )
        tf = _tensorflow()
        try:
            self._reader = tf.train.load_checkpoint(str(prefix))
            self._shapes = {
                name: tuple(shape) for name, shape in self._reader.get_variable_to_shape_map().items()
            }
            self._dtypes = self._reader.get_variable_to_dtype_map()
            claimed = sum(math.prod(self._shapes[name]) * self._dtypes[name].size for name in self._shapes)
        except (tf.errors.OpError, ValueError, RuntimeError) as error:
            raise self._damaged(error) from error
        self._errors = tf.errors.OpError
        held = prefix.with_name(f"{prefix.name}.data-00000-of-00001").stat().st_size
        if claimed > held:
            raise self._damaged(ValueError(f"its index has {claimed:,} bytes of numbers, its data {held:,}"))

    @property
    def where(self) -> str:
        """The checkpoint's prefix."""
        return str(self._prefix)

    def shapes(self) -> Mapping[str, Shape]:
        """Of all variables."""
        return self._shapes

    def dtype(self, name: str) -> str:
        """The variable's."""
        return str(self._dtypes[name].name)

    def read(self, name: str) -> Tensor:
        """The variable. Raises InputError where its bytes are damaged."""
        try:
            array = self._reader.get_tensor(name)
            if self.dtype(name) == "bfloat16":  # which NumPy does not have: TensorFlow's own, bit for bit
                return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
            return torch.from_numpy(array)
        except (self._errors, ValueError, RuntimeError, LookupError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> InputError:
        reason = " ".join(str(error).split())[:200]
        return InputError(f"{self._prefix} is no whole TensorFlow checkpoint ({reason}): fetch it anew")


def write_files(net: GPTModel, folder: Path, *, dtype: torch.dtype | None, eot_id: int) -> None:
    """`hparams.json`, `checkpoint` and `model.ckpt.*`, which OpenAI's program restores its variables from."""
    del eot_id  # OpenAI's program knows it
    if dtype not in (None, torch.float32):
        raise InputError(f"dtype={dtype}: OpenAI's variables are float32; leave dtype out")
    tf = _tensorflow()
    tensors = export_tensors(net, TABLE, dtype=torch.float32)
    names = list(tensors)
    with writing(folder, tf.errors.OpError):
        tf.raw_ops.SaveV2(
            prefix=str(folder / CHECKPOINT),
            tensor_names=names,
            shape_and_slices=[""] * len(names),
            # TensorFlow copies: each one of ours goes as its copy comes.
            tensors=[tf.convert_to_tensor(tensors.pop(name).numpy()) for name in names],
        )
    lines = [f'model_checkpoint_path: "{CHECKPOINT}"', f'all_model_checkpoint_paths: "{CHECKPOINT}"']
    (folder / "checkpoint").write_text("\n".join(lines) + "\n", encoding="ascii")
    hparams = {theirs: getattr(net.config, ours) for ours, theirs in _NAMES.items()}
    (folder / HPARAMS_FILE).write_text(json.dumps(hparams, indent=2) + "\n", encoding="utf-8")


def _tensorflow() -> Any:
    """TensorFlow, without the lines that it writes when it is imported, and without a GPU."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    try:
        import tensorflow as tf  # type: ignore[import-untyped]
    except ImportError as error:
        raise InputError(
            f"OpenAI's checkpoints are TensorFlow's, which is not installed: {INSTALL}; or use init=gpt2_hf,"
            " the same weights without TensorFlow"
        ) from error
    tf.config.set_visible_devices([], "GPU")  # it would take all memory of the GPU
    return tf
