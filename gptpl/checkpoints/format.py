"""What gptpl adds to a Lightning checkpoint, and how it is read back and checked.

The entry `gptpl`, the header, is plain data: the format's version, the model's configuration, the tokenizer's
state and the run's resolved settings. With it any command rebuilds the model from the file alone, and no
checkpoint needs code to be unpickled: all of it is read with `weights_only=True`. A model that is not a
`GPTModel` is described by its class, `_target_`, and the keywords that it was built with.
"""

import dataclasses
import inspect
import pkgutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from gptpl.checkpoints.files import file_version, parts_of, verify, whole_neighbour
from gptpl.checkpoints.resume_state import RESUME_KEY
from gptpl.checkpoints.sharded import assemble
from gptpl.errors import InputError
from gptpl.files.plain import read_plain, tensors_in
from gptpl.files.run_record import CHECKPOINT_FOLDER, RunError, is_modest, read_evaluations
from gptpl.files.run_settings import with_current_names
from gptpl.model import GPTBackbone, GPTClassifier, GPTConfig, GPTModel
from gptpl.model.lora import low_rank_layers, merged_weights
from gptpl.model.parameters import ALL, TuneLowRank, low_rank_scale
from gptpl.model.protocol import class_path
from gptpl.tokenizers import Tokenizer

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
"""Version 1 had no random states and no position in the data: its models can be used, but not resumed."""
HEADER_KEY = "gptpl"
TARGET = "_target_"
"""Names the class in the description of a model that is not a `GPTModel`."""
NET_PREFIX = "net."
"""The training module's attribute with the model: the prefix of its names in a `state_dict`."""
CLASSIFY = "classify"
"""The task whose models write no text."""
RANDOM: Mapping[str, Any] = {"init": "random"}
"""The `start` of a model that was not pretrained."""
LOSSES = ("eval/train_loss", "val/loss")

# --- writing --------------------------------------------------------------------------------------------


