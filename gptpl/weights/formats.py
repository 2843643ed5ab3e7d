"""The formats of other programs: which one is at a path, and how each is written."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from gptpl.errors import InputError
from gptpl.model import GPTModel
from gptpl.weights import book, hugging_face, nanogpt, openai_tensorflow
from gptpl.weights.model_files import ModelFiles
from gptpl.weights.sources import DTYPES
from gptpl.weights.state_dicts import open_state_dict


class Writer(Protocol):
    """Writes a model's files into a folder that is there."""

    def __call__(self, net: GPTModel, folder: Path, *, dtype: torch.dtype | None, eot_id: int) -> None:
        """`dtype` None: the model's own. Raises InputError for a model that the format cannot hold."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format that gptpl writes: what is in it, and how its program loads it."""

    write: Writer
    reader: str
    """Code that loads an exported folder `{folder}`, for the model card."""
    dtypes: tuple[str, ...] = tuple(DTYPES)
    """What it can store weights in."""


FORMATS: Mapping[str, Format] = {
    "hf": Format(
        write=hugging_face.write_files,
        reader=(
            "from transformers import AutoTokenizer, GPT2LMHeadModel\n\n"
            'model = GPT2LMHeadModel.from_pretrained("{folder}")\n'
            'tokenizer = AutoTokenizer.from_pretrained("{folder}")'
        ),
    ),
    "book": Format(
        write=book.write_files,
        reader=(
            "import torch\n\n"
            "# GPTModel of chapter 4, built with the configuration in gptpl.json\n"
            'model.load_state_dict(torch.load("{folder}/model.pth", weights_only=True))'
        ),
    ),
    "openai-tf": Format(
        write=openai_tensorflow.write_files,
        dtypes=("float32",),
        reader=(
            "import tensorflow as tf\n\n"
            'reader = tf.train.load_checkpoint("{folder}")  # or OpenAI\'s src/model.py with hparams.json\n'
            'wte = reader.get_tensor("model/wte")'
        ),
    ),
    "nanogpt": Format(
        write=nanogpt.write_files,
        reader='# in nanoGPT\npython sample.py --out_dir="{folder}"',
    ),
}


def open_model(path: Path) -> ModelFiles:
    """The model in another program's folder or file, whichever of the formats it is.

    Raises InputError where it is none of them, or not whole.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist: give a folder or file that holds a model")
    if path.is_file():
        if path.suffix == ".safetensors":
            raise InputError(f"{path} says nothing of its model: give its folder, with config.json")
        return open_state_dict(path)
    for module in (hugging_face, openai_tensorflow):
        if module.recognises(path):
            return module.open_files(path)
    for name in (book.FILE, nanogpt.FILE):
        if (path / name).is_file():
            return open_state_dict(path / name)
    if (path / "model.ckpt").is_file() or (path / "checkpoints").is_dir():
        raise InputError(f"{path} is gptpl's own: use init=run init.checkpoint={path}")
    raise InputError(
        f"{path} holds no model that gptpl knows: give a folder with config.json and model.safetensors"
        f" (Hugging Face), hparams.json and model.ckpt.* (OpenAI), {book.FILE} (the book) or {nanogpt.FILE}"
        " (nanoGPT)"
    )


def is_foreign(path: Path) -> bool:
    """Whether a path that commands are given is one that only `open_model` can read."""
    if path.is_dir():
        has_theirs = hugging_face.recognises(path) or openai_tensorflow.recognises(path)
        return has_theirs or any((path / name).is_file() for name in (book.FILE, nanogpt.FILE))
    return path.suffix in (".pth", ".pt", ".bin", ".safetensors")
