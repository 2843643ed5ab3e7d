"""Models rebuilt from gptpl's checkpoints and from other programs' files; an earlier run to start from."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gptpl.checkpoints.files import checkpoint_file, write_checkpoint
from gptpl.checkpoints.format import (
    CLASSIFY,
    HEADER_KEY,
    NET_PREFIX,
    check_classifier_task,
    check_same_model,
    check_same_tokenizer,
    check_shapes,
    check_writes_text,
    checkpoint_header,
    describe,
    lineage_of,
    model_config,
    net_weights,
    other_class,
    read_checkpoint,
    read_header,
    task_of,
)
from gptpl.errors import InputError
from gptpl.files.plain import check_sharing
from gptpl.model import ClassifierConfig, GPTBackbone, GPTClassifier, GPTConfig, GPTModel, empty_model
from gptpl.model.protocol import check_language_model
from gptpl.tokenizers import GPT2Tokenizer, Tokenizer, tokenizer_from_state
from gptpl.tokenizers.hugging_face import is_gpt2_vocabulary
from gptpl.weights.adapter import is_adapter
from gptpl.weights.hugging_face import open_classifier
from gptpl.weights.model_files import ModelFiles, state_dict_source, weights_sha256
from gptpl.weights.starting import PublishedWeights, StartingWeights
from gptpl.weights.torch_files import OURS
from gptpl.weights.transfer import check_fits, check_memory, check_tensors, load_tensors

Build = Callable[[Mapping[str, Any]], nn.Module]
"""Builds a model from its description (see `describe`), if its package is trusted."""


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    """A model rebuilt from a file, in evaluation mode, with what is known of its training."""

    path: Path
    net: nn.Module
    tokenizer: Tokenizer
    run_config: dict[str, Any]
    """The settings of its training; empty for other programs' models."""
    step: int
    lineage: dict[str, Any]
    """See `gptpl.checkpoints.format.lineage_of`."""


@dataclass(frozen=True, kw_only=True)
class LoadedCheckpoint(_Loaded):
    """A language model."""

    task: dict[str, Any] = field(default_factory=lambda: task_of({}))
    """What it was trained for, by its `name`, and what is needed to use it."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """The description of a model that is not a `GPTModel`; see `describe`."""


@dataclass(frozen=True, kw_only=True)
class LoadedClassifier(_Loaded):
    """A classifier."""

    net: GPTClassifier
    labels: tuple[str, ...]
    """Names of the classes in the order of the logits."""
    max_length: int
    """Tokens of a text that are read at most."""
    padded_to: int | None
    """Length that every text is padded to, as in training; None: padding makes no difference."""

    @property
    def pad_id(self) -> int:
        """The token that pads the shorter texts of a batch."""
        return self.tokenizer.eot_id

    @property
    def task(self) -> dict[str, Any]:
        """See `classifier_task`."""
        return classifier_task(self.net.classifier, self.labels, self.max_length, self.padded_to)


def classifier_task(
    classifier: ClassifierConfig, labels: tuple[str, ...], max_length: int, padded_to: int | None
) -> dict[str, Any]:
    """A classifier's `task` in a checkpoint, as plain data."""
    return {
        "name": CLASSIFY,
        "labels": list(labels),
        "pooling": classifier.pooling,
        "head_bias": classifier.head_bias,
        "max_length": max_length,
        "padded_to": padded_to,
    }


# --- checkpoints of gptpl -------------------------------------------------------------------------------


def load_model(path: Path | str, *, device: str = "cpu", build: Build | None = None) -> LoadedCheckpoint:
    """Model and tokenizer of a checkpoint file, or of a run folder's last checkpoint.

    A model that is not a `GPTModel` is made by `build`. Raises InputError as `read_checkpoint`, for a
    classifier, for such a model without `build`, and for weights that do not match the configuration.
    """
    path = checkpoint_file(str(path))
    return model_of(read_checkpoint(path), path, device=device, build=build)


