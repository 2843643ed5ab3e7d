"""Benchmarks: what the likelihoods of answers to questions say of a model, as metrics with intervals.

A task gives its questions, and makes metrics of the answers' log-probabilities: a class and a YAML, also a
user's own. `gptpl.evaluation.suite` asks.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from gptpl.checkpoints.loading import LoadedCheckpoint
from gptpl.evaluation.likelihood import ContinuationScore
from gptpl.evaluation.questions import Question, Questions
from gptpl.model.loss import bits_per_byte, perplexity

Values = NDArray[np.float64]
Better = Literal["high", "low", "chance"]
Form = Literal["percent", "signed", "number"]

RESAMPLES = 1000
"""Resampled sets of questions, for an interval."""


# --- metrics --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A figure with its 95 % interval by the percentile bootstrap over questions.

    Of right and wrong answers it is Wilson's, which is honest where all are right, or none; there is none,
    nan, where a statistic is the same for every set of questions.

    Attributes:
        chance: what a model without knowledge gets, where that is known.
        better: which values are better; "chance": what is nearer to it.
        form: how it is shown; "signed" is from -1 to 1.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    chance: float | None = None
    better: Better = "high"
    form: Form = "number"

    @classmethod
    def of(cls, statistic: Callable[[NDArray[np.int64]], float], n: int, **shown: Any) -> Self:
        """That of a statistic of questions, which is given the places of those that it is to count."""
        draw = np.random.default_rng(0)
        resampled = [statistic(draw.integers(n, size=n)) for _ in range(RESAMPLES if n > 1 else 0)]
        known = [each for each in resampled if not math.isnan(each)]
        value = statistic(np.arange(n))
        if len(set(known)) < 2:
            return cls(value=value, **shown)
        low, high = np.percentile(known, [2.5, 97.5])
        return cls(value=value, low=float(low), high=float(high), **shown)

    @classmethod
    def mean(cls, values: Sequence[float] | Values, **shown: Any) -> Self:
        """The mean of a value of each question."""
        numbers = np.asarray(values, dtype=np.float64)
        n, mean = len(numbers), float(numbers.mean())
        if n > 1 and np.isin(numbers, (0.0, 1.0)).all():
            z = 1.96
            middle, half = mean + z * z / 2 / n, z * math.sqrt(mean * (1 - mean) / n + (z / 2 / n) ** 2)
            low, high = ((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
            return cls(value=mean, low=max(0.0, low), high=min(1.0, high), **shown)
        return cls.of(lambda places: float(numbers[places].mean()), n, **shown)


def mean_of_sums(sums: Values) -> float:
    """The mean of one value over all questions, as the statistic of a `Measure`."""
    return float(sums[:, 0].sum() / sums[:, 1].sum())


def cluster_sums(clusters: Sequence[str], columns: Values) -> Values:
    """Sums of values (N, K) over the questions of each cluster, and their number: (clusters, K + 1)."""
    rows = {name: row for row, name in enumerate(dict.fromkeys(clusters))}
    sums = np.zeros((len(rows), columns.shape[1] + 1))
    np.add.at(sums, [rows[name] for name in clusters], np.column_stack([columns, np.ones(len(columns))]))
    return sums


@dataclass(frozen=True, kw_only=True)
class Measure:
    """How a metric is made of values of questions, and shown.

    The interval of a mean over questions without clusters is that of `Metric.mean`; others resample clusters:
    questions that share one are no independent evidence.

    Attributes:
        columns: the names of the values; none: the metric's own name.
        statistic: takes their sums by cluster, a row each, the last column the number of questions.
        chance, better, form: of the `Metric`.
        compared: whether it can be had of each cluster, by which two models are compared.
    """

    columns: tuple[str, ...] = ()
    statistic: Callable[[Values], float] = mean_of_sums
    chance: float | None = None
    better: Better = "high"
    form: Form = "number"
    compared: bool = True

    def metric(self, name: str, questions: Sequence[Question], values: Mapping[str, Values]) -> Metric:
        """The metric with this name."""
        shown = {"chance": self.chance, "better": self.better, "form": self.form}
        columns = [values[column] for column in self.columns or (name,)]
        if self.statistic is mean_of_sums and questions[0].cluster is None:
            return Metric.mean(columns[0], **shown)
        clusters = [each.id if each.cluster is None else each.cluster for each in questions]
        sums = cluster_sums(clusters, np.column_stack(columns))
        return Metric.of(lambda places: self.statistic(sums[places]), len(sums), **shown)


Metrics = Mapping[str, Callable[[], Metric]]
"""Metrics by name, each made when it is called for: an interval takes a thousand resampled sets."""


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """What a task says of a model; `sha256` is that of the questions that were asked.

    Attributes:
        metrics: by name; `primary` is that of tables and comparisons, `grouped` that of groups.
        values: those of the primary metric for each question, by its id, for comparisons.
        clusters: those of questions that have one, by id.
        statistic: which the primary metric is, as that of a `Measure`.
        parts: the values that `statistic` takes, for each question by its id, where they are not `values`.
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
    groups: Mapping[str, tuple[int, Metric]] = field(default_factory=dict)
    grouped: str
    questions: int
    answers: int
    left_out: int = 0
    shortened: int
    seconds: float
    about: "About"
    sha256: str
    clusters: Mapping[str, str] = field(default_factory=dict)
    statistic: Callable[[Values], float] = mean_of_sums
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
        measures: how metrics are made of `values`, by name; without any: means of all of them.
    """

    measures: Mapping[str, Measure] = {}
    primary: str
    grouped: str | None = None
    about: About

    def of_model(self, loaded: LoadedCheckpoint) -> "Task":
        """The task for a model; another one where its questions depend on the model's training."""
        return self

    @abstractmethod
    def questions(self) -> Iterable[Question]:
        """All questions. Raises InputError for data that are missing or damaged."""

    @abstractmethod
    def values(self, question: Question, scores: Sequence[ContinuationScore]) -> Mapping[str, float]:
        """What metrics are made of, for one question, by its answers' scores, in order."""

    def metrics(self, questions: Sequence[Question], values: Mapping[str, Values]) -> Metrics:
        """The metrics of all questions, by default those of `measures`."""
        measures = self.measures or dict.fromkeys(values, Measure())
        return {name: partial(each.metric, name, questions, values) for name, each in measures.items()}


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

    def questions(self) -> Iterable[Question]:
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
            name: partial(Metric.mean, each, chance=chance, form="percent") for name, each in values.items()
        }
        found["bits_per_byte"] = partial(Metric.mean, values["bits_per_byte"], better="low")

        def centred() -> Metric:
            best = found[self.primary]()
            low, value, high = ((each - chance) / (1 - chance) for each in (best.low, best.value, best.high))
            return Metric(value=value, low=low, high=high, chance=0.0, form="percent")

        return found | ({"centred": centred} if chance < 1 else {})


class LastWord(QuestionTask):
    """The only answer of each question: whether greedy decoding gives it, and its perplexity.

    As for LAMBADA (Paperno et al. 2016): `acc`, and `perplexity` of the whole answer.
    """

    primary = "acc"
    measures: Mapping[str, Measure] = {
        "acc": Measure(chance=0.0, form="percent"),
        "perplexity": Measure(
            columns=("nats",), statistic=lambda sums: perplexity(mean_of_sums(sums)), better="low"
        ),
        "bits_per_byte": Measure(better="low"),
    }

    def values(self, question: Question, scores: Sequence[ContinuationScore]) -> Mapping[str, float]:
        """See `Task`."""
        [score] = scores
        return {
            "acc": float(score.is_greedy),
            "nats": -score.log_probability,
            "bits_per_byte": _bits_per_byte(question, scores),
        }


class RightAnswer(LastWord):
    """How likely right answers are, in bits per byte: for data whose answers are free text."""

    primary = "bits_per_byte"


def _bits_per_byte(question: Question, scores: Sequence[ContinuationScore]) -> float:
    if question.gold is None:
        return math.nan
    size = len(question.answers[question.gold][1].strip().encode())
    return bits_per_byte(-scores[question.gold].log_probability, max(1, size))
