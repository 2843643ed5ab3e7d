"""How good a classifier is, from sums that batches and processes add up: confusion, F1, calibration."""

# B batch, C classes, K bins of confidence

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from gptpl.training.loss import IGNORED_TARGET

BINS = 15
"""K, as in Guo et al. 2017, "On Calibration of Modern Neural Networks"."""

Numbers = NDArray[np.float64]


def classification_loss_sums(logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Weighted sum of the cross-entropies in nats, and sum of the weights: (2,) float64.

    Logits are (B, C), labels (B,) int64, -100 is left out; `class_weights` (C,) are 1 where there are none.
    """
    wide = _wide(logits)
    weights = torch.ones(logits.shape[1], dtype=wide, device=logits.device)
    if class_weights is not None:
        weights = class_weights.to(weights)
    total = F.cross_entropy(
        logits.to(wide), labels, weight=weights, ignore_index=IGNORED_TARGET, reduction="sum"
    )
    return torch.stack([total, weights[labels[labels != IGNORED_TARGET]].sum()])


def confusion_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """How often class i (row) was taken for class j (column): (C, C) float64.

    Logits are (B, C), labels (B,) int64; labels of -100 are not counted.
    """
    C = logits.shape[1]
    known = labels != IGNORED_TARGET
    cells = labels[known] * C + logits[known].argmax(dim=1)
    return torch.bincount(cells, minlength=C * C).view(C, C).to(_wide(logits))


def calibration_sums(logits: Tensor, labels: Tensor, *, bins: int = BINS) -> Tensor:
    """Of the predictions in each bin of confidence: number, confidences and hits: (3, K) float64.

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
    """What the sums say; shares are between 0 and 1.

    Attributes:
        accuracy: share of right predictions.
        f1: of each class, the harmonic mean of precision and recall; nan for one that neither occurs nor is
            predicted.
        macro_f1: mean of those that are not nan.
        calibration_error: expected calibration error: by how much confidence and accuracy differ, on average
            over the predictions, bin by bin.
    """

    accuracy: float
    f1: tuple[float, ...]
    macro_f1: float
    calibration_error: float


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
