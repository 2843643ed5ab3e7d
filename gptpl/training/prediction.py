"""What a classifier says of texts: many of them, in their order, and never more than a few in memory."""

# B texts in a batch, C classes

import csv
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from gptpl.data.labelled.datamodule import encode_texts, padded
from gptpl.data.tokenizers import TokenIds
from gptpl.errors import InputError
from gptpl.model import GPTClassifier, eval_mode
from gptpl.training.classifier_checkpoint import LoadedClassifier

log = logging.getLogger(__name__)

T = TypeVar("T")

CHUNK_BATCHES = 16
"""So many batches of texts are sorted by length together: little padding is left in them."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The probabilities of a text's classes, and how many of its tokens were beyond what is read of it."""

    text: str
    labels: tuple[str, ...]
    probabilities: tuple[float, ...]
    lost_tokens: int

    @property
    def label(self) -> str:
        """The most likely class."""
        return self.labels[self.best]

    @property
    def best(self) -> int:
        """The number of the most likely class."""
        return self.probabilities.index(max(self.probabilities))

    def record(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "label": self.label,
            "probabilities": dict(zip(self.labels, self.probabilities, strict=True)),
            "lost_tokens": self.lost_tokens,
            "text": self.text,
        }


def predictions(
    loaded: LoadedClassifier, texts: Iterable[str], *, batch_size: int = 16
) -> Iterator[Prediction]:
    """What the classifier says of each text, in order; texts are taken up a chunk at a time.

    At the end the log says how many texts were longer than what is read of one. Raises InputError for a text
    without tokens.
    """
    cut_texts = cut_tokens = 0
    for chunk in _in_parts(texts, batch_size * CHUNK_BATCHES):
        encoded = encode_texts(chunk, loaded.tokenizer)
        read = [tokens[: loaded.max_length] for tokens in encoded]
        order = sorted(range(len(read)), key=lambda i: len(read[i]))
        found: list[tuple[float, ...]] = [()] * len(read)
        for numbers in _in_parts(order, batch_size):
            rows = class_probabilities(loaded, [read[i] for i in numbers]).tolist()
            for i, row in zip(numbers, rows, strict=True):
                found[i] = tuple(row)
        for text, tokens, row in zip(chunk, encoded, found, strict=True):
            lost = max(0, len(tokens) - loaded.max_length)
            cut_texts, cut_tokens = cut_texts + (lost > 0), cut_tokens + lost
            yield Prediction(text=text, labels=loaded.labels, probabilities=row, lost_tokens=lost)
    if cut_texts:
        log.warning(
            "%s longer than the %s tokens that the classifier reads: %s tokens at the end were not read",
            "1 text is" if cut_texts == 1 else f"{cut_texts:,} texts are",
            *(f"{loaded.max_length:,}", f"{cut_tokens:,}"),
        )


FILE_KINDS = (".csv", ".jsonl")


def check_prediction_file(output: Path) -> None:
    """Raises InputError for a file that predictions cannot be written to."""
    if output.suffix not in FILE_KINDS:
        raise InputError(f"output={output} is no {' or '.join(FILE_KINDS)} file: give one")
    if output.exists():
        raise InputError(f"output={output} is there already: give another file, or remove it")
    if not output.absolute().parent.is_dir():
        raise InputError(f"output={output} cannot be made: its folder does not exist, make it first")


@contextmanager
def prediction_file(output: Path, labels: Sequence[str]) -> Iterator[Callable[[Prediction], object]]:
    """What writes predictions into a CSV or JSON Lines file, which appears when all are in it.

    Raises InputError as `check_prediction_file`.
    """
    check_prediction_file(output)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("x", encoding="utf-8", newline="") as file:
            if output.suffix == ".csv":
                rows = csv.writer(file, lineterminator="\n")
                rows.writerow(["label", *(f"probability_{label}" for label in labels), "lost_tokens", "text"])
                yield lambda it: rows.writerow([it.label, *it.probabilities, it.lost_tokens, it.text])
            else:
                yield lambda it: file.write(f"{json.dumps(it.record(), ensure_ascii=False)}\n")
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)


def class_probabilities(loaded: LoadedClassifier, encoded: Sequence[TokenIds]) -> Tensor:
    """Probabilities (B, C) in float64 of texts that are encoded, and no longer than what is read of one."""
    tokens, lengths = padded(encoded, pad_id=loaded.pad_id, to_length=loaded.padded_to)
    return class_logits(loaded.net, tokens, lengths).softmax(dim=1)


def class_logits(net: GPTClassifier, tokens: Tensor, lengths: Tensor) -> Tensor:
    """Logits (B, C) in float64 on the CPU, in evaluation mode."""
    with torch.inference_mode(), eval_mode(net):
        return net(tokens.to(net.device), lengths.to(net.device)).cpu().double()


def _in_parts(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """As `itertools.batched` of Python 3.12."""
    iterator = iter(items)
    while part := list(islice(iterator, size)):
        yield part
