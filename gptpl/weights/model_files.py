"""A model in another program's files: what they say of it, its tensors, and which of ours they are."""

import dataclasses
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptpl.errors import InputError
from gptpl.files.download import remembered_sha256
from gptpl.files.plain import check_sharing
from gptpl.model import GPTConfig
from gptpl.text import shortened

log = logging.getLogger(__name__)

# --- which tensors of a format are which of ours: a row per tensor, a table per format ------------------

HEAD = "out_head.weight"
TOKENS = "tok_emb.weight"
POSITIONS = "pos_emb.weight"
QKV_BIAS = "attn.qkv.bias"
OWN = "gptpl"
"""The name of gptpl's own format, which holds every model."""
LAYERS = (
    *("blocks.{i}.norm1", "blocks.{i}.attn.qkv", "blocks.{i}.attn.out_proj"),
    *("blocks.{i}.norm2", "blocks.{i}.ff.up_proj", "blocks.{i}.ff.down_proj", "final_norm"),
)
"""The layers of GPT-2 that have a weight and a bias; `{i}` is the number of the block."""
_WEIGHT_AND_BIAS = (".weight", ".bias")
_SIZES = ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers")


@dataclass(frozen=True)
class Row:
    """One of our tensors, and those of a format that it consists of, one below the other.

    The names may have `{i}`. `transposed`: theirs are (in, out), ours (out, in).
    """

    ours: str
    theirs: tuple[str, ...]
    transposed: bool = False

    def turned(self, tensor: Tensor) -> Tensor:
        """A view of their tensor in our layout, or of ours in theirs."""
        return tensor.T if self.transposed else tensor


@dataclass(frozen=True, kw_only=True)
class Table:
    """The tensors of a format.

    Attributes:
        format: its name.
        rows: every tensor, in our order.
        sizes: its names of vocabulary, context, width, heads and blocks, where it describes its models.
        tied_only: whether it holds only models whose head is tied to the token embedding.
        writes_head: whether a tied head is written, too, as a copy of the token embedding.
        qkv_bias: whether query, key and value always have a bias: zeros for a model of ours without.
        bias_free: whether models there may have no bias at all: zeros here.
        masks: names of each block's causal masks, with ones in the lower triangle, or where attention is not
            allowed (`mask_is_upper`); they are checked, never loaded, and written where `writes_masks`.
        ignored: names of each block's constants that the weights do not depend on.
    """

    format: str
    rows: tuple[Row, ...]
    sizes: tuple[str, ...] = ()
    tied_only: bool = False
    writes_head: bool = False
    qkv_bias: bool = True
    bias_free: bool = False
    masks: tuple[str, ...] = ()
    mask_is_upper: bool = False
    writes_masks: bool = False
    ignored: tuple[str, ...] = ()

    def expanded(self, n_layers: int) -> Iterator[Row]:
        """The rows of a model of `n_layers` blocks."""
        for row in self.rows:
            for i in range(n_layers if "{i}" in row.ours else 1):
                theirs = tuple(name.format(i=i) for name in row.theirs)
                yield Row(row.ours.format(i=i), theirs, row.transposed)

    def sizes_of(self, config: GPTConfig) -> dict[str, int]:
        """The sizes of a model by the format's names."""
        return {theirs: getattr(config, ours) for ours, theirs in zip(_SIZES, self.sizes, strict=True)}

    def described(
        self, content: Mapping[str, Any], path: Path, *, drop_rate: object, **fixed: Any
    ) -> GPTConfig:
        """The model that a format's file describes. Raises InputError, naming it, if there can be none."""
        fields = dict(zip(_SIZES, required(content, self.sizes, path), strict=True))
        if isinstance(drop_rate, bool) or not isinstance(drop_rate, int | float):
            raise InputError(f"{path}: the dropout rate must be a number from 0 to 1, got {drop_rate!r}")
        try:
            return GPTConfig(**fields, drop_rate=float(drop_rate), init="gpt2", **fixed)
        except InputError as error:
            raise InputError(f"{path} describes an impossible model: {error}") from error


