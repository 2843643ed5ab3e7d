"""Files of torch with a model's tensors: the book's, nanoGPT's, Hugging Face's older ones, and ours."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptpl.errors import InputError
from gptpl.files.plain import read_plain
from gptpl.model import GPTConfig
from gptpl.weights import book, hugging_face, nanogpt
from gptpl.weights.model_files import ModelFiles, read_record, recorded_config
from gptpl.weights.sources import StateDict
from gptpl.weights.tables import Head, Row, Shape, Table

OURS = Table(
    format="gptpl",
    rows=tuple(Row(row.ours, (row.ours,)) for row in book.TABLE.rows),
    head=Head.ALWAYS,
    qkv_bias=False,
)
"""`GPTModel.state_dict()` itself."""

_WRAPPERS = ("model_state_dict", "state_dict", "model")
"""Under what a state dict stands beside an optimizer's."""


def open_state_dict(path: Path) -> ModelFiles:
    """The model of a file that torch wrote.

    Raises InputError for a file that is cut short, that holds code, or that is no state dict of a GPT-2.
    """
    content = read_plain(path)
    config: GPTConfig | None = None
    if isinstance(content, dict) and isinstance(content.get("model_args"), dict):
        config = nanogpt.config_of(content["model_args"], path)
    tensors = StateDict(_without_compiled(_unwrapped(content, path)), str(path))
    record = read_record(path.parent)
    # It has no other description: where the model is another one now, its tensors will tell.
    if model := record.get("model", record.get("model_before")):
        config = recorded_config(model, path.parent)
    return ModelFiles(
        path=path, table=_table(tensors.shapes(), path), tensors=tensors, config=config, record=record
    )


def _unwrapped(content: Any, path: Path) -> Mapping[str, Any]:
    if isinstance(content, dict):
        for key in _WRAPPERS:
            if isinstance(content.get(key), dict):
                return {str(name): tensor for name, tensor in content[key].items()}
        if content:
            return {str(name): tensor for name, tensor in content.items()}
    raise InputError(
        f"{path} holds no state dict: give a file that torch.save(model.state_dict(), ...) wrote"
    )


def _without_compiled(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(nanogpt.COMPILED): tensor for name, tensor in tensors.items()}


def _table(shapes: Mapping[str, Shape], path: Path) -> Table:
    """The table whose names these are. Hugging Face's and nanoGPT's names are the same, not their layout."""
    if "trf_blocks.0.att.W_query.weight" in shapes:
        return book.TABLE
    if "blocks.0.attn.qkv.weight" in shapes:
        return OURS
    for prefix in ("transformer.", ""):
        if projection := shapes.get(f"{prefix}h.0.attn.c_attn.weight"):
            is_conv1d = len(projection) == 2 and projection[0] < projection[1]
            if prefix and not is_conv1d:
                return nanogpt.TABLE
            return hugging_face.with_prefix(hugging_face.TABLE, prefix)
    raise InputError(
        f"{path} holds tensors of no GPT-2 that gptpl knows (the first is {next(iter(shapes))!r}): give a"
        " state dict of the book's GPTModel, of nanoGPT, of Hugging Face's GPT-2, or of gptpl"
    )
