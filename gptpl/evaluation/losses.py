"""How good a model is on texts and on labelled texts, and what a classifier says of other texts."""

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
from torch import Tensor, nn

from gptpl.checkpoints.loading import LoadedClassifier
from gptpl.data.classification.datamodule import LabelledBatch, encode_texts, padded
from gptpl.errors import InputError
from gptpl.files.durable import replacement
from gptpl.model import GPTClassifier, eval_mode
from gptpl.model.loss import IGNORED_TARGET, evaluation_loss, perplexity

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Numbers = NDArray[np.float64]

BINS = 15
"""K, as in Guo et al. 2017, "On Calibration of Modern Neural Networks"."""
CHUNK_BATCHES = 16
"""So many batches of texts are sorted by length together: little padding is left in them."""
FILE_KINDS = (".csv", ".jsonl")

# --- a language model -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a text costs a model: mean nats per token, its exponential, and the number of tokens scored.

    `data` is what was scored, and `context` from what each token was predicted, in words where that is known.
    """

    loss: float
    perplexity: float
    tokens: int
    data: str = ""
    context: str = ""


def evaluate(net: nn.Module, batches: Iterable[Sequence[Any]]) -> Evaluation:
    """Mean next-token loss over all targets of all batches: inputs and targets, each (B, T), come first.

    A row is one text. Targets of -100 are not counted. The model is in evaluation mode meanwhile.
    """
    device = next(net.parameters()).device
    total = count = 0.0
    with torch.inference_mode(), eval_mode(net):
        for inputs, targets, *_ in batches:
            loss, tokens = evaluation_loss(net, inputs.to(device), targets.to(device)).tolist()
            total, count = total + loss, count + tokens
    mean = total / count
    return Evaluation(loss=mean, perplexity=perplexity(mean), tokens=int(count))


# --- a classifier, from sums that batches and processes add up ------------------------------------------


def classification_sums(
    logits: Tensor, labels: Tensor, class_weights: Tensor | None = None
) -> dict[str, Tensor]:
    """Loss (2,), confusion (C, C) and calibration (3, K) of logits (B, C) and labels (B,) int64, in float64.

    The loss is the weighted sum of the cross-entropies in nats, and the sum of the weights: `class_weights`
    (C,), 1 where there are none. Labels of -100 count nowhere.
    """
    wide = _wide(logits)
    weights = torch.ones(logits.shape[1], dtype=wide, device=logits.device)
    if class_weights is not None:
        weights = class_weights.to(weights)
    total = F.cross_entropy(
        logits.to(wide), labels, weight=weights, ignore_index=IGNORED_TARGET, reduction="sum"
    )
    return {
        "loss": torch.stack([total, weights[labels[labels != IGNORED_TARGET]].sum()]),
        "confusion": confusion_sums(logits, labels),
        "calibration": calibration_sums(logits, labels),
    }


def confusion_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """How often class i (row) was taken for class j (column): (C, C); arguments of `classification_sums`."""
    C = logits.shape[1]
    known = labels != IGNORED_TARGET
    cells = labels[known] * C + logits[known].argmax(dim=1)
    return torch.bincount(cells, minlength=C * C).view(C, C).to(_wide(logits))


def calibration_sums(logits: Tensor, labels: Tensor, *, bins: int = BINS) -> Tensor:
    """Of the predictions in each bin of confidence: number, confidences and hits: (3, K).

    The confidence is the probability of the most likely class; bin k holds those in (k/K, (k+1)/K].
    """
    known = labels != IGNORED_TARGET
    confidence, predicted = logits[known].to(_wide(logits)).softmax(dim=1).max(dim=1)
    places = (confidence * bins).ceil().long().sub(1).clamp(min=0, max=bins - 1)
    hits = (predicted == labels[known]).to(confidence.dtype)
    rows = torch.stack([torch.ones_like(confidence), confidence, hits])  # (3, B)
    return torch.zeros(3, bins, dtype=confidence.dtype, device=logits.device).index_add_(1, places, rows)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What the sums say; shares are between 0 and 1."""

    accuracy: float
    f1: tuple[float, ...]
    """Of each class; nan for one that neither occurs nor is predicted."""
    macro_f1: float
    """Mean of those that are not nan."""
    calibration_error: float
    """Expected: by how much confidence and accuracy differ, on average over the predictions, bin by bin."""


