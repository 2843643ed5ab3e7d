"""Hugging Face's GPT-2, language models and classifiers: `config.json` and `model.safetensors`."""

# C classes, D model

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptpl.errors import InputError
from gptpl.files.plain import read_plain
from gptpl.model import GPTClassifier, GPTConfig, GPTModel
from gptpl.tokenizers import Tokenizer
from gptpl.weights.model_files import (
    ModelFiles,
    Table,
    TensorSource,
    check_settings,
    gpt2_rows,
    read_json,
    safetensors_of,
    state_dict_source,
    with_record,
    write_json,
    writing,
)
from gptpl.weights.transfer import export_tensors

CONFIG_FILE = "config.json"
PREFIX = "transformer."
_OLD_FILE = "pytorch_model.bin"
_SCORE = "score.weight"
"""The head of their classifiers."""
_CLASSIFIER = "GPT2ForSequenceClassification"
_ONE_CLASS = "single_label_classification"
_REMEDY = "use another model"
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True, False),
}
"""Settings of their GPT-2, and those values that gptpl's model has."""


def table(prefix: str = PREFIX, *, head: str = "lm_head.weight", transposed: bool = True) -> Table:
    """Their tensors; every name but the head's begins with a prefix.

    The linear layers are `Conv1D`, with weights (in, out), unless nanoGPT has written them.
    """
    layers = (
        *("h.{i}.ln_1", "h.{i}.attn.c_attn", "h.{i}.attn.c_proj"),
        *("h.{i}.ln_2", "h.{i}.mlp.c_fc", "h.{i}.mlp.c_proj", "ln_f"),
    )
    rows = gpt2_rows(
        [prefix + layer for layer in layers],
        tokens=f"{prefix}wte.weight",
        positions=f"{prefix}wpe.weight",
        head=head,
        transposed=transposed,
    )
    return Table(
        format="hf",
        rows=rows,
        sizes=("vocab_size", "n_positions", "n_embd", "n_head", "n_layer"),
        # In files of older versions of transformers, OpenAI's among them, and of nanoGPT without its kernel.
        masks=(f"{prefix}h.{{i}}.attn.bias",),
        ignored=(f"{prefix}h.{{i}}.attn.masked_bias",),
    )


def recognises(path: Path) -> bool:
    """Whether this is a folder with Hugging Face's files."""
    has_weights = any(path.glob("*.safetensors*")) or (path / _OLD_FILE).is_file()
    return (path / CONFIG_FILE).is_file() and has_weights


def open_files(path: Path) -> ModelFiles:
    """The language model in a folder. Raises InputError for another kind of model, or an incomplete one."""
    where = path / CONFIG_FILE
    config, tensors = _described(read_json(where), where), _tensors_of(path)
    if _SCORE in tensors.shapes:
        raise InputError(
            f"{path} holds a classifier, not a language model: use gptpl classify checkpoint={path}"
        )
    prefixed = any(name.startswith(PREFIX) for name in tensors.shapes)
    return with_record(path, table(PREFIX if prefixed else ""), tensors, config, where)


def _tensors_of(path: Path) -> TensorSource:
    """The safetensors, or `pytorch_model.bin` in a folder from before there were any."""
    if any(path.glob("*.safetensors*")):
        return safetensors_of(path)
    content = read_plain(path / _OLD_FILE)
    if not isinstance(content, dict):
        raise InputError(f"{path / _OLD_FILE} does not hold a state dict: fetch it again")
    return state_dict_source(content, str(path / _OLD_FILE))


def _described(content: Mapping[str, Any], path: Path) -> GPTConfig:
    """The model of the content of a `config.json`. Raises InputError for one that gptpl does not have."""
    check_settings(content, _FIXED, path, remedy=_REMEDY)
    config = table().described(
        content,
        path,
        drop_rate=content.get("resid_pdrop", 0.1),
        qkv_bias=True,
        tie_weights=content.get("tie_word_embeddings", True),
    )
    check_settings(content, {"n_inner": (None, 4 * config.emb_dim)}, path, remedy=_REMEDY)
    return config


def write_files(net: GPTModel, folder: Path, *, tokenizer: Tokenizer, dtype: str) -> None:
    """Write `config.json`, `generation_config.json` and `model.safetensors`."""
    tensors = export_tensors(net, table())
    write_tensors(tensors, folder / "model.safetensors")
    write_json(folder / CONFIG_FILE, _their_config(net.config, tensors, tokenizer.eot_id, "GPT2LMHeadModel"))
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eot_id)
    write_json(folder / "generation_config.json", ids)


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with writing(path.parent, SafetensorError):
        save_file(tensors, path, metadata={"format": "pt"})