def model_of(
    checkpoint: dict[str, Any], path: Path, *, device: str = "cpu", build: Build | None = None
) -> LoadedCheckpoint:
    """As `load_model`, of a checkpoint that was read from `path`."""
    header = checkpoint[HEADER_KEY]
    check_writes_text(header, path)
    weights = net_weights(checkpoint)
    other = other_class(header, path)
    if other is None:
        config = model_config(header, path)
        _check_weights(config, weights, path, make=GPTModel)
        check_memory(config)
        net: nn.Module = empty_model(config, device=device)
    else:
        if build is None:
            raise InputError(
                f"checkpoint={path} holds a {other}, whose code runs only if the package is trusted by name:"
                f" trust=[{other.partition('.')[0]}]"
            )
        with torch.random.fork_rng(devices=[]):  # its class draws weights
            net = build(header["model"])
        check_language_model(net)
        net = net.to(device)
        check_shapes(net, weights, path)
    net.load_state_dict(weights)
    model = {} if other is None else header["model"]
    return LoadedCheckpoint(net=net.eval(), task=task_of(header), model=model, **_past(checkpoint, path))


def load_classifier(path: Path, *, device: str = "cpu") -> LoadedClassifier:
    """Classifier and tokenizer of a checkpoint file; errors as `load_model`."""
    return classifier_of(read_checkpoint(path), path, device=device)


def classifier_of(checkpoint: dict[str, Any], path: Path, *, device: str = "cpu") -> LoadedClassifier:
    """As `load_classifier`, of a checkpoint that was read from `path`."""
    header = checkpoint[HEADER_KEY]
    if task_of(header)["name"] != CLASSIFY:
        raise InputError(
            f"checkpoint={path} is a language model, not a classifier: train one with gptpl train"
            f" task=classify init=run init.checkpoint={path}"
        )
    state = header["task"]
    check_classifier_task(state, path)
    weights = net_weights(checkpoint)
    classifier = ClassifierConfig(
        n_classes=len(state["labels"]), pooling=state["pooling"], head_bias=state["head_bias"]
    )
    config = model_config(header, path)
    _check_weights(config, weights, path, make=partial(GPTClassifier, classifier=classifier))
    net = _empty_classifier(config, classifier, device)
    net.load_state_dict(weights)
    return LoadedClassifier(
        net=net.eval(),
        labels=tuple(state["labels"]),
        max_length=state["max_length"],
        padded_to=state["padded_to"],
        **_past(checkpoint, path),
    )


