"""The adapter of a run that was trained by LoRA, and an adapter with its base as a checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from gptpl.checkpoints.format import (
    CLASSIFY,
    FORMAT_VERSION,
    HEADER_KEY,
    NET_PREFIX,
    lineage_of,
    model_config,
    read_checkpoint,
    task_of,
    trained_weights,
)
from gptpl.checkpoints.loading import RunWeights
from gptpl.checkpoints.resume_state import digest
from gptpl.errors import InputError
from gptpl.files.durable import share
from gptpl.files.run_settings import with_current_names
from gptpl.model import GPTConfig
from gptpl.model.lora import is_low_rank, merged_weights
from gptpl.model.parameters import ALL, TuneLowRank, low_rank_scale
from gptpl.tokenizers import tokenizer_from_state
from gptpl.weights.adapter import Adapter, read_adapter, write_adapter
from gptpl.weights.model_files import DTYPES, RECORD_FILE, read_record, record_of, recorded_config, write_json
from gptpl.weights.published import cached_bytes, checked_size, hub_name
from gptpl.weights.starting import FileWeights, PublishedWeights, StartingWeights
from gptpl.weights.transfer import check_is_gpt2

_BASES = {"run": "checkpoint", "state_dict": "path", "gpt2_hf": "size", "gpt2_openai": "size"}
"""Starts whose weights a file holds, and what of their record says where."""
_HEAD = ("out_head.weight", "out_head.bias")
"""What of a classifier is new, and belongs to its adapter."""


def export_adapter(path: Path, folder: Path) -> None:
    """Write the adapter of a checkpoint into a folder, which may hold an older one.

    `adapter_model.safetensors` and `adapter_config.json` are PEFT's; `gptpl.json` names the base weights:
    where they are, and the SHA-256 of their numbers. Raises InputError for a checkpoint that was not trained
    by LoRA, or that began with random weights.
    """
    checkpoint = read_checkpoint(path)
    header = checkpoint[HEADER_KEY]
    tune, task = header.get("tune", ALL), task_of(header)
    if tune["name"] != TuneLowRank.name:
        raise InputError(
            f"checkpoint={path} was trained with tune={tune['name']}, which leaves no adapter: give a run of"
            " tune=lora, or another format"
        )
    lineage = lineage_of(checkpoint, path)
    base_of(lineage["start"], path)
    config = model_config(header, path)
    check_is_gpt2(config, "format=adapter")
    weights = trained_weights(checkpoint)
    new = {name for name in weights if is_low_rank(name) or (task["name"] == CLASSIFY and name in _HEAD)}
    base = {name: tensor for name, tensor in weights.items() if name not in new}
    adapter = Adapter(
        tensors={name: weights[name] for name in weights if name in new},
        rank=tune["rank"],
        alpha=tune["alpha"],
        dropout=tune["dropout"],
        final_norm={name: weights[name] for name in ("final_norm.weight", "final_norm.bias")},
    )
    dtype = str(next(iter(base.values())).dtype).removeprefix("torch.")
    folder.mkdir(exist_ok=True)
    with TemporaryDirectory(prefix=".", suffix=".tmp", dir=folder) as temporary:
        made = Path(temporary)
        write_adapter(adapter, config, made, base=_name(lineage["start"]))
        record = record_of(made, config, header["tokenizer"], lineage)
        record |= {"base": {"sha256": digest(base), "dtype": dtype}}
        record |= {"tune": dict(tune), "task": task, "config": header["config"]}
        write_json(made / RECORD_FILE, record)
        share(made)
        for file in made.iterdir():  # interrupted here, the record has the hash of other matrices
            file.replace(folder / file.name)


def adapter_checkpoint(folder: Path, *, base: StartingWeights | None = None) -> dict[str, Any]:
    """An adapter added to its base, as `read_checkpoint` would give the merged model.

    `folder` is what `export_adapter` wrote; `base` None: the weights are where they were when it was trained.
    Raises InputError for files that are damaged or not gptpl's, and for base weights that are missing or not
    those it was trained on.
    """
    record = _record_of(folder)
    config = recorded_config(record["model"], folder)
    adapter = read_adapter(folder, config)
    if adapter.scale != low_rank_scale(record["tune"]):
        raise InputError(
            f"{folder} has another lora_alpha or r in its adapter_config.json than it was trained with:"
            f" restore the file (r={record['tune']['rank']}, lora_alpha={record['tune']['alpha']:g})"
        )
    weights = _base_weights(folder, config, record, base)
    merged = merged_weights({**weights, **adapter.tensors}, scale=adapter.scale)
    header = {
        "format_version": FORMAT_VERSION,
        **{part: record[part] for part in ("model", "tokenizer", "lineage", "task")},
        "config": with_current_names(record["config"]),
    }
    return {
        HEADER_KEY: header,
        "state_dict": {f"{NET_PREFIX}{name}": tensor for name, tensor in merged.items()},
        "global_step": record["lineage"]["step"],
    }


def _record_of(folder: Path) -> dict[str, Any]:
    """The record of `export_adapter`; InputError if it is missing, or not whole."""
    record = read_record(folder)
    for part, entries in {
        "base": ("sha256", "dtype"),
        "tune": ("name", "rank", "alpha"),
        "task": ("name",),
        "config": (),
    }.items():
        if not isinstance(record.get(part), dict):
            raise InputError(
                f"{folder} does not name the base weights of its adapter ({RECORD_FILE} is missing, or the"
                " adapter was changed since): export it again, or merge it with PEFT and use the merged model"
            )
        if missing := [entry for entry in entries if entry not in record[part]]:
            raise InputError(f"{folder / RECORD_FILE} lacks {part}.{missing[0]}: export the adapter again")
    if record["base"]["dtype"] not in DTYPES:
        raise InputError(
            f"{folder / RECORD_FILE} has base.dtype={record['base']['dtype']}: export the adapter again"
        )
    return record


def _base_weights(
    folder: Path, config: GPTConfig, record: Mapping[str, Any], base: StartingWeights | None
) -> dict[str, Tensor]:
    """The weights that the adapter was trained on, and no others."""
    try:
        starting = base or base_of(record["lineage"]["start"], folder)
        if base is None and isinstance(starting, PublishedWeights) and starting.path is None:
            size = starting.size_for(config)  # a folder from elsewhere does not start a download
            if not cached_bytes(size, starting.source)[1]:
                raise InputError(f"GPT-2 {size.name} is not in the cache: give init={starting.name}")
        starting.check(config, tokenizer_from_state(record["tokenizer"]).state())
        net, _ = starting.make_model(config)
    except InputError as error:
        if base is not None:
            raise
        fact = str(error).rpartition(": ")[0]
        raise InputError(
            f"{folder} is an adapter, and its base weights cannot be used ({fact}): say where they are,"
            " init=gpt2_hf, init=run init.checkpoint=RUN, or init=state_dict init.path=FOLDER"
        ) from error
    wanted = record["base"]
    net.to(DTYPES[wanted["dtype"]])
    new = _HEAD if record["task"]["name"] == CLASSIFY else ()
    weights = {name: tensor for name, tensor in net.state_dict().items() if name not in new}
    if (got := digest(weights)) != wanted["sha256"]:
        places = (getattr(starting, name, None) for name in ("checkpoint", "path", "name"))
        place = next(filter(None, places), type(starting).__name__)
        raise InputError(
            f"{folder} is an adapter of other weights (SHA-256 {wanted['sha256'][:12]}) than {place} has"
            f" ({got[:12]}): give init= of those that it was trained on"
        )
    return weights


def base_of(start: Mapping[str, Any], path: Path) -> StartingWeights:
    """The weights that a run began with, by its record; raises InputError if no file holds them."""
    kind = str(start.get("init"))
    needed = _BASES.get(kind)
    if needed is None:
        raise InputError(
            f"{path} began with {kind} weights, which no file holds as the base of an adapter: convert it to"
            " a whole model, format=gptpl or format=hf"
        )
    if not isinstance(start.get(needed), str):
        raise InputError(f"{path} does not say where its first weights are ({needed} is missing)")
    crops: dict[str, Any] = {
        name: bool(start[name]) for name in ("crop_context", "crop_vocabulary") if name in start
    }
    if kind == "run":
        return RunWeights(checkpoint=start["checkpoint"], **crops)
    if kind == "state_dict":
        return FileWeights(path=start["path"], **crops)
    source = kind.removeprefix("gpt2_")
    return PublishedWeights(source=source, size=start["size"], path=start.get("path"), **crops)


def has_base(start: Mapping[str, Any]) -> bool:
    """Whether a file holds the weights that a run with this start began with."""
    return start.get("init") in _BASES


def _name(start: Mapping[str, Any]) -> str:
    """The base's name for PEFT: that of the hub, or a path."""
    if start["init"] == "gpt2_hf" and not start["path"]:
        return hub_name(checked_size(start["size"]))
    return str(start.get("checkpoint") or start.get("path") or start["init"])
