"""Classifiers as transformers reads them: a folder of `GPT2ForSequenceClassification`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptpl.errors import InputError
from gptpl.model import GPTClassifier
from gptpl.weights.head_bias import bias_as_shift
from gptpl.weights.hugging_face import (
    CONFIG_FILE,
    PREFIX,
    SCORE,
    TABLE,
    described,
    recognises,
    tensors_of,
    their_config,
    with_prefix,
    write_json,
    write_tensors,
)
from gptpl.weights.model_files import ModelFiles, config_with_record, read_json, read_record
from gptpl.weights.tables import HEAD, Row, Table
from gptpl.weights.transfer import export_tensors

ARCHITECTURE = "GPT2ForSequenceClassification"
FINAL_BIAS = "transformer.ln_f.bias"


@dataclass(frozen=True, kw_only=True)
class ClassifierFiles:
    """What a folder holds: the model's files, and the names of its classes in order."""

    files: ModelFiles
    labels: tuple[str, ...]


def is_classifier(path: Path) -> bool:
    """Whether this is a folder with a classifier of theirs."""
    return path.is_dir() and recognises(path) and ARCHITECTURE in _list(read_json(path / CONFIG_FILE))


def _list(config: Mapping[str, Any]) -> Sequence[Any]:
    found = config.get("architectures")
    return found if isinstance(found, list) else ()


def _table() -> Table:
    rows = tuple(Row(HEAD, (SCORE,)) if row.ours == HEAD else row for row in with_prefix(TABLE, PREFIX).rows)
    return replace(with_prefix(TABLE, PREFIX), rows=rows)


def write_classifier(net: GPTClassifier, folder: Path, *, labels: Sequence[str], pad_id: int) -> None:
    """`config.json` and `model.safetensors`; the logits there are those here.

    transformers reads the logits at the last token that is not `pad_id`: a text that ends with that very
    token is read one token earlier.

    Raises InputError for a classifier that reads the last position, padding or not, and for a bias of the
    head that the final LayerNorm cannot take over.
    """
    if net.classifier.pooling != "last_token":
        raise InputError(
            "format=hf reads a classifier's logits at the last real token, and this one was trained with"
            f" task.pooling={net.classifier.pooling}: train it with task.pooling=last_token"
        )
    bias = net.out_head.bias
    plain = _without_bias(net)
    tensors = export_tensors(plain, _table())
    if bias is not None:
        dtype = tensors[FINAL_BIAS].dtype
        if (shift := bias_as_shift(plain.out_head.weight, bias)) is None:
            raise InputError(
                f"format=hf has no bias in a classifier's head, and that of these {len(bias)} classes does"
                " not fit elsewhere: train it with task.head_bias=false"
            )
        tensors[FINAL_BIAS] = (tensors[FINAL_BIAS].double() + shift).to(dtype)
    stored = write_tensors(tensors, folder)
    config = their_config(net.config, stored, pad_id)
    config |= {
        "architectures": [ARCHITECTURE],
        "id2label": {str(number): label for number, label in enumerate(labels)},
        "label2id": {label: number for number, label in enumerate(labels)},
        "num_labels": len(labels),
        "pad_token_id": pad_id,
        "problem_type": "single_label_classification",
    }
    write_json(folder / CONFIG_FILE, config)


def _without_bias(net: GPTClassifier) -> GPTClassifier:
    """The same layers, the head with no bias; nothing is copied."""
    plain = GPTClassifier.on(net, replace(net.classifier, head_bias=False))
    plain.out_head.weight = net.out_head.weight
    return plain


def open_classifier(path: Path) -> ClassifierFiles:
    """The classifier of a folder. Raises InputError for one that gptpl's cannot be, or that is not whole."""
    where = path / CONFIG_FILE
    content = read_json(where)
    record = read_record(path)
    labels = _labels(content, where)
    return ClassifierFiles(
        files=ModelFiles(
            path=path,
            table=_table(),
            tensors=tensors_of(path),
            config=config_with_record(described(content, where), record, where=where),
            record=record,
        ),
        labels=labels,
    )


def _labels(content: Mapping[str, Any], where: Path) -> tuple[str, ...]:
    if content.get("problem_type") not in (None, "single_label_classification"):
        raise InputError(
            f"{where} says problem_type={content['problem_type']}, gptpl chooses one class of several: use"
            " another model"
        )
    names = content.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})  # what transformers assumes
    wanted = [str(number) for number in range(len(names))] if isinstance(names, dict) else []
    if len(wanted) < 2 or sorted(names, key=str) != sorted(wanted):
        raise InputError(f"{where} has id2label={names!r}, no names of two classes or more: give 0, 1, ...")
    return tuple(str(names[number]) for number in wanted)
