"""A classifier's scores on labelled texts, and its predictions for other texts."""

# B batch, T time, C classes, K bins of confidence

import csv
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from gptpl.checkpoints.loading import LoadedClassifier
from gptpl.data.classification.datamodule import LabelledBatch, encode_texts, padded
from gptpl.errors import InputError
from gptpl.files.durable import check_new, replacement
from gptpl.model import GPTClassifier, eval_mode
from gptpl.model.loss import IGNORED_TARGET, wide_dtype

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Numbers = NDArray[np.float64]

BINS = 15
"""K, as in Guo et al. 2017, "On Calibration of Modern Neural Networks"."""
CHUNK_BATCHES = 16
"""Batches whose texts are sorted by length together, which leaves little padding in them."""
FILE_KINDS = (".csv", ".jsonl")

# --- scores, from sums that add up over batches and ranks -----------------------------------------------
# torchmetrics' F1 and calibration error would need all predictions at once.


def class_logits(net: GPTClassifier, tokens: Tensor, lengths: Tensor) -> Tensor:
    """Logits (B, C) in float64 on the CPU, in evaluation mode."""
    with torch.inference_mode(), eval_mode(net):
        return net(tokens.to(net.device), lengths.to(net.device)).cpu().double()


def classification_sums(
    logits: Tensor, labels: Tensor, class_weights: Tensor | None = None
) -> dict[str, Tensor]:
    """Sums of logits (B, C) and labels (B,) int64, in float64; labels of -100 are not counted.

    `loss` (2,) is the weighted sum of the cross-entropies in nats, and that of the weights: `class_weights`
    (C,), or 1. `confusion` (C, C) counts predictions, true classes in rows. For `calibration` (3, K), the
    confidence of a prediction is the probability of the most likely class, and bin k holds those in
    (k/K, (k+1)/K]: number of predictions, sum of confidences, number of hits.
    """
    C, wide = logits.shape[1], wide_dtype(logits.device)
    logits = logits.to(wide)
    weights = logits.new_ones(C) if class_weights is None else class_weights.to(logits)
    total = F.cross_entropy(logits, labels, weight=weights, ignore_index=IGNORED_TARGET, reduction="sum")
    known = labels != IGNORED_TARGET
    confidence, predicted = logits[known].softmax(dim=1).max(dim=1)
    bins = (confidence * BINS).ceil().long().sub(1).clamp(min=0, max=BINS - 1)
    hits = (predicted == labels[known]).to(wide)
    rows = torch.stack([torch.ones_like(confidence), confidence, hits])  # (3, B)
    return {
        "loss": torch.stack([total, weights[labels[known]].sum()]),
        "confusion": multiclass_confusion_matrix(predicted, labels[known], C).to(wide),
        "calibration": logits.new_zeros(3, BINS).index_add_(1, bins, rows),
    }


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Fractions between 0 and 1."""

    accuracy: float
    f1: tuple[float, ...]
    """Of each class; nan for one that neither occurs nor is predicted."""
    macro_f1: float
    """Mean of those that are not nan."""
    calibration_error: float
    """Expected: the mean over predictions of the difference between their bin's confidence and accuracy."""


def scores(confusion: Numbers, calibration: Numbers) -> Scores:
    """The scores of a confusion matrix (C, C) and calibration sums (3, K), with one prediction or more."""
    hits = np.diag(confusion)
    occurring = confusion.sum(axis=0) + confusion.sum(axis=1)  # (C,), hits counted twice
    f1 = np.divide(2 * hits, occurring, out=np.full(len(hits), np.nan), where=occurring > 0)
    count, confidence, right = calibration
    return Scores(
        accuracy=float(hits.sum() / confusion.sum()),
        f1=tuple(f1.tolist()),
        macro_f1=float(np.nanmean(f1)),
        calibration_error=float(np.abs(confidence - right).sum() / count.sum()),
    )


def accuracy_text(confusion: Numbers, labels: Sequence[str]) -> str:
    """The accuracy next to that of always predicting the most frequent class.

    It is hardly better if it leads by less than two standard errors. The confusion matrix (C, C) must not be
    empty.
    """
    count = confusion.sum()
    accuracy, most = np.diag(confusion).sum() / count, int(confusion.sum(axis=1).argmax())
    always = confusion[most].sum() / count
    verdict = ""
    if accuracy == always or accuracy < always + 2 * np.sqrt(always * (1 - always) / count):
        verdict = " (hardly better)" if accuracy > always else " (no better)"
    return f"accuracy {100 * accuracy:.2f} %, always {labels[most]!r} would be {100 * always:.2f} %{verdict}"


