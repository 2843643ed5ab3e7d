"""llama.cpp's GGUF: `model.gguf` holds weights, sizes and tokenizer; no other module imports gguf."""

# D model, V vocabulary

import dataclasses
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptpl.errors import InputError
from gptpl.model import GPTConfig, GPTModel, empty_model
from gptpl.model.gpt import NORM_EPS
from gptpl.tokenizers import BytesTokenizer, FileTokenizer, GPT2Tokenizer, Tokenizer
from gptpl.tokenizers.base import END_OF_TEXT
from gptpl.tokenizers.gpt2 import byte_characters, token_ids, vocabulary_files
from gptpl.weights.model_files import (
    POSITIONS,
    ModelFiles,
    Table,
    TensorSource,
    check_settings,
    damaged,
    gpt2_rows,
    with_record,
    writing,
)
from gptpl.weights.transfer import check_is_gpt2, export_tensors

_FILE = "model.gguf"
_NAME = "gpt2"
"""What llama.cpp calls the architecture and the tokenizer; it calls the tokenizer's pattern `gpt-2`."""
_Q8 = "q8_0"
_BLOCK = 32
"""Numbers in a row that share one float16 scale in q8_0."""
_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", _Q8: "Q8_0"}
_FILE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 32, _Q8: 7}
"""llama.cpp's numbers, by which it names a file's type."""
STORED_DTYPES = tuple(_TYPES)
_SIZES = ("vocab_size", "context_length", "embedding_length", "attention.head_count", "block_count")
_NORMAL, _CONTROL, _UNUSED = 1, 3, 5
_TABLE = Table(
    format="gguf",
    rows=gpt2_rows(
        (
            *("blk.{i}.attn_norm", "blk.{i}.attn_qkv", "blk.{i}.attn_output"),
            *("blk.{i}.ffn_norm", "blk.{i}.ffn_up", "blk.{i}.ffn_down", "output_norm"),
        ),
        tokens="token_embd.weight",
        positions="position_embd.weight",
        head="output.weight",
    ),
    sizes=tuple(f"{_NAME}.{name}" for name in _SIZES),
)


# --------------------------------------------------------------------------------------------------- writing


def write_files(net: GPTModel, folder: Path, *, tokenizer: Tokenizer, dtype: str) -> None:
    """Write `model.gguf`: matrices in that type, the position table, norms and biases in float32.

    Raises InputError for a tokenizer that cuts words in another way than GPT-2's, and without the package
    gguf.
    """
    gguf = _gguf()
    tensors = export_tensors(net, _TABLE, dtype=torch.float32)
    config = net.config
    tokens, kinds, merges = _vocabulary(tokenizer, config.vocab_size)
    writer = gguf.GGUFWriter(folder / _FILE, _NAME)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.emb_dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.ff_width)
    writer.add_head_count(config.n_heads)
    writer.add_layer_norm_eps(NORM_EPS)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(_FILE_TYPES[dtype])
    if dtype == _Q8:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_tokenizer_model(_NAME)
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokenizer.eot_id)
    writer.add_eos_token_id(tokenizer.eot_id)
    writer.add_add_bos_token(False)
    for name, tensor in tensors.items():
        kind = _kind(gguf, name, tensor, dtype)
        writer.add_tensor(name, gguf.quantize(tensor.numpy(), kind), raw_dtype=kind)
    with writing(folder):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def as_stored(net: GPTModel, dtype: str) -> GPTModel:
    """A copy in fp32 of what a file will hold.

    Raises InputError for a width that q8_0 does not divide, and for weights too large for float16.
    """
    check_is_gpt2(net.config, "format=gguf")
    if dtype == _Q8 and net.config.emb_dim % _BLOCK:
        raise InputError(
            f"dtype={_Q8} rounds {_BLOCK} weights together, and model.emb_dim={net.config.emb_dim} is no"
            " multiple of that: use dtype=float16"
        )
    gguf = _gguf()
    copy = empty_model(net.config, device=str(net.device), dtype=torch.float32)
    copy.load_state_dict(net.state_dict())
    with torch.no_grad(), np.errstate(over="ignore", invalid="ignore"):
        for name, parameter in copy.named_parameters():
            kind = _kind(gguf, name, parameter, dtype)
            stored = gguf.quantize(parameter.detach().cpu().numpy(), kind)
            parameter.copy_(torch.from_numpy(gguf.dequantize(stored, kind)))
            if not torch.isfinite(parameter).all():
                raise InputError(f"dtype={dtype} cannot hold the weights of {name}: use bfloat16 or float32")
    return copy.eval()


