"""What gptpl writes into a Lightning checkpoint beside Lightning's own entries, and how it is read back.

Under the key `gptpl` stand plain data only: the format's version, the model's configuration, the tokenizer's
state and the run's resolved configuration. With it any command rebuilds the model from the file alone, and a
checkpoint never needs code to be unpickled: everything is read with `weights_only=True`. A model of another
class than `GPTModel` is described by what it was built from: `_target_`, the class, and its keywords.
"""

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from gptpl.data.tokenizers import Tokenizer, tokenizer_from_state
from gptpl.errors import InputError
from gptpl.files.plain import check_sharing, read_plain
from gptpl.model import GPTBackbone, GPTClassifier, GPTConfig, GPTModel, empty_model
from gptpl.model.lora import merged_weights
from gptpl.model.protocol import check_language_model, class_path
from gptpl.training.checkpoint_checks import check_entries, check_training_state
from gptpl.training.checkpoint_files import checkpoint_file, whole_one_named
from gptpl.training.checkpoint_io import verify
from gptpl.training.lineage import RANDOM, lineage_of
from gptpl.training.resume_state import RESUME_KEY
from gptpl.training.tuning import ALL, low_rank_scale
from gptpl.weights.transfer import check_memory

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
"""Version 1 kept no random states and no position in the data: its models can be used, not trained on."""
HEADER_KEY = "gptpl"
PRETRAIN: Mapping[str, Any] = {"name": "pretrain"}
"""The task of a checkpoint that names none."""
TARGET = "_target_"
"""Names the class in the description of a model that is no `GPTModel`."""
Build = Callable[[Mapping[str, Any]], nn.Module]
"""Builds a model from such a description, of a package that the user trusts."""
NET_PREFIX = "net."
"""Where a training module keeps the model: the prefix of its names in the checkpoint's `state_dict`."""


@dataclass(frozen=True, kw_only=True)
class LoadedCheckpoint:
    """A model rebuilt from a file, in evaluation mode, with what is known of its training."""

    path: Path
    net: nn.Module
    tokenizer: Tokenizer
    run_config: dict[str, Any]
    """The settings that it was trained with; empty where another program trained it."""
    step: int
    lineage: dict[str, Any]
    """See `gptpl.training.lineage`."""
    task: dict[str, Any] = dataclasses.field(default_factory=lambda: dict(PRETRAIN))
    """What it was trained for, by its `name`, and what using it needs to know."""
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What a model of another class than `GPTModel` was built from; see `describe`."""


def describe(net: nn.Module, built_from: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The model as plain data: a GPT-2's configuration, or the `_target_` and keywords of another class.

    `built_from` are these; None: the class alone, which whoever rebuilds the model has to know how to call.
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
    """The plain data that a training module adds to a checkpoint.

    Args:
        model: see `describe`.
        tokenizer: the model's.
        run_config: the settings that it was trained with.
        start: what its weights began as.
    """
    return {
        "format_version": FORMAT_VERSION,
        "model": _plain(model),
        "tokenizer": tokenizer.state(),
        "config": run_config,
        "start": dict(start),
    }


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The whole checkpoint as plain data and CPU tensors, mapped from the file rather than copied.

    Raises:
        InputError: no such file, not a checkpoint, cut short, holding code, or not written by gptpl; it
            names a whole checkpoint beside it, if there is one.
    """
    with whole_one_named(path):
        checkpoint: dict[str, Any] = read_plain(path, key="checkpoint")
        _check_header(checkpoint, path)
    return checkpoint


