"""What gptpl writes into a Lightning checkpoint beside Lightning's own entries, and how it is read back.

Under the key `gptpl` stand plain data only: the format's version, the model's configuration, the tokenizer's
state and the run's resolved configuration. With it any command rebuilds the model from the file alone, and a
checkpoint never needs code to be unpickled: everything is read with `weights_only=True`. A model of another
class than `GPTModel` is described by what it was built from: `_target_`, the class, and its keywords.
"""

import dataclasses
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from gptpl.checkpoints.files import verify, whole_one_named
from gptpl.checkpoints.resume_state import RESUME_KEY
from gptpl.errors import InputError
from gptpl.files.plain import read_plain, tensors_in
from gptpl.files.run_record import RunError, read_evaluations
from gptpl.files.run_settings import with_current_names
from gptpl.model import GPTBackbone, GPTClassifier, GPTConfig, GPTModel
from gptpl.model.lora import low_rank_layers, merged_weights
from gptpl.model.protocol import class_path
from gptpl.model.tuning import ALL, low_rank_scale
from gptpl.tokenizers import Tokenizer

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
"""Version 1 kept no random states and no position in the data: its models can be used, not trained on."""
HEADER_KEY = "gptpl"
TARGET = "_target_"
"""Names the class in the description of a model that is no `GPTModel`."""
NET_PREFIX = "net."
"""Where a training module keeps the model: the prefix of its names in the checkpoint's `state_dict`."""
CLASSIFY = "classify"
"""The task whose models write no text."""
RANDOM: Mapping[str, Any] = {"init": "random"}
"""What the weights of a model begin as that was not pretrained."""
LOSSES = ("eval/train_loss", "val/loss")

# --- written --------------------------------------------------------------------------------------------


