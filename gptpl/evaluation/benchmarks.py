"""Benchmarks: what the likelihoods of answers to questions say of a model, as metrics with intervals.

A task gives its questions, and makes metrics of the answers' log-probabilities: a class and a YAML, also a
user's own. `gptpl.evaluation.suite` asks.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from gptpl.checkpoints.loading import LoadedCheckpoint
from gptpl.evaluation.likelihood import ContinuationScore
from gptpl.evaluation.questions import Question, Questions
from gptpl.model.loss import bits_per_byte, perplexity

Values = NDArray[np.float64]
Form = Literal["percent", "signed", "number"]

RESAMPLES = 1000
"""Resampled sets of questions, for an interval."""


# --- metrics --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A figure with its 95 % interval by the percentile bootstrap over questions.

    Of right and wrong answers it is Wilson's, which is honest where all are right, or none; there is none
    where a statistic is the same for every set of questions.

    Attributes:
        chance: what a model without knowledge gets, where that is known.
        better: which values are better; "chance": what is nearer to it.
        form: how it is shown; "signed" is from -1 to 1.
    """

    value: float
    low: float
    high: float
    chance: float | None = None
    better: Literal["high", "low", "chance"] = "high"
    form: Form = "number"

    @classmethod
    def of(
        cls,
        statistic: Callable[[NDArray[np.int64]], float],
        n: int,
        *,
        chance: float | None = None,
        better: Literal["high", "low", "chance"] = "high",
    ) -> "Metric":
        """That of a statistic of questions, which is given the places of those that it is to count."""
        draw = np.random.default_rng(0)
        resampled = [statistic(draw.integers(n, size=n)) for _ in range(RESAMPLES if n > 1 else 0)]
        known = [each for each in resampled if not math.isnan(each)]
        value = statistic(np.arange(n))
        varies = len(set(known)) > 1
        low, high = np.percentile(known, [2.5, 97.5]) if varies else (math.nan, math.nan)
        return cls(value=value, low=float(low), high=float(high), chance=chance, better=better)

    @classmethod
    def mean(cls, values: Sequence[float] | Values, **known: Any) -> "Metric":
        """The mean of a value of each question."""
        numbers = np.asarray(values, dtype=np.float64)
        n, mean = len(numbers), float(numbers.mean())
        if n > 1 and np.isin(numbers, (0.0, 1.0)).all():
            z = 1.96
            middle, half = mean + z * z / 2 / n, z * math.sqrt(mean * (1 - mean) / n + (z / 2 / n) ** 2)
            low, high = ((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
            return cls(value=mean, low=max(0.0, low), high=min(1.0, high), **known)
        return cls.of(lambda places: float(numbers[places].mean()), n, **known)


def clustered(
    questions: Sequence[Question],
    columns: Sequence[Values],
    statistic: Callable[[Values], float],
    **known: Any,
) -> Metric:
    """The statistic of sums by cluster, one row each: the columns', then the number of questions.

    Its interval resamples clusters: questions that share one are no independent evidence.
    """
    clusters: dict[str | None, int] = {}
    rows = [clusters.setdefault(each.cluster, len(clusters)) for each in questions]
    sums = np.zeros((len(clusters), len(columns) + 1))
    np.add.at(sums, rows, np.column_stack([*columns, np.ones(len(questions))]))

    def resampled(places: NDArray[np.int64]) -> float:
        return statistic(sums[places])

    return Metric.of(resampled, len(clusters), **known)


def clustered_mean(questions: Sequence[Question], values: Values, **known: Any) -> Metric:
    """The mean of a value of each question, its interval over clusters."""
    return clustered(questions, [values], mean_of_sums, **known)


@dataclass(frozen=True, kw_only=True)
class Statistic:
    """A statistic of values of questions, by which two models are compared.

    Attributes:
        columns: the names of the values.
        of: takes their sums by cluster, a row each, the last column the number of questions.
    """

    columns: tuple[str, ...]
    of: Callable[[Values], float]


def mean_of_sums(sums: Values) -> float:
    """The mean of one value over all questions, for `Statistic`."""
    return float(sums[:, 0].sum() / sums[:, 1].sum())


Metrics = Mapping[str, Callable[[], Metric]]
"""Metrics by name, each made when it is called for: an interval takes a thousand resampled sets."""


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """What a task says of a model; `sha256` is that of the questions that were asked.

    Attributes:
        metrics: by name; `primary` is that of tables and comparisons, `grouped` that of groups.
        values: those of the primary metric for each question, by its id, for comparisons.
        clusters: those of questions that have one, by id.
        statistic: of which the primary metric is, where it is no mean of `values`.
        parts: the values that `statistic` takes, for each question by its id.
        groups: the metric of each group of questions, with their number.
        questions, answers: their numbers.
        left_out: questions that were not asked, with an answer longer than the context.
        shortened: questions that lost their beginning, for which the context had no room.
        seconds: that the model took, over all sessions.
        about: what a reader has to know: source, licence, published figures, limits.
    """

    primary: str
    metrics: Mapping[str, Metric]
    values: Mapping[str, float]
    groups: Mapping[str, tuple[int, Metric]]
    grouped: str
    questions: int
    answers: int
    left_out: int
    shortened: int
    seconds: float
    about: "About"
    sha256: str
    clusters: Mapping[str, str] = field(default_factory=dict)
    statistic: Statistic | None = None
    parts: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class About:
    """Of a task: its source, its licence, figures that others published, and what is known to be wrong.

    `published` maps a model to the primary metric of it, or to several, by name.
    """

    source: str = ""
    licence: str = ""
    published: Mapping[str, Mapping[str, float]] | None = None
    limits: str = ""


class Task(ABC):
    """Questions, and metrics of their scores.

    Attributes:
        primary: the metric of tables and comparisons.
        grouped: that of groups; None: the primary one.
        forms: how metrics are shown that are not plain numbers.
    """

    forms: ClassVar[Mapping[str, Form]] = {}
    primary: str
    grouped: str | None = None
    about: About

    def of_model(self, loaded: LoadedCheckpoint) -> "Task":
        """The task for a model; another one where its questions depend on the model's training."""
        return self

    @abstractmethod
    def questions(self) -> list[Question]:
        """All questions. Raises InputError for data that are missing or damaged."""

    @abstractmethod
    def values(self, question: Question, scores: Sequence[ContinuationScore]) -> Mapping[str, float]:
        """What each metric is for one question, by its answers' scores, in order."""

    def statistic(self) -> Statistic | None:
        """What the primary metric is; None: a mean of values of its name, if there are any."""
        return None

    def metrics(self, questions: Sequence[Question], values: Mapping[str, Values]) -> Metrics:
        """The metrics of all questions: by default means of their values."""
        return {name: partial(Metric.mean, each) for name, each in values.items()}


@dataclass(kw_only=True, eq=False)
class QuestionTask(Task):
    """A task with the questions of `data`; the other settings are what it is `about`."""

    data: Questions
    source: str = ""
    licence: str = ""
    published: Mapping[str, Mapping[str, float]] | None = None
    limits: str = ""

    def __post_init__(self) -> None:
        self.about = About(
            source=self.source, licence=self.licence, published=self.published, limits=self.limits
        )

    def questions(self) -> list[Question]:
        """See `Task`."""
        return self.data.read()


@dataclass(kw_only=True, eq=False)
class MultipleChoice(QuestionTask):
    """Which of several answers is the most likely.

    The metrics, each the fraction of questions where the right answer is the most likely: `acc` by its
    log-probability, `acc_norm` per character (as in the LM Evaluation Harness), `acc_per_token`; `centred` is
    the primary one with chance at 0 and perfection at 1 (Li et al. 2024, "DataComp-LM"); `bits_per_byte` are
    those of the right answer, which say something long before a model beats chance.
    """

    forms = dict.fromkeys(("acc", "acc_norm", "acc_per_token", "centred"), "percent")
    metric: Literal["acc", "acc_norm", "acc_per_token"] = "acc"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.primary = self.metric

    def values(self, question: Question, scores: Sequence[ContinuationScore]) -> Mapping[str, float]:
        """See `Task`."""
        log_p = np.array([each.log_probability for each in scores])
        texts = [answer for _, answer in question.answers]
        divisors = {
            "acc": np.ones(len(texts)),
            "acc_norm": np.array([max(1, len(text.removeprefix(" "))) for text in texts]),
            "acc_per_token": np.array([each.tokens for each in scores]),
        }
        right = {name: float(int(np.argmax(log_p / by)) == question.gold) for name, by in divisors.items()}
        return right | {"bits_per_byte": _bits_per_byte(question, scores)}

    def metrics(self, questions: Sequence[Question], values: Mapping[str, Values]) -> Metrics:
        """See `Task`."""
        chance = float(np.mean([1 / len(question.answers) for question in questions]))
        found: dict[str, Callable[[], Metric]] = {
            name: partial(Metric.mean, each, better="low")
            if name == "bits_per_byte"
            else partial(Metric.mean, each, chance=chance)
            for name, each in values.items()
        }

        def centred() -> Metric:
            best = found[self.primary]()
            low, value, high = ((each - chance) / (1 - chance) for each in (best.low, best.value, best.high))
            return Metric(value=value, low=low, high=high, chance=0.0)

        return found | ({"centred": centred} if chance < 1 else {})


class LastWord(QuestionTask):
    """The only answer of each question: whether greedy decoding gives it, and its perplexity.

    As for LAMBADA (Paperno et al. 2016): `acc`, and `perplexity` of the whole answer.
    """

    primary = "acc"
    forms: ClassVar[Mapping[str, Form]] = {"acc": "percent"}

    def values(self, question: Question, scores: Sequence[ContinuationScore]) -> Mapping[str, float]:
        """See `Task`."""
        [score] = scores
        return {
            "acc": float(score.is_greedy),
            "nats": -score.log_probability,
            "bits_per_byte": _bits_per_byte(question, scores),
        }

    def metrics(self, questions: Sequence[Question], values: Mapping[str, Values]) -> Metrics:
        """See `Task`."""
        nats = values["nats"]
        return {
            "acc": partial(Metric.mean, values["acc"], chance=0.0),
            "perplexity": partial(
                Metric.of, lambda at: perplexity(float(nats[at].mean())), len(nats), better="low"
            ),
            "bits_per_byte": partial(Metric.mean, values["bits_per_byte"], better="low"),
        }


class RightAnswer(LastWord):
    """How likely right answers are, in bits per byte: for data whose answers are free text."""

    primary = "bits_per_byte"


def _bits_per_byte(question: Question, scores: Sequence[ContinuationScore]) -> float:
    if question.gold is None:
        return math.nan
    size = len(question.answers[question.gold][1].strip().encode())
    return bits_per_byte(-scores[question.gold].log_probability, max(1, size))
