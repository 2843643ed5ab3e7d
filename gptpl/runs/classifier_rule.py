"""A filter's rule that asks a classifier."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from gptpl.errors import InputError
from gptpl.evaluation.classifier import class_probabilities
from gptpl.evaluation.suite import weights_sha256
from gptpl.filters import Finding, Rule
from gptpl.runs.loaded import load_classifier
from gptpl.runs.models import Classifier
from gptpl.settings import PROBABILITY, check_limits
from gptpl.text import nearest


@dataclass(frozen=True, kw_only=True)
class ClassifierRule(Rule):
    """Texts to which a classifier gives one of these labels. It judges whole texts, so that a stream waits.

    A text with more tokens than the classifier reads is judged in pieces of as many, each of which begins in
    the middle of the one before; a label is as probable as in the piece where it is most so. One without any
    tokens has no label.

    Attributes:
        checkpoint: a run of task=classify, its checkpoint, adapter or export, or a classifier that is loaded.
        labels: the labels that are findings.
        threshold: the least probability of a label with which it is one.
        device: auto, cpu, cuda or mps, for a classifier that is not loaded yet.

    Raises InputError for files that are not a classifier, for a label that it does not have, and for a
    threshold outside (0, 1).
    """

    checkpoint: str | Path | Classifier | None = None
    labels: Sequence[str] | None = None
    threshold: Annotated[float, PROBABILITY] = 0.5
    action: Literal["withhold", "report"] = "withhold"
    device: str = "cpu"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.action not in ("withhold", "report"):
            raise InputError(
                f"action={self.action}: a classifier judges whole texts, give action=withhold or report"
            )
        check_limits(ClassifierRule, threshold=self.threshold)
        if self.checkpoint is None:
            raise InputError("checkpoint of the filter is not set: give a run of task=classify")
        offered = self.classifier.labels
        if isinstance(self.labels, str) or not self.labels:
            raise InputError(
                f"labels={self.labels} of the filter: give one or more of [{', '.join(offered)}]"
            )
        for label in self.labels:
            if label not in offered:
                raise InputError(
                    f"labels of the filter: the classifier has no {label!r}{nearest(str(label), offered)}; it"
                    f" has {', '.join(offered)}"
                )

    @cached_property
    def classifier(self) -> Classifier:
        """The loaded classifier."""
        if isinstance(self.checkpoint, Classifier):
            return self.checkpoint
        return load_classifier(str(self.checkpoint), device=self.device)

    @property
    def identity(self) -> str:
        """The settings, and the classifier's weights."""
        model = self.classifier
        return f"{self.labels} {self.threshold} {self.action} {weights_sha256(model.net, model.tokenizer)}"

    def find(self, part: str) -> Iterator[Finding]:
        """All of the text, for each label that is probable enough."""
        tokens = self.classifier.tokenizer.encode(part)
        if not len(tokens):
            return
        length = self.classifier.max_length
        step = max(1, length // 2)
        starts = range(0, max(0, len(tokens) - length) + step, step)
        pieces = class_probabilities(self.classifier, [tokens[at : at + length] for at in starts])
        for label, *probabilities in zip(self.classifier.labels, *pieces, strict=True):
            if label in (self.labels or ()) and max(probabilities) >= self.threshold:
                yield Finding(rule=label, start=0, end=len(part))
