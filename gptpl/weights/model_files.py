"""A model in another program's files: what it says of itself, and its tensors, not read yet."""

import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptpl.errors import InputError
from gptpl.files.hashes import sha256_of
from gptpl.model import GPTConfig
from gptpl.weights.sources import TensorSource
from gptpl.weights.tables import Table

log = logging.getLogger(__name__)

RECORD_FILE = "gptpl.json"
"""Stands beside exported weights, with what their format has no words for."""
RECORD_VERSION = 1
_SAID_BY_BOTH = ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers", "tie_weights")


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """What was found at a path.

    Attributes:
        path: the folder or file.
        table: the format's table, under the names that the tensors have here.
        tensors: the tensors.
        config: what the files say of the model; None: nothing but the shapes of its tensors.
        record: what gptpl wrote beside an export: `model`, `tokenizer`, `lineage`; empty elsewhere. Where
            another program changed the weights since, `tokenizer` and `model_before`.
    """

    path: Path
    table: Table
    tensors: TensorSource
    config: GPTConfig | None
    record: Mapping[str, Any] = field(default_factory=dict)


def record_of(
    folder: Path, config: GPTConfig, tokenizer: Mapping[str, Any], lineage: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of `gptpl.json` for the weights in a folder."""
    return {
        "format_version": RECORD_VERSION,
        "weights_sha256": weights_sha256(folder),
        "model": dataclasses.asdict(config),
        "tokenizer": dict(tokenizer),
        "lineage": dict(lineage),
    }


@contextmanager
def writing(folder: Path, *kinds: type[Exception]) -> Iterator[None]:
    """Turns what a library raises when it cannot write into one line; `kinds` are its own exceptions."""
    expected: tuple[type[Exception], ...] = (OSError, *kinds)
    try:
        yield
    except expected as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(
            f"{folder.parent} does not take the files ({reason}): make room there, or give another output"
        ) from error


def read_record(folder: Path) -> dict[str, Any]:
    """What `gptpl.json` of a folder holds; nothing where there is none."""
    path = folder / RECORD_FILE
    if not path.is_file():
        return {}
    record = read_json(path)
    if record.get("format_version") != RECORD_VERSION:
        raise InputError(
            f"{path} has format version {record.get('format_version')}, this gptpl reads {RECORD_VERSION}:"
            " use the gptpl that wrote it, or remove the file"
        )
    for part in ("model", "tokenizer", "lineage", "weights_sha256"):
        if not isinstance(record.get(part), dict):
            raise InputError(f"{path} holds no {part}: restore the file, or remove it")
    lineage = record["lineage"]
    if not isinstance(lineage.get("step"), int) or not isinstance(lineage.get("start"), dict):
        raise InputError(f"{path} holds a lineage without step or start: restore the file, or remove it")
    if record["weights_sha256"] != weights_sha256(folder):
        log.warning(
            "%s: the weights beside it were changed since, so what it says of their past is not used", path
        )
        return {"tokenizer": record["tokenizer"], "model_before": record["model"]}
    return record


def weights_sha256(path: Path) -> dict[str, str]:
    """The SHA-256 of a file, or of every file of a folder that holds weights, by name."""
    kinds = ("*.safetensors", "*.ckpt.data-*", "*.pth", "*.pt", "*.bin")
    paths = [path] if path.is_file() else [found for kind in kinds for found in path.glob(kind)]
    return {found.name: sha256_of(found) for found in sorted(paths)}


def config_with_record(said: GPTConfig, record: Mapping[str, Any], *, where: Path) -> GPTConfig:
    """The configuration that the format gives, with what `gptpl.json` adds: it may not contradict it."""
    if "model" not in record:
        return said
    recorded = recorded_config(record["model"], where.parent)
    for name in _SAID_BY_BOTH:
        if getattr(recorded, name) != getattr(said, name):
            raise InputError(
                f"{where} says {name}={getattr(said, name)}, {RECORD_FILE} beside it"
                f" {getattr(recorded, name)}: restore the one that was changed"
            )
    return recorded


def recorded_config(model: Mapping[str, Any], folder: Path) -> GPTConfig:
    """The model that `gptpl.json` describes."""
    try:
        return GPTConfig(**model)
    except TypeError as error:
        raise InputError(
            f"{folder / RECORD_FILE} describes its model otherwise than this gptpl ({error}): restore it"
        ) from error


def described_config(path: Path, fields: Mapping[str, Any], *, drop_rate: object, **fixed: Any) -> GPTConfig:
    """The model that a format's file describes. Raises InputError, naming the file, if it cannot be."""
    if isinstance(drop_rate, bool) or not isinstance(drop_rate, int | float):
        raise InputError(f"{path} gives {drop_rate!r} as dropout rate: give a number of 0 or more, below 1")
    try:
        return GPTConfig(**fields, drop_rate=float(drop_rate), **fixed)
    except InputError as error:
        raise InputError(f"{path} describes a model that cannot be: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises InputError where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): give the folder of a model") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested without end
        raise InputError(f"{path} is no JSON ({error}): fetch it anew") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no object: fetch it anew")
    return content


def required(content: Mapping[str, Any], names: Mapping[str, str], path: Path) -> dict[str, Any]:
    """The values of a format's `names` (ours: theirs), each there; InputError names the one that is not."""
    if missing := [theirs for theirs in names.values() if theirs not in content]:
        raise InputError(f"{path} lacks {', '.join(missing)}: fetch it anew")
    return {ours: content[theirs] for ours, theirs in names.items()}
