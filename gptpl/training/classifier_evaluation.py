"""How good a classifier is on labelled texts."""

# C classes, K bins of confidence

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from gptpl.data.labelled.datamodule import LabelledBatch
from gptpl.model import GPTClassifier, eval_mode
from gptpl.training.classification_metrics import (
    Numbers,
    Scores,
    calibration_sums,
    classification_loss_sums,
    confusion_sums,
    scores,
)


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
    """Of all texts of the batches, of which there must be one; labels of -100 are not counted.

    The model is put into evaluation mode for it and gets its mode back.
    """
    totals: list[torch.Tensor] = []
    with torch.inference_mode(), eval_mode(net):
        for batch in batches:
            labels = batch.labels.to(net.device)
            logits = net(batch.tokens.to(net.device), batch.lengths.to(net.device)).float()
            sums = [
                classification_loss_sums(logits, labels),
                confusion_sums(logits, labels),
                calibration_sums(logits, labels),
            ]
            totals = [before + one for before, one in zip(totals, sums, strict=True)] if totals else sums
    loss, confusion, calibration = (total.cpu().double().numpy() for total in totals)
    return ClassifierEvaluation(
        loss=float(loss[0] / loss[1]),
        scores=scores(confusion, calibration),
        texts=int(confusion.sum()),
        confusion=confusion,
        calibration=calibration,
    )
