"""Accuracy, F1 and calibration against torchmetrics, however the examples are divided into batches."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_f1_score,
)

from gptpl.evaluation.classifier import BINS, Scores, accuracy_text, classification_sums, scores


def examples(C: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(101, C, generator=generator)
    labels = torch.randint(0, C, (101,), generator=generator)
    labels[:60] = logits[:60].argmax(1)
    return logits, labels


def summed(logits: Tensor, labels: Tensor, *, batch: int) -> tuple[Tensor, Tensor]:
    sums = [classification_sums(*pair) for pair in zip(logits.split(batch), labels.split(batch), strict=True)]
    confusion, calibration = (
        torch.stack([each[name] for each in sums]).sum(0) for name in ("confusion", "calibration")
    )
    return confusion, calibration


@pytest.mark.parametrize("C", [2, 5])
def test_they_are_torchmetrics(C: int) -> None:
    logits, labels = examples(C, seed=C)
    confusion, calibration = summed(logits, labels, batch=8)
    found = scores(confusion.numpy(), calibration.numpy())
    counted = Counter(zip(labels.tolist(), logits.argmax(1).tolist(), strict=True))
    assert {(i, j): n for (i, j), n in np.ndenumerate(confusion.numpy()) if n} == counted
    assert found.accuracy == pytest.approx(multiclass_accuracy(logits, labels, C, average="micro").item())
    each = multiclass_f1_score(logits, labels, C, average=None)
    assert found.f1 == pytest.approx(each.tolist())
    assert found.macro_f1 == pytest.approx(multiclass_f1_score(logits, labels, C, average="macro").item())
    error = multiclass_calibration_error(logits, labels, C, n_bins=15).item()
    assert found.calibration_error == pytest.approx(error, abs=1e-6)


def test_rows_without_label_are_not_counted() -> None:
    logits, labels = examples(3, seed=0)
    more = torch.cat([logits, torch.randn(7, 3)]), torch.cat([labels, torch.full((7,), -100)])
    expected, found = classification_sums(logits, labels), classification_sums(*more)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    alone = classification_sums(more[0][-7:], more[1][-7:])  # a rank may have no others
    assert not any(total.any() for total in alone.values())


def test_by_hand() -> None:
    # Class 0: 3 of 4 found, 1 wrongly, F1 6/8. Class 1: 1 of 2 found, 1 wrongly, 2/4. Class 2 is absent.
    confusion = np.array([[3.0, 1, 0], [1, 1, 0], [0, 0, 0]])
    # Two bins: 4 predictions with confidence 0.6 of which 3 are right; 2 with 0.9 of which 1 is.
    calibration = np.array([[4.0, 2], [2.4, 1.8], [3, 1]])
    found = scores(confusion, calibration)
    assert math.isnan(found.f1[2])
    assert found == Scores(
        accuracy=4 / 6,
        f1=(0.75, 0.5, found.f1[2]),
        macro_f1=0.625,
        calibration_error=found.calibration_error,
    )
    assert found.calibration_error == pytest.approx((4 * 0.15 + 2 * 0.4) / 6)


def test_a_certain_prediction_is_in_the_last_bin() -> None:
    sums = classification_sums(torch.tensor([[0.0, 200.0]]), torch.tensor([1]))["calibration"]
    assert sums[:, BINS - 1].tolist() == [1, 1, 1]
    assert sums[:, : BINS - 1].sum() == 0


def test_a_prediction_is_in_the_bin_of_its_confidence() -> None:
    for confidence, place in ((0.55, 8), (0.72, 10), (0.91, 13)):
        logits = torch.tensor([[0.0, math.log(confidence / (1 - confidence))]])
        sums = classification_sums(logits, torch.tensor([0]))["calibration"]
        assert sums[0].nonzero().item() == place


@pytest.mark.parametrize(
    ("confusion", "text"),
    [
        ([[90, 0], [9, 1]], "accuracy 91.00 %, always 'ham' would be 90.00 % (hardly better)"),
        ([[90, 0], [10, 0]], "accuracy 90.00 %, always 'ham' would be 90.00 % (no better)"),
        ([[80, 10], [10, 0]], "accuracy 80.00 %, always 'ham' would be 90.00 % (no better)"),
        ([[90, 0], [0, 10]], "accuracy 100.00 %, always 'ham' would be 90.00 %"),
        ([[10, 0], [20, 70]], "accuracy 80.00 %, always 'spam' would be 90.00 % (no better)"),
        ([[5, 0], [0, 0]], "accuracy 100.00 %, always 'ham' would be 100.00 % (no better)"),
    ],
)
def test_the_accuracy_is_compared_with_the_most_frequent_class(confusion: list[list[int]], text: str) -> None:
    assert accuracy_text(np.array(confusion, dtype=np.float64), ["ham", "spam"]) == text
