"""A classifier rebuilt from what gptpl saved while training it, or from transformers' files."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gptpl.data.tokenizers import Tokenizer, tokenizer_from_state
from gptpl.errors import InputError
from gptpl.model import ClassifierConfig, GPTClassifier, GPTConfig
from gptpl.training.checkpoint import (
    HEADER_KEY,
    check_intact,
    check_weights,
    model_config,
    net_weights,
    read_checkpoint,
    task_of,
)
from gptpl.training.checkpoint_checks import check_classifier_task
from gptpl.training.foreign_checkpoint import foreign_lineage, tokenizer_of
from gptpl.training.lineage import lineage_of
from gptpl.weights.hugging_face import open_classifier
from gptpl.weights.transfer import check_tensors, load_tensors

TASK = "classify"


@dataclass(frozen=True, kw_only=True)
class LoadedClassifier:
    """A classifier rebuilt from a file, in evaluation mode, with what is known of its training."""

    path: Path
    net: GPTClassifier
    tokenizer: Tokenizer
    labels: tuple[str, ...]
    """Names of the classes in the order of the logits."""
    max_length: int
    """Tokens that are read of a text."""
    padded_to: int | None
    """Tokens that every text must be filled up to, as in training; None: padding changes nothing."""
    run_config: dict[str, Any]
    step: int
    lineage: dict[str, Any]

    @property
    def pad_id(self) -> int:
        """The token behind the shorter texts of a batch."""
        return self.tokenizer.eot_id

    @property
    def task(self) -> dict[str, Any]:
        """What a checkpoint says of the task."""
        return task_state(self.net.classifier, self.labels, self.max_length, self.padded_to)


def task_state(
    classifier: ClassifierConfig, labels: tuple[str, ...], max_length: int, padded_to: int | None
) -> dict[str, Any]:
    """Plain data that says which classifier it is."""
    return {
        "name": TASK,
        "labels": list(labels),
        "pooling": classifier.pooling,
        "head_bias": classifier.head_bias,
        "max_length": max_length,
        "padded_to": padded_to,
    }


def is_classifier_checkpoint(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint, as `read_checkpoint` gives it, is a classifier's."""
    return task_of(checkpoint[HEADER_KEY])["name"] == TASK


def load_classifier(path: Path, *, device: str = "cpu") -> LoadedClassifier:
    """Rebuilds classifier and tokenizer from a checkpoint file.

    Raises:
        InputError: as `read_checkpoint`; for a checkpoint of another task; where names or shapes of the
            weights are not the configuration's.
    """
    checkpoint = read_checkpoint(path)
    check_intact(path)
    return classifier_of(checkpoint, path, device=device)


def classifier_of(checkpoint: dict[str, Any], path: Path, *, device: str = "cpu") -> LoadedClassifier:
    """Classifier and tokenizer of a checkpoint that was read from `path`.

    Raises InputError as `load_classifier`.
    """
    header = checkpoint[HEADER_KEY]
    if not is_classifier_checkpoint(checkpoint):
        raise InputError(
            f"checkpoint={path} is a language model, no classifier: train one with gptpl train task=classify"
            f" init=run init.checkpoint={path}"
        )
    state = header["task"]
    check_classifier_task(state, path)
    weights = net_weights(checkpoint)
    classifier = ClassifierConfig(
        n_classes=len(state["labels"]), pooling=state["pooling"], head_bias=state["head_bias"]
    )
    config = model_config(header, path)

    def make(config: GPTConfig) -> GPTClassifier:
        return GPTClassifier(config, classifier)

    check_weights(config, weights, path, make=make)
    with torch.device("meta"):
        net = make(config)
    net = net.to_empty(device=device)
    net.load_state_dict(weights)
    return LoadedClassifier(
        path=path,
        net=net.eval(),
        tokenizer=tokenizer_from_state(header["tokenizer"]),
        labels=tuple(state["labels"]),
        max_length=state["max_length"],
        padded_to=state["padded_to"],
        run_config=header["config"],
        step=int(checkpoint.get("global_step", 0)),
        lineage=lineage_of(checkpoint, path),
    )


def load_foreign_classifier(path: Path, *, device: str = "cpu") -> LoadedClassifier:
    """The classifier of a folder that transformers, or an export of ours, wrote.

    Raises InputError for files that are not whole, and for one whose tokenizer gptpl does not know.
    """
    files, labels = open_classifier(path)
    config = files.config
    assert config is not None
    classifier = ClassifierConfig(n_classes=len(labels), head_bias=False)

    def make(config: GPTConfig) -> GPTClassifier:
        return GPTClassifier(config, classifier)

    check_tensors(config, files.tensors, files.table, make=make)
    tokenizer = tokenizer_of(files, config, None)
    with torch.device("meta"):
        net = make(config)
    net = net.to_empty(device=device)
    load_tensors(net, files.tensors, files.table)
    recorded = files.record.get("task")
    length = recorded.get("max_length") if isinstance(recorded, dict) else None
    return LoadedClassifier(
        path=path,
        net=net.eval(),
        tokenizer=tokenizer,
        labels=labels,
        max_length=length if isinstance(length, int) and length > 0 else config.context_length,
        padded_to=None,
        run_config={},
        step=files.record.get("lineage", {}).get("step", 0),
        lineage=foreign_lineage(files, None),
    )