def describe(net: nn.Module, built_from: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The model as plain data: a GPT-2's configuration, or what another class was built from.

    Those are its `_target_` and keywords; None: the class alone, for whoever knows how to call it.
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
    """The plain data that every checkpoint holds: `model` as of `describe`, `start` what its weights were."""
    return {
        "format_version": FORMAT_VERSION,
        "model": _plain(model),
        "tokenizer": tokenizer.state(),
        "config": run_config,
        "start": dict(start),
    }


def _plain(model: GPTConfig | Mapping[str, Any]) -> dict[str, Any]:
    return dataclasses.asdict(model) if isinstance(model, GPTConfig) else dict(model)


# --- read -----------------------------------------------------------------------------------------------


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The whole checkpoint as plain data and CPU tensors, mapped from the file rather than copied.

    A file may be damaged, or made by anybody: its entries are of the right kinds, or it is refused. Raises
    InputError where it does not exist, is cut short, holds code, or was not written by gptpl; the message
    names a whole checkpoint beside it, if there is one.
    """
    with whole_one_named(path):
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
        _check_entries(checkpoint, header, path)
        header["config"] = with_current_names(header["config"])
    return checkpoint


def check_intact(path: Path) -> None:
    """Refuses a checkpoint that is not the one whose SHA-256 stands beside it, if one does."""
    with suppress(FileNotFoundError), whole_one_named(path):
        if reason := verify(path.resolve()):
            raise InputError(f"checkpoint={path} {reason}: use another checkpoint")


# The kind of each entry, with its smallest value if it is a number; one with a "?" may be missing.
_COUNT, _STEP = (int, 1), (int, 0)
_CHECKPOINT = {"state_dict": dict, "global_step?": _STEP}
_HEADER = {
    **dict.fromkeys(("model", "tokenizer", "config", "start?", "lineage?", "tune?", "task?"), dict),
    **dict.fromkeys(("tokens_seen?", "global_batch?"), _STEP),
    "data_sha256?": str,
}
_LINEAGE = {"step": _STEP, "start": dict, "tokens_seen?": _STEP, "data?": dict, "losses?": dict}
_LORA = {"rank": _COUNT, "alpha": int | float}
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
    _check(checkpoint, _CHECKPOINT, "", path)
    if tensors_in(header):
        raise _damaged("header", "no plain data", path)
    _check(header, _HEADER, "", path)
    task, tune = header.get("task"), header.get("tune")
    if "lineage" in header:
        _check(header["lineage"], _LINEAGE, "lineage.", path)
    if task is not None:
        _check(task, {"name": str}, "task.", path)
    if tune is not None:
        _check(tune, {"name": str, **(_LORA if tune.get("name") == "lora" else {})}, "tune.", path)
    weights = checkpoint["state_dict"]
    for name, tensor in weights.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise _damaged(f"weight {name!r:.80}", "no tensor", path)
    # Before the small matrices are multiplied: their product may be larger than any file.
    for layer in low_rank_layers(weights):
        shapes = [
            tuple(weights[f"{layer}.{part}"].shape) if f"{layer}.{part}" in weights else ()
            for part in ("weight", "lora_A", "lora_B")
        ]
        (outputs, inputs), first, second = shapes[0] if len(shapes[0]) == 2 else (0, 0), *shapes[1:]
        if len(second) != 2 or first != (second[1], inputs) or second[0] != outputs:
            raise _damaged(f"weight {layer!r:.80}", "of another shape than its low-rank matrices", path)


def check_classifier_task(task: Mapping[str, Any], path: Path) -> None:
    """Raises InputError that names the first entry of a classifier's task that is missing or not its kind."""
    _check(task, _CLASSIFIER, "task.", path)
    if not all(isinstance(label, str) for label in task["labels"]):
        raise _damaged("task.labels", "of another kind", path)


def check_resumable(checkpoint: dict[str, Any], path: Path) -> None:
    """Raises InputError for a checkpoint, as `read_checkpoint` gives it, that training cannot go on from."""
    header = checkpoint[HEADER_KEY]
    if header["format_version"] < FORMAT_VERSION:
        raise InputError(
            f"checkpoint={path} has format version 1, which kept neither random states nor the position in"
            " the data: generate and evaluate can use it, to go on training start a new run"
        )
    if RESUME_KEY not in checkpoint or "optimizer_states" not in checkpoint:
        raise InputError(
            f"checkpoint={path} holds a model without the state of its training: resume the run's folder"
        )
    _check(header, _RESUMABLE, "", path)
    if not isinstance(checkpoint[RESUME_KEY], Mapping):
        raise _damaged("state of its training", "of another kind", path)
    _check(checkpoint[RESUME_KEY], {"step": _STEP}, "", path)


def _check(found: Mapping[str, Any], entries: Mapping[str, Any], place: str, path: Path) -> None:
    for entry, wanted in entries.items():
        name = entry.removesuffix("?")
        kind, least = wanted if isinstance(wanted, tuple) else (wanted, None)
        if name not in found:
            if name == entry:
                raise InputError(
                    f"checkpoint={path} holds no {place}{name} (it is damaged): use another checkpoint"
                )
            continue
        value = found[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise _damaged(f"{place}{name}", "of another kind", path)
        if least is not None and isinstance(value, int) and value < least:
            raise _damaged(f"{place}{name}", f"below {least}", path)


def _damaged(entry: str, what: str, path: Path) -> InputError:
    return InputError(f"checkpoint={path} is damaged ({entry} is {what}): use another checkpoint")


# --- the model and its task -----------------------------------------------------------------------------


def task_of(header: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint's model was trained for, by its `name`; pretraining, where it does not say."""
    return dict(header.get("task", {"name": "pretrain"}))


def check_writes_text(header: Mapping[str, Any], path: Path, *, key: str = "checkpoint") -> None:
    """Raises InputError for the checkpoint of a classifier."""
    if task_of(header)["name"] == CLASSIFY:
        raise InputError(
            f"{key}={path} is a classifier, which writes no text: use gptpl classify, or give the run that it"
            " began with"
        )


def other_class(header: Mapping[str, Any], path: Path) -> str | None:
    """The class of a checkpoint's model, `mypackage.models.TinyRNN`; None: it is a `GPTModel`."""
    target = header["model"].get(TARGET)
    if target is None:
        return None
    if not isinstance(target, str) or "." not in target or not target.replace(".", "_").isidentifier():
        raise InputError(f"checkpoint={path} names no class of its model (it is damaged): use another one")
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
            f"checkpoint={path} describes its model otherwise than this gptpl ({error}):"
            " use the gptpl that wrote it"
        ) from error
    except InputError as error:
        raise InputError(f"checkpoint={path} describes a model that cannot be: {error}") from error


def trained_weights(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The model's tensors as the training had them: base and low-rank matrices apart."""
    return {
        name.removeprefix(NET_PREFIX): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith(NET_PREFIX)
    }


def net_weights(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The model's own tensors by their names in the model; those of LoRA merged into the others, in fp32."""
    weights = trained_weights(checkpoint)
    scale = low_rank_scale(checkpoint[HEADER_KEY].get("tune", ALL))
    return weights if scale is None else merged_weights(weights, scale=scale)


def check_shapes(net: nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    """Refuses weights whose names or shapes are not this model's, naming the first that is not."""
    wanted = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    got = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in sorted(wanted.keys() | got.keys()):
        if wanted.get(name) != got.get(name):
            raise InputError(
                f"checkpoint={path} holds {name!r} as {got.get(name, 'nothing')}, its own configuration wants"
                f" {wanted.get(name, 'nothing')}: the file is not usable, use another checkpoint"
            )


def check_same_model(
    header: Mapping[str, Any], model: GPTConfig | Mapping[str, Any], tokenizer: Mapping[str, Any]
) -> None:
    """Refuses a checkpoint of another tokenizer, by its state, or of another class or shape of model.

    Names the first field that differs. Fields that only steer training or the first initialisation
    (`drop_rate`, `init`) may.
    """
    check_same_tokenizer(header, tokenizer)
    own, stored = _plain(model), header["model"]
    if own.get(TARGET) != stored.get(TARGET):
        ours, theirs = (each.get(TARGET, "gptpl.model.GPTModel") for each in (own, stored))
        raise InputError(f"the checkpoint holds a {theirs}, this run has a {ours}: give model= as it was")
    for field in own | (stored if TARGET in own else {}):
        wanted, got = own.get(field), stored.get(field)
        if field not in ("drop_rate", "init") and got != wanted:
            raise InputError(
                f"the checkpoint has model.{field}={got}, this run wants {wanted}: set model.{field}={got}"
            )


def check_same_tokenizer(header: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuses a checkpoint of another tokenizer than the one of this state."""
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

    Keys: `step` (optimizer steps), `tokens_seen`, `data` (`corpus` and the text's `sha256`), `losses` (nats
    per token at the last evaluation before the checkpoint; empty where the run's files are not there),
    and `start`: what its first weights were, for a run with that run's own past as `parent`.
    """
    header = checkpoint[HEADER_KEY]
    if exported := header.get("lineage"):
        return dict(exported)
    step = int(checkpoint.get("global_step", 0))
    losses: dict[str, float] = {}
    if path.parent.name == "checkpoints":
        with suppress(RunError):  # what the weights began with is worth telling without the losses
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
    """What the run's settings call its text."""
    data = config.get("data")
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