def of_blocks(names: Iterable[str], n_layers: int) -> list[str]:
    """Names with `{i}`, for every block."""
    return [name.format(i=i) for name in names for i in range(n_layers)]


def gpt2_rows(
    layers: Sequence[str | tuple[str, ...]],
    *,
    tokens: str = TOKENS,
    positions: str = POSITIONS,
    head: str | None = HEAD,
    linear: tuple[str, str] = _WEIGHT_AND_BIAS,
    norm: tuple[str, str] = _WEIGHT_AND_BIAS,
    transposed: bool = False,
) -> tuple[Row, ...]:
    """The rows of a format that names `LAYERS` so, with these ends for weights and biases."""
    rows = [Row(TOKENS, (tokens,)), Row(POSITIONS, (positions,))]
    for ours, theirs in zip(LAYERS, layers, strict=True):
        is_norm, names = "norm" in ours, (theirs,) if isinstance(theirs, str) else theirs
        weight, bias = norm if is_norm else linear
        rows += [
            Row(f"{ours}.weight", tuple(name + weight for name in names), transposed and not is_norm),
            Row(f"{ours}.bias", tuple(name + bias for name in names)),
        ]
    return (*rows, Row(HEAD, (head,))) if head else tuple(rows)


# --- what is in the files -------------------------------------------------------------------------------

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""What weights may be stored in."""
RECORD_FILE = "gptpl.json"
"""A file next to exported weights with what their format has no place for."""
RECORD_VERSION = 1

# ------------------------------------------------------------------------------------------------ tensors


@dataclass(frozen=True, kw_only=True)
class TensorSource:
    """Tensors by name, of which only what is read takes memory.

    Attributes:
        where: the file or folder, for messages.
        shapes: of the tensors.
        dtypes: in torch's words, such as "float32".
        read: gives a tensor on the CPU, which may be mapped from the file: do not write to it.
    """

    where: str
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    read: Callable[[str], Tensor]


def state_dict_source(tensors: Mapping[str, Any], where: str) -> TensorSource:
    """The tensors of a state dict."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise InputError(f"{where} holds {name!r}, which is not a tensor: give a model's state dict")
    check_sharing(tensors.values(), where)
    return TensorSource(
        where=where,
        shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
        dtypes={name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()},
        read=tensors.__getitem__,
    )


def damaged(path: Path, reason: object) -> InputError:
    """The error of a file that its library cannot read."""
    return InputError(f"{path} is damaged or cut short ({shortened(str(reason), 200)}): fetch it again")