def _check_header(checkpoint: Any, path: Path) -> None:
    header = checkpoint.get(HEADER_KEY) if isinstance(checkpoint, dict) else None
    if not isinstance(header, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise InputError(
            f"checkpoint={path} was not written by gptpl train: give a checkpoint of one of its runs"
        )
    version = header.get("format_version")
    if version not in READABLE_VERSIONS:
        raise InputError(
            f"checkpoint={path} has format version {version}, this gptpl reads up to {FORMAT_VERSION}:"
            " use the gptpl that wrote it"
        )
    check_entries(checkpoint, header, path)


def check_resumable(checkpoint: dict[str, Any], path: Path) -> None:
    """Raises InputError for a checkpoint, as `read_checkpoint` gives it, that training cannot go on from."""
    if checkpoint[HEADER_KEY]["format_version"] < FORMAT_VERSION:
        raise InputError(
            f"checkpoint={path} has format version 1, which kept neither random states nor the position in"
            " the data: generate and evaluate can use it, to go on training start a new run"
        )
    if RESUME_KEY not in checkpoint or "optimizer_states" not in checkpoint:
        raise InputError(
            f"checkpoint={path} holds a model without the state of its training: resume the run's folder"
        )
    check_training_state(checkpoint[HEADER_KEY], checkpoint[RESUME_KEY], path)


def _plain(model: GPTConfig | Mapping[str, Any]) -> dict[str, Any]:
    return dataclasses.asdict(model) if isinstance(model, GPTConfig) else dict(model)


def check_same_model(
    header: dict[str, Any], model: GPTConfig | Mapping[str, Any], tokenizer: Tokenizer
) -> None:
    """Refuses a checkpoint of another model or tokenizer, see `check_same_description`."""
    check_same_tokenizer(header, tokenizer.state())
    check_same_description(header, model)


def check_same_description(header: Mapping[str, Any], model: GPTConfig | Mapping[str, Any]) -> None:
    """Refuses a checkpoint of a model of another class or shape, naming the first field that differs.

    Fields that only steer training or the first initialisation (`drop_rate`, `init`) may differ.
    """
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


def check_same_tokenizer(header: dict[str, Any], own: Mapping[str, Any]) -> None:
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


def load_model(path: Path | str, *, device: str = "cpu", build: Build | None = None) -> LoadedCheckpoint:
    """Rebuilds model and tokenizer from a checkpoint file, or from a run folder's last checkpoint.

    A `GPTModel` is made here. The class of another model is never called here: `build` does, if it trusts it.

    Raises:
        InputError: as `read_checkpoint`, for a model that writes no text, for one of another class without
            `build`, and where names or shapes of the weights are not the configuration's.
    """
    path = checkpoint_file(str(path))
    checkpoint = read_checkpoint(path)
    check_intact(path)
    return model_of(checkpoint, path, device=device, build=build)


def model_of(
    checkpoint: dict[str, Any], path: Path, *, device: str = "cpu", build: Build | None = None
) -> LoadedCheckpoint:
    """Model and tokenizer of a checkpoint that was read from `path`. Raises InputError as `load_model`."""
    header = checkpoint[HEADER_KEY]
    check_writes_text(header, path)
    weights = net_weights(checkpoint)
    other = other_class(header, path)
    if other is None:
        config = model_config(header, path)
        check_weights(config, weights, path)
        check_memory(config)
        net: nn.Module = empty_model(config, device=device)
    else:
        net = _built(other, header["model"], path, build).to(device)
        check_tensors(net, weights, path)
    net.load_state_dict(weights)
    return LoadedCheckpoint(
        path=path,
        net=net.eval(),
        tokenizer=tokenizer_from_state(header["tokenizer"]),
        run_config=header["config"],
        step=int(checkpoint.get("global_step", 0)),
        lineage=lineage_of(checkpoint, path),
        task=task_of(header),
        model={} if other is None else header["model"],
    )


def other_class(header: Mapping[str, Any], path: Path) -> str | None:
    """The class of a checkpoint's model, `mypackage.models.TinyRNN`; None: it is a `GPTModel`.

    Raises InputError for what is no name of a class.
    """
    target = header["model"].get(TARGET)
    if target is None:
        return None
    if not isinstance(target, str) or "." not in target or not target.replace(".", "_").isidentifier():
        raise InputError(f"checkpoint={path} names no class of its model (it is damaged): use another one")
    return target


def _built(target: str, node: Mapping[str, Any], path: Path, build: Build | None) -> nn.Module:
    """The model of another class, with weights of its own, drawn without touching the global generator."""
    if build is None:
        package = target.partition(".")[0]
        raise InputError(
            f"checkpoint={path} holds a {target}, whose code runs only if the package is trusted by name:"
            f" trust=[{package}]"
        )
    with torch.random.fork_rng(devices=[]):
        net = build(node)
    check_language_model(net)
    return net


def task_of(header: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint's model was trained for."""
    return dict(header.get("task", PRETRAIN))


def check_writes_text(header: Mapping[str, Any], path: Path, *, key: str = "checkpoint") -> None:
    """Raises InputError for the checkpoint of a classifier."""
    if task_of(header)["name"] == "classify":
        raise InputError(
            f"{key}={path} is a classifier, which writes no text: use gptpl classify, or give the run that it"
            " began with"
        )


def net_weights(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The model's own tensors of a checkpoint, by the names that they have in the model.

    Those of a training by LoRA are merged: they are a model's without low-rank layers, in fp32.
    """
    weights = trained_weights(checkpoint)
    scale = low_rank_scale(checkpoint[HEADER_KEY].get("tune", ALL))
    return weights if scale is None else merged_weights(weights, scale=scale)


def trained_weights(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The model's tensors as the training had them: base and low-rank matrices apart."""
    return {
        name.removeprefix(NET_PREFIX): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith(NET_PREFIX)
    }


def check_intact(path: Path) -> None:
    """Refuses a checkpoint that is not the one whose SHA-256 stands beside it, if one does."""
    with suppress(FileNotFoundError), whole_one_named(path):
        if reason := verify(path.resolve()):
            raise InputError(f"checkpoint={path} {reason}: use another checkpoint")


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


def check_weights(
    config: GPTConfig,
    weights: dict[str, torch.Tensor],
    path: Path,
    *,
    make: Callable[[GPTConfig], GPTBackbone] = GPTModel,
) -> None:
    """Refuses weights whose names or shapes are not the model's, naming the first that is not.

    No memory is taken, and no more blocks are made than there are weights for.
    """
    check_sharing(weights.values(), f"checkpoint={path}")
    blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    if len(blocks) != config.n_layers:
        raise InputError(
            f"checkpoint={path} holds {len(blocks)} blocks, its own configuration wants n_layers="
            f"{config.n_layers}: the file is not usable, use another checkpoint"
        )
    with torch.device("meta"):
        net = make(config)
    check_tensors(net, weights, path)


def check_tensors(net: nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    """Refuses weights whose names or shapes are not this model's, naming the first that is not."""
    wanted = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    got = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in sorted(wanted.keys() | got.keys()):
        if wanted.get(name) != got.get(name):
            raise InputError(
                f"checkpoint={path} holds {name!r} as {got.get(name, 'nothing')}, its own configuration wants"
                f" {wanted.get(name, 'nothing')}: the file is not usable, use another checkpoint"
            )