def _their_config(
    config: GPTConfig, tensors: Mapping[str, Tensor], eot_id: int, architecture: str
) -> dict[str, Any]:
    """The content of `config.json`."""
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    return {
        "architectures": [architecture],
        **{name: allowed[0] for name, allowed in _FIXED.items()},
        **table().sizes_of(config),
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.drop_rate),
        "n_inner": None,
        "tie_word_embeddings": config.tie_weights,
        **dict.fromkeys(("bos_token_id", "eos_token_id"), eot_id),
        "dtype": dtype,
        "torch_dtype": dtype,  # as transformers called it before version 5
    }


# ------------------------------------------------------------------------------------------------ classifiers


def is_classifier(path: Path) -> bool:
    """Whether this is a folder with a classifier of theirs."""
    if not (path.is_dir() and recognises(path)):
        return False
    architectures = read_json(path / CONFIG_FILE).get("architectures")
    return isinstance(architectures, list) and _CLASSIFIER in architectures


def open_classifier(path: Path) -> tuple[ModelFiles, tuple[str, ...]]:
    """The files of a classifier, and the names of its classes in order.

    Raises InputError for one that gptpl does not have, or an incomplete one.
    """
    where = path / CONFIG_FILE
    content = read_json(where)
    check_settings(content, {"problem_type": (None, _ONE_CLASS)}, where, remedy=_REMEDY)
    names = content.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})  # what transformers assumes
    wanted = [str(number) for number in range(len(names))] if isinstance(names, dict) else []
    if len(wanted) < 2 or sorted(names, key=str) != sorted(wanted):
        raise InputError(f"{where}: id2label must name two or more classes, from 0 on, got {names!r}")
    files = with_record(path, table(head=_SCORE), _tensors_of(path), _described(content, where), where)
    return files, tuple(str(names[number]) for number in wanted)


def write_classifier(net: GPTClassifier, folder: Path, *, labels: Sequence[str], pad_id: int) -> None:
    """Write `config.json` and `model.safetensors`, which give the same logits.

    transformers reads the logits at the last token that is not `pad_id`: a text that ends with that very
    token is read one token earlier.

    Raises InputError for a classifier that reads the last position, padding or not, and for a bias of the
    head that the final LayerNorm cannot take over.
    """
    if net.classifier.pooling != "last_token":
        raise InputError(
            "format=hf reads a classifier's logits at the last real token, and this one was trained with"
            f" task.pooling={net.classifier.pooling}: train it with task.pooling=last_token"
        )
    bias = net.out_head.bias
    plain = GPTClassifier.on(net, replace(net.classifier, head_bias=False))  # the same layers, not copied
    plain.out_head.weight = net.out_head.weight
    tensors = export_tensors(plain, table(head=_SCORE))
    if bias is not None:
        if (shift := bias_as_shift(plain.out_head.weight, bias)) is None:
            raise InputError(
                "format=hf has no bias in a classifier's head, and the final LayerNorm cannot replace that of"
                f" these {len(bias)} classes: train it with task.head_bias=false"
            )
        norm = tensors[f"{PREFIX}ln_f.bias"]
        tensors[f"{PREFIX}ln_f.bias"] = (norm.double() + shift).to(norm.dtype)
    write_tensors(tensors, folder / "model.safetensors")
    more = {
        "id2label": {str(number): label for number, label in enumerate(labels)},
        "label2id": {label: number for number, label in enumerate(labels)},
        "num_labels": len(labels),
        "pad_token_id": pad_id,
        "problem_type": _ONE_CLASS,
    }
    write_json(folder / CONFIG_FILE, _their_config(net.config, tensors, pad_id, _CLASSIFIER) | more)


def bias_as_shift(weight: Tensor, bias: Tensor) -> Tensor | None:
    """The smallest shift d (D,) float64 of the hidden states with W d = b, for W (C, D) and b (C,).

    Added to the final LayerNorm's bias, which only the head reads, it replaces the head's bias, which
    transformers' classifiers lack. None if no shift does: W has dependent rows, or C > D.
    """
    W, b = weight.detach().cpu().double(), bias.detach().cpu().double()
    shift = torch.linalg.pinv(W) @ b
    left = (W @ shift - b).abs().max()
    return shift if left <= 1e-6 * b.abs().max().clamp(min=1.0) else None  # rounding in fp32