def safetensors_of(folder: Path, stem: str = "model") -> TensorSource:
    """`model.safetensors` of a folder, or the shards that `model.safetensors.index.json` lists, mapped.

    Raises InputError for files that are missing or damaged, and for an index that does not fit its shards.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    is_split = index.is_file() and not single.is_file()
    paths, shards = [single], {}
    if is_split:
        try:
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            paths = [folder / name for name in sorted(set(shards.values()))]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{index} does not list shards ({error}): fetch it again") from error
        if not paths or any(path.parent != folder for path in paths):
            raise InputError(f"{index} must list files in its own folder: use another copy")
    tensors: dict[str, Tensor] = {}
    for path in paths:
        try:
            part = load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            if not path.is_file():
                raise InputError(f"{path} does not exist: give the folder that holds it") from error
            raise damaged(path, f"{path.stat().st_size:,} bytes: {error}") from error
        if twice := sorted(part.keys() & tensors.keys()):
            raise InputError(f"{path} and another shard hold {twice[0]!r}: fetch the shards again")
        tensors |= part
    if missing := sorted(shards.keys() - tensors.keys()):
        raise InputError(f"{index} lists {missing[0]!r}, which no shard holds: fetch the shards again")
    return state_dict_source(tensors, str(folder if is_split else single))


# --------------------------------------------------------------------------------- what files say of a model


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """A model in a folder or file.

    Attributes:
        path: the folder or file.
        table: the names of the tensors there.
        tensors: not read yet.
        config: None where there is nothing but the shapes of the tensors.
        record: what gptpl wrote next to an export (`model`, `tokenizer`, `lineage`); `tokenizer` and
            `model_before` where another program has changed the weights; empty elsewhere.
    """

    path: Path
    table: Table
    tensors: TensorSource
    config: GPTConfig | None
    record: Mapping[str, Any]


def with_record(
    path: Path, table: Table, tensors: TensorSource, described: GPTConfig, where: Path
) -> ModelFiles:
    """A folder whose file `where` describes its model, with what `gptpl.json` adds.

    Raises InputError where the two contradict each other.
    """
    record, config = read_record(path), described
    if "model" in record:
        config = recorded_config(record["model"], path)
        for name in (*_SIZES, "tie_weights"):
            if getattr(config, name) != getattr(described, name):
                raise InputError(
                    f"{where} says {name}={getattr(described, name)}, {RECORD_FILE} next to it"
                    f" {getattr(config, name)}: restore the one that was changed"
                )
    return ModelFiles(path=path, table=table, tensors=tensors, config=config, record=record)


def required(content: Mapping[str, Any], names: tuple[str, ...], path: Path) -> list[Any]:
    """The values of these names. Raises InputError for missing ones."""
    if missing := [name for name in names if name not in content]:
        raise InputError(f"{path} lacks {', '.join(missing)}: fetch it again")
    return [content[name] for name in names]


def check_settings(
    content: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]], path: Path, *, remedy: str
) -> None:
    """Raise InputError for a setting with a value that gptpl does not have; a missing one has the first."""
    for name, values in allowed.items():
        if (got := content.get(name, values[0])) not in values:
            known = " or ".join(map(repr, values))
            raise InputError(f"{path} has {name}={got!r}, gptpl {known}: {remedy}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises InputError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # no file, not UTF-8, not JSON, nested too deep
        raise InputError(f"{path} is not a JSON file ({error}): restore it, or fetch it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object: restore it, or fetch it again")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an indented JSON file."""
    with writing(path.parent):
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def writing(folder: Path, *kinds: type[Exception]) -> Iterator[None]:
    """Raise InputError for an OSError, or a library's exception of these kinds, when files are written."""
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
    """The content of `gptpl.json` in a folder, as in `ModelFiles.record`; empty if there is none."""
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
            raise InputError(f"{path} lacks {part}: restore the file, or remove it")
    step, start = (record["lineage"].get(name) for name in ("step", "start"))
    if not isinstance(step, int) or not isinstance(start, dict):
        raise InputError(f"{path} lacks step or start in its lineage: restore the file, or remove it")
    if record["weights_sha256"] != weights_sha256(folder):
        log.warning(
            "%s: the weights next to it were damaged or edited since it was written: it tells only their"
            " tokenizer, not where they come from",
            path,
        )
        return {"tokenizer": record["tokenizer"], "model_before": record["model"]}
    return record


def recorded_config(model: Mapping[str, Any], folder: Path) -> GPTConfig:
    """The model that `gptpl.json` describes."""
    try:
        return GPTConfig(**model)
    except TypeError as error:
        raise InputError(f"{folder / RECORD_FILE} does not describe a model ({error}): restore it") from error


def weights_sha256(path: Path) -> dict[str, str]:
    """The SHA-256 of a file, or of every file of weights in a folder, by name."""
    kinds = ("*.safetensors", "*.ckpt.data-*", "*.pth", "*.pt", "*.bin", "*.gguf")
    paths = [path] if path.is_file() else [found for kind in kinds for found in path.glob(kind)]
    return {found.name: remembered_sha256(found) for found in sorted(paths)}