def _past(checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
    header = checkpoint[HEADER_KEY]
    return {
        "path": path,
        "tokenizer": tokenizer_from_state(header["tokenizer"]),
        "run_config": header["config"],
        "step": int(checkpoint.get("global_step", 0)),
        "lineage": lineage_of(checkpoint, path),
    }


def _check_weights(
    config: GPTConfig,
    weights: dict[str, torch.Tensor],
    path: Path,
    *,
    make: Callable[[GPTConfig], GPTBackbone],
) -> None:
    """As `check_shapes`, before memory is taken, or more blocks are made than there are weights for."""
    check_sharing(weights.values(), f"checkpoint={path}")
    blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    if len(blocks) != config.n_layers:
        raise InputError(
            f"checkpoint={path} holds {len(blocks)} blocks, its own configuration wants n_layers="
            f"{config.n_layers}: use another checkpoint"
        )
    with torch.device("meta"):
        net = make(config)
    check_shapes(net, weights, path)


def _empty_classifier(config: GPTConfig, classifier: ClassifierConfig, device: str) -> GPTClassifier:
    with torch.device("meta"):
        net = GPTClassifier(config, classifier)
    return net.to_empty(device=device)


def write_model(loaded: LoadedCheckpoint, path: Path) -> None:
    """Write a model with its lineage as a checkpoint to use and to start from, but not to resume."""
    header = checkpoint_header(describe(loaded.net, loaded.model), loaded.tokenizer, loaded.run_config)
    weights = {f"{NET_PREFIX}{name}": tensor for name, tensor in loaded.net.state_dict().items()}
    header["lineage"] = loaded.lineage
    write_checkpoint({HEADER_KEY: header, "state_dict": weights, "global_step": loaded.step}, path)


# --- other programs' files ------------------------------------------------------------------------------


def load_foreign(
    files: ModelFiles,
    *,
    config: GPTConfig | None = None,
    tokenizer: Tokenizer | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    start: Mapping[str, Any] | None = None,
) -> LoadedCheckpoint:
    """The model of the files, in that data type; `start` records where they come from.

    `config` and `tokenizer` are for files that do not name theirs. Raises InputError for files that are not
    whole, and for a model or tokenizer that is unknown or given twice.
    """
    if files.config is not None and config is not None:
        raise InputError(f"{files.path} describes its model: leave model= out")
    config = files.config or config
    if config is None:
        raise InputError(
            f"{files.path} holds weights without a model configuration: convert it once, gptpl weights"
            f" convert checkpoint={files.path} model=gpt_124m format=gptpl output=FOLDER, and use that FOLDER"
        )
    try:
        check_tensors(config, files.tensors, files.table)
        tokenizer = _tokenizer_of(files, config, tokenizer)
        check_memory(config)
        net = empty_model(config, device=device, dtype=dtype)
        load_tensors(net, files.tensors, files.table)
    except InputError as error:
        fact, _, remedy = str(error).rpartition(": ")
        if not remedy.startswith("set model."):
            raise
        # No setting changes the model of files that describe it, and only model= that of others.
        described = f"{fact}: restore what describes it, or fetch it again"
        raise InputError(described if files.config else str(error).partition(", or init.")[0]) from error
    return LoadedCheckpoint(net=net.eval(), **_foreign_past(files, tokenizer, start))


def load_published(
    weights: PublishedWeights, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> LoadedCheckpoint:
    """GPT-2 as OpenAI published it, downloaded unless it is in the cache."""
    size = weights.size_for(None)
    files = weights.open(size)
    return load_foreign(files, device=device, dtype=dtype, start=weights.origin(size, files))


def load_foreign_classifier(path: Path, *, device: str = "cpu") -> LoadedClassifier:
    """The classifier of a folder written by transformers or by gptpl's export; errors as `load_foreign`."""
    files, labels = open_classifier(path)
    config = files.config
    assert config is not None
    classifier = ClassifierConfig(n_classes=len(labels), head_bias=False)
    check_tensors(config, files.tensors, files.table, make=partial(GPTClassifier, classifier=classifier))
    tokenizer = _tokenizer_of(files, config, None)
    net = _empty_classifier(config, classifier, device)
    load_tensors(net, files.tensors, files.table)
    task = files.record.get("task")
    length = task.get("max_length") if isinstance(task, dict) else None
    return LoadedClassifier(
        net=net.eval(),
        labels=labels,
        max_length=length if isinstance(length, int) and length > 0 else config.context_length,
        padded_to=None,
        **(_foreign_past(files, tokenizer, None) | {"path": path}),
    )


def _foreign_past(files: ModelFiles, tokenizer: Tokenizer, start: Mapping[str, Any] | None) -> dict[str, Any]:
    """As `_past`: the lineage that an export recorded, or one that begins with the files."""
    lineage = files.record.get("lineage")
    if lineage is None:
        start = start or {
            "init": "file",
            "path": str(files.path.absolute()),
            "format": files.table.format,
            "sha256": weights_sha256(files.path),
        }
        lineage = {"step": 0, "tokens_seen": 0, "data": {}, "losses": {}, "start": dict(start)}
    return {
        "path": files.path,
        "tokenizer": tokenizer,
        "run_config": {},
        "step": lineage.get("step", 0),
        "lineage": dict(lineage),
    }


def _tokenizer_of(files: ModelFiles, config: GPTConfig, given: Tokenizer | None) -> Tokenizer:
    """The tokenizer that the files name, the one given, or GPT-2's if that fits."""
    if files.record:
        if given is not None:
            raise InputError(f"{files.path} names its tokenizer: leave tokenizer= out")
        tokenizer = tokenizer_from_state(files.record["tokenizer"])
    elif given is not None:
        tokenizer = given
    else:
        tokenizer = GPT2Tokenizer()
        check_vocabulary(files.path)
        size = tokenizer.vocab_size
        padded = -(-size // 128) * 128
        if not size <= config.vocab_size <= padded:
            raise InputError(
                f"{files.path} has {config.vocab_size} tokens, and GPT-2's tokenizer {size} (padded: up to"
                f" {padded}): gptpl does not know its tokenizer"
            )
    if config.vocab_size < tokenizer.vocab_size:
        raise InputError(
            f"{files.path} has {config.vocab_size} tokens, the {tokenizer.name} tokenizer"
            f" {tokenizer.vocab_size}: give the tokenizer that it was trained with"
        )
    return tokenizer


def check_vocabulary(path: Path) -> None:
    """Raise InputError if the model's folder holds the files of a tokenizer that is not GPT-2's."""
    folder = path if path.is_dir() else path.parent
    if is_gpt2_vocabulary(folder) is False:
        raise InputError(f"{folder} has another tokenizer than GPT-2's: gptpl cannot use its model")


log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunWeights(StartingWeights):
    """The weights of a gptpl checkpoint; optimizer, schedule and position in the data start from scratch."""

    checkpoint: str | None = None
    """A run's folder (its last checkpoint) or a `.ckpt` file."""
    crop_context: bool = False
    crop_vocabulary: bool = False

    @property
    def file(self) -> Path:
        """The checkpoint's file. Raises InputError if none is given, or an adapter without its base."""
        if self.checkpoint is None:
            raise InputError("init.checkpoint is not set: give init.checkpoint=RUN_FOLDER or FILE.ckpt")
        if is_adapter(Path(self.checkpoint).expanduser()):
            raise InputError(
                f"init.checkpoint={self.checkpoint} is an adapter: add it to its base first, gptpl weights"
                f" convert checkpoint={self.checkpoint} format=gptpl output=FOLDER, and give that FOLDER"
            )
        return checkpoint_file(self.checkpoint, key="init.checkpoint")

    def check(self, config: GPTConfig, tokenizer: Mapping[str, Any]) -> None:
        """See `StartingWeights`."""
        path = self.file
        header = read_header(path)
        check_writes_text(header, path, key="init.checkpoint")
        check_same_tokenizer(header, tokenizer)
        check_fits(
            config,
            model_config(header, path),
            name=f"init.checkpoint={self.checkpoint}: the weights",
            crop=self.crop,
        )

    def load_into(self, net: GPTModel) -> dict[str, Any]:
        """See `StartingWeights`; the run's own lineage is the `parent`."""
        path = self.file
        checkpoint = read_checkpoint(path)
        source = state_dict_source(net_weights(checkpoint), str(path))
        load_tensors(net, source, OURS, crop=self.crop)
        return self._origin(checkpoint, path)

    def fill(
        self, net: nn.Module, built_from: Mapping[str, Any], tokenizer: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See `StartingWeights`; the run's model must have the same class and keywords."""
        path = self.file
        checkpoint = read_checkpoint(path)
        check_same_model(checkpoint[HEADER_KEY], built_from, tokenizer)
        weights = net_weights(checkpoint)
        check_shapes(net, weights, path)
        net.load_state_dict(weights)
        return self._origin(checkpoint, path)

    def _origin(self, checkpoint: Mapping[str, Any], path: Path) -> dict[str, Any]:
        log.info("weights: %s, step %d", path, int(checkpoint.get("global_step", 0)))
        return {
            "init": "run",
            "checkpoint": str(path.resolve()),
            "crop_context": self.crop_context,
            "crop_vocabulary": self.crop_vocabulary,
            "parent": lineage_of(checkpoint, path),
        }
