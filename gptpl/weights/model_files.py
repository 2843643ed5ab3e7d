"""A model in another program's files: what it says of itself, and its tensors, not read yet."""

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptpl.errors import InputError
from gptpl.files.durable import sha256_of
from gptpl.files.plain import check_sharing
from gptpl.model import GPTConfig
from gptpl.weights.tables import Table

log = logging.getLogger(__name__)

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""What weights may be stored in."""
RECORD_FILE = "gptpl.json"
"""Stands beside exported weights, with what their format has no words for."""
RECORD_VERSION = 1
_SIZES = ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers")


# ------------------------------------------------------------------------------------------------ tensors


@dataclass(frozen=True, kw_only=True)
class TensorSource:
    """Tensors by name; nothing but what is read takes memory. `where` is the file or folder, for messages."""

    where: str
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    """In torch's words, such as "float32"."""
    read: Callable[[str], Tensor]
    """Gives a tensor on the CPU; it may lie over the file, and is not to be written to."""


def state_dict_source(tensors: Mapping[str, Any], where: str) -> TensorSource:
    """Tensors that torch has read."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise InputError(f"{where} holds {name!r}, which is no tensor: give a state dict of a model")
    check_sharing(tensors.values(), where)
    return TensorSource(
        where=where,
        shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
        dtypes={name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()},
        read=tensors.__getitem__,
    )


def safetensors_of(folder: Path, stem: str = "model") -> TensorSource:
    """`model.safetensors` of a folder, or the shards that `model.safetensors.index.json` lists, mapped.

    Raises InputError for a file that is missing, cut short, or whose header does not fit it, for a name that
    two shards have, and for an index that lists something else.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file() or not index.is_file():
        return _mapped([single], str(single))
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(shards.values()))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{index} lists no shards ({error}): fetch it anew") from error
    if not names or not all(isinstance(name, str) for name in names):
        raise InputError(f"{index} lists no shards: fetch it anew")
    if any(Path(name).name != name for name in names):
        raise InputError(f"{index} lists files outside its folder: use another copy")
    paths = [folder / name for name in names]
    source = _mapped(paths, str(paths[0] if len(paths) == 1 else folder))
    if missing := sorted(shards.keys() - source.shapes.keys()):
        raise InputError(f"{index} lists {missing[0]!r}, which no shard holds: fetch the shards anew")
    return source


def _mapped(paths: list[Path], where: str) -> TensorSource:
    from safetensors import SafetensorError, safe_open

    words = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    files: dict[str, Any] = {}
    shapes, dtypes = {}, {}
    for path in paths:
        try:
            file: Any = safe_open(path, framework="pt")
            names = file.keys()
        except (SafetensorError, OSError, ValueError) as error:
            if not path.is_file():
                raise InputError(f"{path} does not exist: give the folder that holds it") from error
            raise InputError(
                f"{path} is no whole safetensors file ({' '.join(str(error).split())}; it has"
                f" {path.stat().st_size:,} bytes): fetch it anew"
            ) from error
        for name in names:
            if name in files:
                raise InputError(f"{path} holds {name!r}, and so does another of its shards: fetch them anew")
            files[name], part = file, file.get_slice(name)
            shapes[name] = tuple(part.get_shape())
            dtypes[name] = words.get(str(part.get_dtype()), str(part.get_dtype()))
    return TensorSource(
        where=where, shapes=shapes, dtypes=dtypes, read=lambda name: files[name].get_tensor(name)
    )


# ---------------------------------------------------------------------------------- what files say of a model


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """What was found in a folder or file; the table has the names that the tensors have there."""

    path: Path
    table: Table
    tensors: TensorSource
    config: GPTConfig | None
    """What the files say of the model; None: nothing but the shapes of its tensors."""
    record: Mapping[str, Any]
    """What gptpl wrote beside an export: `model`, `tokenizer`, `lineage`; empty elsewhere.

    Where another program changed the weights since, `tokenizer` and `model_before`.
    """


def with_record(path: Path, table: Table, tensors: TensorSource, said: GPTConfig, where: Path) -> ModelFiles:
    """A folder whose file `where` describes its model, with what `gptpl.json` adds.

    Raises InputError where the two contradict one another.
    """
    record, config = read_record(path), said
    if "model" in record:
        config = recorded_config(record["model"], path)
        for name in (*_SIZES, "tie_weights"):
            if getattr(config, name) != getattr(said, name):
                raise InputError(
                    f"{where} says {name}={getattr(said, name)}, {RECORD_FILE} beside it"
                    f" {getattr(config, name)}: restore the one that was changed"
                )
    return ModelFiles(path=path, table=table, tensors=tensors, config=config, record=record)


def described_config(
    content: Mapping[str, Any], sizes: tuple[str, ...], path: Path, *, drop_rate: object, **fixed: Any
) -> GPTConfig:
    """The model that a format's file describes, by its names of the sizes that `sizes_of` writes.

    Raises InputError, naming the file, if it cannot be.
    """
    fields = dict(zip(_SIZES, required(content, sizes, path), strict=True))
    if isinstance(drop_rate, bool) or not isinstance(drop_rate, int | float):
        raise InputError(f"{path} gives {drop_rate!r} as dropout rate: give a number of 0 or more, below 1")
    try:
        return GPTConfig(**fields, drop_rate=float(drop_rate), init="gpt2", **fixed)
    except InputError as error:
        raise InputError(f"{path} describes a model that cannot be: {error}") from error


def sizes_of(config: GPTConfig, sizes: tuple[str, ...]) -> dict[str, int]:
    """Vocabulary, context, width, heads and blocks by a format's names of them."""
    return {theirs: getattr(config, ours) for ours, theirs in zip(_SIZES, sizes, strict=True)}


def required(content: Mapping[str, Any], names: tuple[str, ...], path: Path) -> list[Any]:
    """The values of these names, each there; InputError names those that are not."""
    if missing := [name for name in names if name not in content]:
        raise InputError(f"{path} lacks {', '.join(missing)}: fetch it anew")
    return [content[name] for name in names]


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


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON file that people can read."""
    with writing(path.parent):
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


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


# --------------------------------------------------------------------------------------------- gptpl's record


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
            "%s: the weights beside it were damaged or edited since, so what it says of their past is not"
            " used",
            path,
        )
        return {"tokenizer": record["tokenizer"], "model_before": record["model"]}
    return record


def recorded_config(model: Mapping[str, Any], folder: Path) -> GPTConfig:
    """The model that `gptpl.json` describes."""
    try:
        return GPTConfig(**model)
    except TypeError as error:
        raise InputError(
            f"{folder / RECORD_FILE} describes its model otherwise than this gptpl ({error}): restore it"
        ) from error


def weights_sha256(path: Path) -> dict[str, str]:
    """The SHA-256 of a file, or of every file of a folder that holds weights, by name."""
    kinds = ("*.safetensors", "*.ckpt.data-*", "*.pth", "*.pt", "*.bin")
    paths = [path] if path.is_file() else [found for kind in kinds for found in path.glob(kind)]
    return {found.name: sha256_of(found) for found in sorted(paths)}