def _kind(gguf: Any, name: str, tensor: Tensor, dtype: str) -> Any:
    """The type of a tensor, under our name or llama.cpp's: matrices but the position table are rounded."""
    is_rounded = tensor.dim() == 2 and name not in (POSITIONS, "position_embd.weight")
    return gguf.GGMLQuantizationType[_TYPES[dtype if is_rounded else "float32"]]


def _vocabulary(tokenizer: Tokenizer, V: int) -> tuple[list[str], list[int], list[str]]:
    """The V tokens, in order, their kinds, and the merges; what the tokenizer does not have is unused."""
    end_of_text, merges = END_OF_TEXT, list[str]()
    added: Collection[str] = (END_OF_TEXT,)
    if isinstance(tokenizer, GPT2Tokenizer):
        tokens = list(token_ids())
        merges = vocabulary_files()["vocab.bpe"].decode().splitlines()[1:]  # below the version
    elif isinstance(tokenizer, BytesTokenizer):
        tokens = [*byte_characters(), END_OF_TEXT]
    elif isinstance(tokenizer, FileTokenizer) and tokenizer.cuts_as_gpt2:
        tokens, merges = tokenizer.tokens, tokenizer.merges
        end_of_text, added = tokenizer.end_of_text, tokenizer.added_tokens
    else:
        raise InputError(
            f"format=gguf holds tokenizers that cut words as GPT-2's, not tokenizer={tokenizer.name}:"
            " use format=hf"
        )
    padded = [*tokens, *[""] * (V - len(tokens))]
    kinds = [_CONTROL if token in added else _NORMAL if token else _UNUSED for token in padded]
    named = [token or f"[PAD{number}]" for number, token in enumerate(padded)]
    # llama.cpp wants a merge: this one applies to no text.
    return named, kinds, merges or [f"{end_of_text} {end_of_text}"]


# --------------------------------------------------------------------------------------------------- reading


def recognises(path: Path) -> bool:
    """Whether this is a GGUF file, or a folder with the one that gptpl writes."""
    return (path / _FILE).is_file() or (path.suffix == ".gguf" and path.is_file())


def open_files(path: Path) -> ModelFiles:
    """The GPT-2 in a file or folder. Raises InputError for another model, and for a damaged file."""
    where = path / _FILE if path.is_dir() else path
    gguf = _gguf()
    try:
        reader = gguf.GGUFReader(where)
        content = {name: field.contents() for name, field in reader.fields.items() if ".tokens" not in name}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        shapes = {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in tensors.items()}
    except (OSError, ValueError, LookupError, TypeError, OverflowError) as error:
        raise damaged(where, error) from error
    words = {gguf.GGMLQuantizationType[kind]: "float32" for kind in _TYPES.values()}

    def read(name: str) -> Tensor:
        return torch.tensor(gguf.dequantize(tensors[name].data, tensors[name].tensor_type))

    source = TensorSource(
        where=str(where),
        shapes=shapes,
        dtypes={name: words.get(each.tensor_type, each.tensor_type.name) for name, each in tensors.items()},
        read=read,
    )
    described = _described(content, source, where)
    files = with_record(where.parent, _TABLE, source, described, where)
    if not files.record and not _has_gpt2s_tokens(reader):
        raise InputError(f"{where} has another tokenizer than GPT-2's: gptpl cannot use its model")
    return dataclasses.replace(files, path=path)


def _described(content: Mapping[str, Any], tensors: TensorSource, where: Path) -> GPTConfig:
    epsilon = torch.tensor(NORM_EPS).item()  # rounded to float32, as there
    fixed = {"general.architecture": (_NAME,), f"{_NAME}.attention.layer_norm_epsilon": (epsilon,)}
    check_settings(content, fixed, where, remedy="use another model")
    tokens = tensors.shapes.get("token_embd.weight", ())
    facts = {f"{_NAME}.vocab_size": tokens[0] if tokens else 0} | dict(content)
    tied = "output.weight" not in tensors.shapes
    return _TABLE.described(facts, where, drop_rate=0.1, qkv_bias=True, tie_weights=tied)


def _has_gpt2s_tokens(reader: Any) -> bool:
    """Whether the tokens are GPT-2's, and those after them, which fill the rows up, unused ones."""
    fields = (reader.get_field(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    tokens, kinds = ([] if field is None else field.contents() for field in fields)
    known = list(token_ids())
    more = len(tokens) - len(known)
    return tokens[: len(known)] == known and kinds[len(known) :] == [_UNUSED] * more


def _gguf() -> Any:
    """The package, without the lines that it logs."""
    try:
        import gguf
    except ImportError as error:
        raise InputError("GGUF files need a package that is not installed: pip install gguf") from error
    logging.getLogger("gguf").setLevel(logging.WARNING)
    return gguf