def scores(confusion: Numbers, calibration: Numbers) -> Scores:
    """Of a confusion matrix (C, C) and calibration sums (3, K). There must be a prediction."""
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
    """The accuracy in words, beside that of always answering with the most frequent class.

    Of a confusion matrix (C, C), which must not be empty. A lead below two standard errors is hardly one.
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
    """Mean cross-entropy in nats per text (unweighted), scores, and what they were made of."""

    loss: float
    scores: Scores
    texts: int
    confusion: Numbers
    """(C, C), true classes in rows."""
    calibration: Numbers
    """(3, K), see `calibration_sums`."""
    data: str = ""
    """What was classified, in words."""


def evaluate_classifier(net: GPTClassifier, batches: Iterable[LabelledBatch]) -> ClassifierEvaluation:
    """Of all texts of the batches, at least one, in evaluation mode; labels of -100 are not counted."""
    totals: dict[str, Tensor] = {}
    with torch.inference_mode(), eval_mode(net):
        for batch in batches:
            logits = net(batch.tokens.to(net.device), batch.lengths.to(net.device)).float()
            sums = classification_sums(logits, batch.labels.to(net.device))
            totals = {name: totals[name] + one for name, one in sums.items()} if totals else sums
    found = {name: total.cpu().double().numpy() for name, total in totals.items()}
    loss, confusion, calibration = found["loss"], found["confusion"], found["calibration"]
    return ClassifierEvaluation(
        loss=float(loss[0] / loss[1]),
        scores=scores(confusion, calibration),
        texts=int(confusion.sum()),
        confusion=confusion,
        calibration=calibration,
    )


# --- what a classifier says of texts, of which never more than a few are in memory ----------------------


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
    """What the classifier says of each text, in order. Raises InputError for a text without tokens.

    At the end the log says how many texts were longer than what is read of one.
    """
    cut_texts = cut_tokens = 0
    for chunk in _in_parts(texts, batch_size * CHUNK_BATCHES):
        encoded = encode_texts(chunk, loaded.tokenizer)
        read = [tokens[: loaded.max_length] for tokens in encoded]
        order = sorted(range(len(read)), key=lambda i: len(read[i]))
        found: list[tuple[float, ...]] = [()] * len(read)
        for numbers in _in_parts(order, batch_size):
            tokens, lengths = padded(
                [read[i] for i in numbers], pad_id=loaded.pad_id, to_length=loaded.padded_to
            )
            rows = class_logits(loaded.net, tokens, lengths).softmax(dim=1).tolist()
            for i, row in zip(numbers, rows, strict=True):
                found[i] = tuple(row)
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


def class_logits(net: GPTClassifier, tokens: Tensor, lengths: Tensor) -> Tensor:
    """Logits (B, C) in float64 on the CPU, in evaluation mode."""
    with torch.inference_mode(), eval_mode(net):
        return net(tokens.to(net.device), lengths.to(net.device)).cpu().double()


def _in_parts(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """As `itertools.batched` of Python 3.12."""
    iterator = iter(items)
    while part := list(islice(iterator, size)):
        yield part


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
    """What writes predictions into a CSV or JSON Lines file, which appears when all are in it."""
    check_prediction_file(output)
    with replacement(output) as temporary, temporary.open("x", encoding="utf-8", newline="") as file:
        if output.suffix == ".csv":
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(["label", *(f"probability_{label}" for label in labels), "lost_tokens", "text"])
            yield lambda it: rows.writerow([it.label, *it.probabilities, it.lost_tokens, it.text])
        else:
            yield lambda it: file.write(f"{json.dumps(it.record(), ensure_ascii=False)}\n")