def describe(net: nn.Module, built_from: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The model as plain data: a GPT-2's configuration, or the `_target_` and keywords of another class.

    `built_from` are the latter; None: the class alone.
    """
    if type(net) in (GPTModel, GPTClassifier):
        return dataclasses.asdict(cast(GPTBackbone, net).config)
    return dict(built_from or {TARGET: class_path(net)})


def checkpoint_header(
    model: GPTConfig | Mapping[str, Any],
    tokenizer: Tokenizer,
    run_config: dict[str, Any],
    start: Mapping[str, Any] = RANDOM,
) -> dict[str, Any]:
    """The header of every checkpoint; `model` as by `describe`, `start` what the weights began as."""
    return {
        "format_version": FORMAT_VERSION,
        "model": _plain(model),
        "tokenizer": tokenizer.state(),
        "config": run_config,
        "start": dict(start),
    }


def _plain(model: GPTConfig | Mapping[str, Any]) -> dict[str, Any]:
    return dataclasses.asdict(model) if isinstance(model, GPTConfig) else dict(model)


# --- reading --------------------------------------------------------------------------------------------


def read_checkpoint(path: Path, *, verified: bool = False, whole: bool = True) -> dict[str, Any]:
    """The whole checkpoint as plain data and CPU tensors, mapped from the file rather than copied.

    `verified`: the file is known to be as it was written, see `verify`, or its tensors are not going to be
    used. A sharded checkpoint is put together in memory, unless `whole` is false: then what is sharded is
    left out. Raises InputError for a file that does not exist, is damaged, holds code, or is not gptpl's;
    whoever made it, all entries are of the right kinds. The message names a whole checkpoint of the same
    folder, if there is one. A file that is replaced meanwhile, as best.ckpt is, is read again.
    """
    try:
        before = file_version(path)
        checkpoint: dict[str, Any] | None = None
        try:
            checkpoint = _read(path, verified=verified, whole=whole)
        except InputError:
            if file_version(path) == before:
                raise
        if checkpoint is None or file_version(path) != before:  # it may be a part of each file
            checkpoint = _read(path, verified=verified, whole=whole)
    except InputError as error:
        fact, found, _ = str(error).rpartition("use another ")
        if found and (other := whole_neighbour(path)):
            raise InputError(f"{fact}use {other}, which is whole") from error
        raise
    checkpoint[HEADER_KEY]["config"] = with_current_names(checkpoint[HEADER_KEY]["config"])
    return checkpoint


def _read(path: Path, *, verified: bool, whole: bool) -> dict[str, Any]:
    checkpoint: dict[str, Any] = read_plain(path, key="checkpoint")
    header = checkpoint.get(HEADER_KEY) if isinstance(checkpoint, dict) else None
    if not isinstance(header, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise InputError(
            f"checkpoint={path} was not written by gptpl train: give a checkpoint of one of its runs"
        )
    version = header.get("format_version")
    if not isinstance(version, int) or version not in READABLE_VERSIONS:
        raise InputError(
            f"checkpoint={path} has format version {version}, this gptpl reads up to {FORMAT_VERSION}:"
            " use the gptpl that wrote it"
        )
    parts = parts_of(checkpoint, path)
    if parts and not verified:  # before they are put together
        _check_hash(path)
    if whole:
        assemble(checkpoint, path)
    _check_entries(checkpoint, header, path)
    if not parts and not verified:
        _check_hash(path)
    return checkpoint


def _check_hash(path: Path) -> None:
    if reason := verify(path.resolve()):  # a record is next to the target of a link
        raise InputError(f"checkpoint={path} {reason}: use another checkpoint")


def read_header(path: Path) -> dict[str, Any]:
    """The header alone; raises InputError as `read_checkpoint`, but does not read the tensors."""
    return read_checkpoint(path, verified=True, whole=False)[HEADER_KEY]


# Entries by name: their kind, or their own entries; for numbers also the smallest value. Those with a "?" may
# be missing.
_COUNT, _STEP = (int, 1), (int, 0)
_HEADER = {
    **dict.fromkeys(("model", "tokenizer", "config", "start?"), dict),
    "lineage?": {"step": _STEP, "start": dict, "tokens_seen?": _STEP, "data?": dict, "losses?": dict},
    "task?": {"name": str},
    "tune?": {"name": str, "rank?": _COUNT, "alpha?": int | float},
    **dict.fromkeys(("tokens_seen?", "global_batch?"), _STEP),
    "data_sha256?": str,
}
_CLASSIFIER = {
    "labels": list,
    "pooling": str,
    "head_bias": bool,
    "max_length": _COUNT,
    "padded_to": (int | None, 1),
}
_RESUMABLE = {
    "tokens_seen": _STEP,
    "data_sha256": str,
    "world_size": _COUNT,
    "total_steps": _COUNT,
    "lr_ceiling?": int | float | None,
}


def _check_entries(checkpoint: Mapping[str, Any], header: Mapping[str, Any], path: Path) -> None:
    _check(checkpoint, {"global_step?": _STEP}, "", path)
    if tensors_in(header):
        raise _damaged("header", "not plain data", path)
    _check(header, _HEADER, "", path)
    if not is_modest(header["config"]):
        raise _damaged("config", "not the settings of a run", path)
    if header.get("tune", ALL)["name"] == TuneLowRank.name:
        _check(header["tune"], {"rank": _COUNT, "alpha": int | float}, "tune.", path)
    weights = checkpoint["state_dict"]
    for name, tensor in weights.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise _damaged(f"weight {name!r:.80}", "not a tensor", path)
    # Before the small matrices are multiplied: their product may be larger than any file.
    for layer in low_rank_layers(weights):
        missing = torch.empty(0)
        parts = (weights.get(f"{layer}.{part}", missing) for part in ("weight", "lora_A", "lora_B"))
        weight, A, B = (tuple(part.shape) for part in parts)
        if len(weight) != 2 or len(A) != 2 or A[1] != weight[1] or (weight[0], A[0]) != B:
            raise _damaged(f"weight {layer!r:.80}", "not of the shape of its low-rank matrices", path)


def check_classifier_task(task: Mapping[str, Any], path: Path) -> None:
    """Raise InputError for the first entry of a classifier's task that is missing or of the wrong kind."""
    _check(task, _CLASSIFIER, "task.", path)
    if not all(isinstance(label, str) for label in task["labels"]):
        raise _damaged("task.labels", "of the wrong kind", path)


def check_resumable(checkpoint: dict[str, Any], path: Path) -> None:
    """Raise InputError for a checkpoint, as `read_checkpoint` gives it, that cannot be resumed."""
    header = checkpoint[HEADER_KEY]
    if header["format_version"] < FORMAT_VERSION:
        raise InputError(
            f"checkpoint={path} has format version 1, without random states and position in the data, and"
            " cannot be resumed: start a new run from it, init=run"
        )
    if RESUME_KEY not in checkpoint or "optimizer_states" not in checkpoint:
        raise InputError(f"checkpoint={path} has no training state: resume the run's folder")
    _check(header, _RESUMABLE, "", path)
    if not isinstance(checkpoint[RESUME_KEY], Mapping):
        raise _damaged(RESUME_KEY, "of the wrong kind", path)
    _check(checkpoint[RESUME_KEY], {"step": _STEP}, "", path)


def _check(found: Any, entries: Mapping[str, Any], place: str, path: Path) -> None:
    for entry, wanted in entries.items():
        name = entry.removesuffix("?")
        if name not in found:
            if name == entry:
                raise _damaged(f"{place}{name}", "missing", path)
            continue
        kind, least = wanted if isinstance(wanted, tuple) else (wanted, None)
        value, own = found[name], isinstance(kind, Mapping)
        if not isinstance(value, dict if own else kind) or (isinstance(value, bool) and kind is not bool):
            raise _damaged(f"{place}{name}", "of the wrong kind", path)
        if own:
            _check(value, kind, f"{place}{name}.", path)
        elif least is not None and isinstance(value, int) and value < least:
            raise _damaged(f"{place}{name}", f"below {least}", path)


def _damaged(entry: str, what: str, path: Path) -> InputError:
    return InputError(f"checkpoint={path} is damaged ({entry} is {what}): use another checkpoint")


# --- the model and its task -----------------------------------------------------------------------------


def task_of(header: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint's model was trained for, by its `name`; older checkpoints: pretraining."""
    return dict(header.get("task", {"name": "pretrain"}))


def check_writes_text(header: Mapping[str, Any], path: Path, *, key: str = "checkpoint") -> None:
    """Raise InputError for the checkpoint of a classifier."""
    if task_of(header)["name"] == CLASSIFY:
        start = header.get("start", {}).get("checkpoint")
        began = f"the run that it began with{'' if start is None else f', {start}'}"
        use = "give" if key != "checkpoint" else "use gptpl classify, or give"
        raise InputError(f"{key}={path} is a classifier, which writes no text: {use} {began}")


def other_class(header: Mapping[str, Any], path: Path) -> str | None:
    """The class of a checkpoint's model, `mypackage.models.TinyRNN`; None: it is a `GPTModel`."""
    target = header["model"].get(TARGET)
    if target is None:
        return None
    if not isinstance(target, str) or "." not in target or not target.replace(".", "_").isidentifier():
        raise _damaged(f"model.{TARGET}", "not the name of a class", path)
    return target


def model_config(header: dict[str, Any], path: Path) -> GPTConfig:
    """The configuration of a checkpoint's model. Raises InputError for one that this gptpl does not know."""
    if (other := other_class(header, path)) is not None:
        raise InputError(
            f"checkpoint={path} holds a {other}, a gptpl.model.GPTModel is needed: give a checkpoint of one"
        )
    try:
        return GPTConfig(**header["model"])
    except TypeError as error:
        raise InputError(
            f"checkpoint={path} has a model configuration that this gptpl does not know ({error}):"
            " use the gptpl that wrote it"
        ) from error
    except InputError as error:
        raise InputError(f"checkpoint={path} has an invalid model configuration: {error}") from error


def trained_weights(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The model's tensors as the training had them, with the low-rank matrices of LoRA apart."""
    return {
        name.removeprefix(NET_PREFIX): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith(NET_PREFIX)
    }


def net_weights(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The model's tensors by their names in the model, with those of LoRA merged into the others, in fp32."""
    weights = trained_weights(checkpoint)
    scale = low_rank_scale(checkpoint[HEADER_KEY].get("tune", ALL))
    return weights if scale is None else merged_weights(weights, scale=scale)


def check_shapes(net: nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    """Raise InputError for the first weight whose name or shape is not this model's."""
    wanted = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    got = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in sorted(wanted.keys() | got.keys()):
        if wanted.get(name) != got.get(name):
            raise InputError(
                f"checkpoint={path} holds {name!r} as {got.get(name, 'nothing')}, its own configuration wants"
                f" {wanted.get(name, 'nothing')}: use another checkpoint"
            )


def check_same_model(
    header: Mapping[str, Any], model: GPTConfig | Mapping[str, Any], tokenizer: Mapping[str, Any]
) -> None:
    """Refuses a checkpoint of another tokenizer, by its state, or of another class or shape of model.

    Names the first field that differs. Fields that only steer training or the first initialisation
    (`drop_rate`, `init`) may. A field that is not there has its default: the class may have got it since.
    """
    check_same_tokenizer(header, tokenizer)
    own, stored = _plain(model), dict(header["model"])
    if own.get(TARGET) != stored.get(TARGET):
        ours, theirs = (each.get(TARGET, "gptpl.model.GPTModel") for each in (own, stored))
        raise InputError(f"the checkpoint holds a {theirs}, this run has a {ours}: give model= as it was")
    defaults = _defaults_of(own)
    for field in own | (stored if TARGET in own else {}):
        wanted, got = (each.get(field, defaults.get(field)) for each in (own, stored))
        if field not in ("drop_rate", "init") and got != wanted:
            raise InputError(
                f"the checkpoint has model.{field}={got}, this run wants {wanted}: set model.{field}={got}"
            )


def _defaults_of(model: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of the class that a model of this run, which is trusted, was built by."""
    made_by: Any = GPTConfig
    if TARGET in model:
        try:
            made_by = pkgutil.resolve_name(model[TARGET])
        except (ValueError, ImportError, AttributeError):  # a class within a function
            return {}
    return {name: each.default for name, each in inspect.signature(made_by).parameters.items()}


def check_same_tokenizer(header: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise InputError for a checkpoint of another tokenizer than the one with this state."""
    stored = header["tokenizer"]
    if stored["name"] != own["name"]:
        raise InputError(
            f"the checkpoint was trained with tokenizer={stored['name']}, this run has {own['name']}:"
            f" set tokenizer={stored['name']}"
        )
    if stored["sha256"] != own["sha256"]:
        raise InputError(
            f"the checkpoint's {stored['name']} vocabulary ({stored['sha256'][:12]}) differs from this run's"
            f" ({own['sha256'][:12]}): use the data and tokenizer it was trained with"
        )


# --- where the weights come from ------------------------------------------------------------------------


def lineage_of(checkpoint: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The past of a checkpoint, as plain data.

    Keys: `step` (optimizer steps), `tokens_seen`, `data` (`corpus`, and the text's `sha256`), `losses` (nats
    per token at the last evaluation before the checkpoint; empty without the run's files), and `start`: what
    the weights began as; for another run's with that run's lineage as `parent`.
    """
    header = checkpoint[HEADER_KEY]
    if exported := header.get("lineage"):
        return dict(exported)
    step = int(checkpoint.get("global_step", 0))
    losses: dict[str, float] = {}
    if path.parent.name == CHECKPOINT_FOLDER:
        with suppress(RunError):  # the rest is worth telling without the losses
            for each in read_evaluations(path.resolve().parent.parent):
                if each.step <= step:
                    losses |= {name: each.metrics[name] for name in LOSSES if name in each.metrics}
    return {
        "step": step,
        "tokens_seen": int(header.get("tokens_seen", 0)),
        "data": {"corpus": _corpus(header["config"]), "sha256": header.get("data_sha256", "")},
        "losses": losses,
        "start": header.get("start", RANDOM),
    }


def _corpus(config: Mapping[str, Any]) -> str:
    """The name of the text in the run's settings."""
    data = config.get("data")
    if isinstance(data, Mapping) and isinstance(sources := data.get("sources"), Mapping):
        return "mixture of " + ", ".join(map(str, sources))
    corpus = data.get("corpus") if isinstance(data, Mapping) else None
    if not isinstance(corpus, Mapping):
        return ""
    target = str(corpus.get("_target_", "")).rpartition(".")[2]
    return str(corpus.get("name") or corpus.get("path") or target)


def generations(lineage: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The runs of a lineage, the youngest first."""
    found = [lineage]
    while isinstance(parent := found[-1].get("start", {}).get("parent"), Mapping):
        found.append(parent)
    return found
