"""The formats of other programs: which one is at a path, how each is written, and whether it comes back."""

# B batch, C classes, T time, V vocabulary

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from gptpl.errors import InputError
from gptpl.model import GPTClassifier, GPTModel, empty_model, eval_mode
from gptpl.model.protocol import context_length, device_of, vocab_size
from gptpl.weights import gguf_file, hugging_face, openai_tensorflow, torch_files
from gptpl.weights.model_files import DTYPES, ModelFiles
from gptpl.weights.torch_files import BOOK_FILE, NANOGPT_FILE, open_state_dict


def cast(net: GPTModel, dtype: str) -> GPTModel:
    """A copy in another data type. Raises InputError where a weight is too large for it."""
    copy = empty_model(net.config, device=str(net.device), dtype=DTYPES[dtype])
    copy.load_state_dict(net.state_dict())
    for name, parameter in copy.named_parameters():
        if not torch.isfinite(parameter).all():
            raise InputError(f"dtype={dtype} cannot hold the weights of {name}: use bfloat16 or float32")
    return copy.eval()


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format that gptpl writes; `reader` is code for the model card that loads the exported `{folder}`.

    `write(net, folder, tokenizer=, dtype=)` writes the files into an existing folder, and raises InputError
    for a model, or a tokenizer, that the format cannot hold. `stored` gives the model as it will be read back
    if it is written in one of the `dtypes`.
    """

    write: Callable[..., None]
    reader: str
    dtypes: tuple[str, ...] = tuple(DTYPES)
    stored: Callable[[GPTModel, str], GPTModel] = cast


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
        write=torch_files.write_book,
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
        write=torch_files.write_nanogpt,
        reader='# in nanoGPT\npython sample.py --out_dir="{folder}"',
    ),
    "gguf": Format(
        write=gguf_file.write_files,
        dtypes=gguf_file.STORED_DTYPES,
        stored=gguf_file.as_stored,
        reader=(
            "from llama_cpp import Llama\n\n"
            'llama = Llama("{folder}/model.gguf")\n'
            'print(llama("Every effort moves you", max_tokens=50)["choices"][0]["text"])'
        ),
    ),
}


def is_foreign(path: Path) -> bool:
    """Whether a path is one that `open_model` can read, and gptpl's own formats are not."""
    if path.is_dir():
        return _opener(path) is not None
    return path.suffix in (".pth", ".pt", ".bin", ".safetensors", ".gguf")


def open_model(path: Path) -> ModelFiles:
    """The model in another program's folder or file.

    Raises InputError where it is in none of the formats, or damaged.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist: give a folder or file that holds a model")
    if path.is_file() and path.suffix == ".safetensors":
        raise InputError(f"{path} does not describe its model: give its folder, with config.json")
    if opened := _opener(path):
        return opened()
    if (path / "model.ckpt").is_file() or (path / "checkpoints").is_dir():
        raise InputError(f"{path} is gptpl's own: use init=run init.checkpoint={path}")
    raise InputError(
        f"{path} does not hold a model that gptpl knows: give a folder with config.json and model.safetensors"
        f" (Hugging Face), hparams.json and model.ckpt.* (OpenAI), {BOOK_FILE} (the book), {NANOGPT_FILE}"
        " (nanoGPT) or model.gguf (llama.cpp)"
    )


def _opener(path: Path) -> Callable[[], ModelFiles] | None:
    for module in (hugging_face, openai_tensorflow, gguf_file):
        if module.recognises(path):
            return partial(module.open_files, path)
    for file in (path, path / BOOK_FILE, path / NANOGPT_FILE):
        if file.is_file():
            return partial(open_state_dict, file)
    return None


# ------------------------------------------------- whether a model gives the same logits after an export

_PROMPT_TOKENS = 64
_TOLERANCE = 1e-5
"""Largest difference of two logits, relative to the largest logit: the weights must be the same bits."""


def prompt_logits(net: nn.Module) -> Tensor:
    """Logits (1, T, V) in fp32 of a fixed prompt: tokens spread over the vocabulary, T at most 64."""
    with torch.inference_mode(), eval_mode(net):
        logits: Tensor = net(_prompt(net)[None])
    return logits.float().cpu()


def prompt_class_logits(net: GPTClassifier, *, pad_id: int) -> Tensor:
    """Logits (B, C) in fp32 of fixed prompts of 1 to T tokens, padded, T at most 64."""
    tokens = _prompt(net)
    T = len(tokens)
    lengths = torch.tensor(sorted({1, max(1, T // 2), T}), device=net.device)  # (B,)
    rows = torch.where(torch.arange(T, device=net.device) < lengths[:, None], tokens, pad_id)  # (B, T)
    with torch.inference_mode(), eval_mode(net):
        return net(rows, lengths).float().cpu()


def _prompt(net: nn.Module) -> Tensor:
    T = min(_PROMPT_TOKENS, context_length(net))
    return (torch.arange(T, device=device_of(net)) * 7919 + 1) % vocab_size(net)  # 7919: a prime


def compare_logits(before: Tensor, after: Tensor, *, name: str) -> float:
    """The largest absolute difference. Raises InputError where the two models are not the same."""
    same_shape = before.shape == after.shape
    difference = (before - after).abs().max().item() if same_shape else math.inf
    allowed = _TOLERANCE * max(1.0, before.abs().max().item())
    if not difference <= allowed:
        raise InputError(
            f"format={name} came back with logits that differ by {difference:.3g} (allowed {allowed:.3g}):"
            " nothing was written; this is a mistake in gptpl"
        )
    return difference