@dataclass(frozen=True, kw_only=True)
class ClassifierEvaluation:
    """Unweighted mean cross-entropy in nats per text, scores, and what they were computed from."""

    loss: float
    scores: Scores
    texts: int
    confusion: Numbers
    """(C, C), true classes in rows."""
    calibration: Numbers
    """(3, K), see `classification_sums`."""
    data: str = ""
    """What was classified."""


def evaluate_classifier(
    net: GPTClassifier,
    batches: Iterable[LabelledBatch],
    *,
    of_all_ranks: Callable[[Tensor], Tensor] = lambda total: total,
) -> ClassifierEvaluation:
    """Evaluate all texts of the batches, one or more; labels of -100 are not counted.

    `of_all_ranks` sums a tensor over the ranks, where each has its own batches.
    """
    totals: dict[str, Tensor] = {}
    for batch in batches:
        sums = classification_sums(class_logits(net, batch.tokens, batch.lengths), batch.labels)
        totals = {name: totals[name] + one for name, one in sums.items()} if totals else sums
    found = {name: of_all_ranks(total).numpy() for name, total in totals.items()}
    loss, confusion, calibration = found["loss"], found["confusion"], found["calibration"]
    return ClassifierEvaluation(
        loss=float(loss[0] / loss[1]),
        scores=scores(confusion, calibration),
        texts=int(confusion.sum()),
        confusion=confusion,
        calibration=calibration,
    )


# --- predictions for texts, of which only a few are in memory -------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The probabilities of a text's classes, and how many tokens at its end were not read."""

    text: str
    labels: tuple[str, ...]
    probabilities: tuple[float, ...]
    lost_tokens: int

    @property
    def label(self) -> str:
        """The most likely class."""
        return self.labels[self.probabilities.index(max(self.probabilities))]

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
    """The prediction for each text, in order. Raises InputError for a text without tokens.

    At the end a warning says how many texts were longer than the classifier reads.
    """
    cut_texts = cut_tokens = 0
    for chunk in _in_parts(texts, batch_size * CHUNK_BATCHES):
        encoded = encode_texts(chunk, loaded.tokenizer)
        read = [tokens[: loaded.max_length] for tokens in encoded]
        found = class_probabilities(loaded, read, batch_size=batch_size)
        for text, whole, probabilities in zip(chunk, encoded, found, strict=True):
            lost = max(0, len(whole) - loaded.max_length)
            cut_texts, cut_tokens = cut_texts + (lost > 0), cut_tokens + lost
            yield Prediction(text=text, labels=loaded.labels, probabilities=probabilities, lost_tokens=lost)
    if cut_texts:
        log.warning(
            "%s longer than the %s tokens that the classifier reads: %s tokens at the end were not read",
            "1 text is" if cut_texts == 1 else f"{cut_texts:,} texts are",
            *(f"{loaded.max_length:,}", f"{cut_tokens:,}"),
        )


def class_probabilities(
    loaded: LoadedClassifier, texts: Sequence[NDArray[np.uint32]], *, batch_size: int = 16
) -> list[tuple[float, ...]]:
    """The probability of each class for texts of 1 to `max_length` token ids."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found: list[tuple[float, ...]] = [()] * len(texts)
    for numbers in _in_parts(order, batch_size):
        tokens, lengths = padded(
            [texts[i] for i in numbers], pad_id=loaded.pad_id, to_length=loaded.padded_to
        )
        rows = class_logits(loaded.net, tokens, lengths).softmax(dim=1).tolist()
        for i, row in zip(numbers, rows, strict=True):
            found[i] = tuple(row)
    return found


def _in_parts(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """As `itertools.batched` of Python 3.12."""
    iterator = iter(items)
    while part := list(islice(iterator, size)):
        yield part


def check_prediction_file(output: Path) -> None:
    """Raise InputError for a file that predictions cannot be written to."""
    if output.suffix not in FILE_KINDS:
        raise InputError(f"output must be a {' or '.join(FILE_KINDS)} file, got {output}")
    check_new(output)


@contextmanager
def prediction_file(output: Path, labels: Sequence[str]) -> Iterator[Callable[[Prediction], object]]:
    """A function that writes predictions into a CSV or JSON Lines file, which appears when it is complete."""
    check_prediction_file(output)
    with replacement(output) as temporary, temporary.open("x", encoding="utf-8", newline="") as file:
        if output.suffix == ".csv":
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(["label", *(f"probability_{label}" for label in labels), "lost_tokens", "text"])
            yield lambda it: rows.writerow([it.label, *it.probabilities, it.lost_tokens, it.text])
        else:
            yield lambda it: file.write(f"{json.dumps(it.record(), ensure_ascii=False)}\n")
