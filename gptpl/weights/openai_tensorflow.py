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
from gptpl.tokenizers import Tokenizer
from gptpl.weights.model_files import (
    ModelFiles,
    Table,
    TensorSource,
    damaged,
    gpt2_rows,
    read_json,
    with_record,
    write_json,
    writing,
)
from gptpl.weights.transfer import export_tensors

_HPARAMS_FILE = "hparams.json"
_CHECKPOINT = "model.ckpt"
_TABLE = Table(
    format="openai-tf",
    rows=gpt2_rows(
        (
            *("model/h{i}/ln_1", "model/h{i}/attn/c_attn", "model/h{i}/attn/c_proj"),
            *("model/h{i}/ln_2", "model/h{i}/mlp/c_fc", "model/h{i}/mlp/c_proj", "model/ln_f"),
        ),
        tokens="model/wte",
        positions="model/wpe",
        head=None,
        linear=("/w", "/b"),
        norm=("/g", "/b"),
        transposed=True,
    ),
    sizes=("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer"),
    tied_only=True,
)


def recognises(path: Path) -> bool:
    """Whether this is a folder with OpenAI's files."""
    return (path / _HPARAMS_FILE).is_file()


def open_files(path: Path) -> ModelFiles:
    """The model in a folder. Raises InputError for an incomplete one, and without tensorflow."""
    where = path / _HPARAMS_FILE
    described = _TABLE.described(read_json(where), where, drop_rate=0.1, qkv_bias=True, tie_weights=True)
    return with_record(path, _TABLE, _variables_of(path / _CHECKPOINT), described, where)


def _variables_of(prefix: Path) -> TensorSource:
    """The variables of a checkpoint, read one at a time; TensorFlow checks each one's CRC-32C.

    Weights of linear layers, `/w`, are (1, in, out) there, and (in, out) here.
    """
    data = prefix.with_name(f"{prefix.name}.data-00000-of-00001")
    for part in (prefix.with_name(f"{prefix.name}.index"), data):
        if not part.is_file():
            raise InputError(f"{part} does not exist: give the folder that holds it, or fetch it again")
    tf = _tensorflow()
    errors = (tf.errors.OpError, ValueError, RuntimeError, LookupError)

    try:
        reader = tf.train.load_checkpoint(str(prefix))
        stored, dtypes = reader.get_variable_to_shape_map(), reader.get_variable_to_dtype_map()
        claimed = sum(math.prod(shape) * dtypes[name].size for name, shape in stored.items())
    except errors as error:
        raise damaged(prefix, error) from error
    if claimed > (held := data.stat().st_size):
        raise damaged(prefix, f"its index has {claimed:,} bytes of numbers, its data {held:,}")

    def read(name: str) -> Tensor:
        try:
            array = reader.get_tensor(name).reshape(shapes[name])
        except errors as error:
            raise damaged(prefix, error) from error
        if dtypes[name].name == "bfloat16":  # which NumPy does not have: TensorFlow's own, bit for bit
            return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
        return torch.from_numpy(array)

    shapes = {
        name: tuple(shape[1:] if name.endswith("/w") and shape[:1] == [1] else shape)
        for name, shape in stored.items()
    }
    words = {name: str(dtypes[name].name) for name in shapes}
    return TensorSource(where=str(prefix), shapes=shapes, dtypes=words, read=read)


def write_files(net: GPTModel, folder: Path, *, tokenizer: Tokenizer, dtype: str) -> None:
    """Write `hparams.json`, `checkpoint` and `model.ckpt.*`, from which OpenAI's program restores."""
    tf = _tensorflow()
    tensors = export_tensors(net, _TABLE, dtype=torch.float32)
    names = list(tensors)

    def variable(name: str) -> Any:  # TensorFlow copies: each one of ours goes as its copy comes
        tensor = tensors.pop(name)
        return tf.convert_to_tensor((tensor[None] if name.endswith("/w") else tensor).numpy())

    with writing(folder, tf.errors.OpError):
        tf.raw_ops.SaveV2(
            prefix=str(folder / _CHECKPOINT),
            tensor_names=names,
            shape_and_slices=[""] * len(names),
            tensors=[variable(name) for name in names],
        )
    lines = [f'model_checkpoint_path: "{_CHECKPOINT}"', f'all_model_checkpoint_paths: "{_CHECKPOINT}"']
    (folder / "checkpoint").write_text("\n".join(lines) + "\n", encoding="ascii")
    write_json(folder / _HPARAMS_FILE, _TABLE.sizes_of(net.config))


def _tensorflow() -> Any:
    """TensorFlow, without the lines that it prints when it is imported, and without a GPU."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    try:
        import tensorflow as tf  # type: ignore[import-untyped]
    except ImportError as error:
        raise InputError(
            "OpenAI's checkpoints need TensorFlow, which is not installed: pip install tensorflow-cpu (on a"
            " Mac: tensorflow); or use init=gpt2_hf, the same weights without TensorFlow"
        ) from error
    tf.config.set_visible_devices([], "GPU")  # it would take all memory of the GPU
    return tf
