"""A `Suite` of tasks asks a model all their questions, and measures; two models are compared by questions.

The scores of every question are kept, so that an interrupted evaluation continues.
"""

import copy
import hashlib
import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from gptpl.checkpoints.loading import LoadedCheckpoint
from gptpl.errors import InputError
from gptpl.evaluation.benchmarks import Measure, Metric, Metrics, Task, TaskResult, cluster_sums
from gptpl.evaluation.likelihood import ContinuationScore, Pair, encode_pair, score_groups
from gptpl.evaluation.questions import Question
from gptpl.files.durable import PartialResults, locked_folder
from gptpl.judging.responses import sign_test
from gptpl.model import GPTModel
from gptpl.model.protocol import context_length
from gptpl.settings import COUNT_OR_NULL, check_limits
from gptpl.text import nearest
from gptpl.tokenizers import Tokenizer

Progress = Callable[..., Iterable[Any]]
"""Shows the progress of a loop, called as tqdm is: `progress(iterable, total=..., desc=...)`."""

_KEPT_EVERY = 64  # questions: what an interruption costs at most


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
        # int8 weights are no parameters of torch's.
        known = net.config.n_parameters if isinstance(net, GPTModel) else None
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
        limit: Annotated[int | None, COUNT_OR_NULL] = None,
        seed: int = 0,
        batch_tokens: Annotated[int | None, COUNT_OR_NULL] = None,
    ) -> None:
        for name in only or ():
            if name not in tasks:
                raise InputError(f"suite.only has {name}, no task of this suite{nearest(name, tasks)}")
        check_limits(Suite.__init__, "suite.", limit=limit, batch_tokens=batch_tokens)
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
        if model is not None:
            facts = model
        elif folder is not None:
            facts = ModelFacts.of("model", net, tokenizer)
        else:  # nothing depends on the weights' hash, which takes as long as reading them
            facts = ModelFacts(name="model", parameters=0, step=0, sha256="")
        hashes = {task: self._identity(task) for task in self.tasks}
        whole = {task for task in hashes if folder and _file(folder, task, hashes[task]).is_file()}
        asked = self.check(net, tokenizer, left_out=whole)
        results = {}
        with alone(folder):
            for task, sha256 in hashes.items():
                kept = Kept(folder, task, facts.sha256, sha256)
                if task in asked:
                    missing = {name: pairs for name, pairs in asked[task].items() if name not in kept.rows}
                    answers = self._answers(net, tokenizer, task, missing) if missing else ()
                    kept.fill(answers, total=len(missing), progress=progress)
                questions = [each for each in self.questions(task) if each.id in kept.rows]
                scores = [self._scores(kept.rows[each.id]) for each in questions]
                left_out = len(self.questions(task)) - len(questions)
                results[task] = _result(self.tasks[task], questions, scores, kept, left_out)
        return SuiteResult(suite=name, model=facts, tasks=results)

    def check(
        self, net: nn.Module, tokenizer: Tokenizer, *, left_out: Collection[str] = ()
    ) -> dict[str, dict[str, list[Pair]]]:
        """The tokens of the questions that the model can be asked, by task and id, but for tasks `left_out`.

        Raises InputError for data that are missing, for a question that the tokenizer cannot write, and for a
        task of which no question fits the model's context.
        """
        longest, found = context_length(net), {}
        for task in (each for each in self.tasks if each not in left_out):
            groups = {}
            for question in self.questions(task):
                try:
                    pairs = self._encoded(question, tokenizer)
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
        if task in self._questions:
            return self._questions[task]
        questions = list(self.tasks[task].questions())
        if not questions:
            raise InputError(f"{task} has no questions")
        if repeated := [each for each, n in Counter(q.id for q in questions).items() if n > 1]:
            raise InputError(f"{task} has several questions with the id {repeated[0]}")
        if self.limit is not None and self.limit < len(questions):
            chosen = sorted(random.Random(self.seed).sample(range(len(questions)), self.limit))
            questions = [questions[place] for place in chosen]
        self._questions[task] = questions
        return questions

    # What a suite that asks in another way has of its own.

    def _identity(self, task: str) -> str:
        """The hash of all that the model's answers to a task depend on, but for the model."""
        asked = [(each.id, each.answers) for each in self.questions(task)]
        return hashlib.sha256(repr(asked).encode()).hexdigest()

    def _encoded(self, question: Question, tokenizer: Tokenizer) -> list[Pair]:
        return [
            encode_pair(tokenizer, *answer) if isinstance(answer[0], str) else answer
            for answer in question.answers
        ]

    def _answers(
        self, net: nn.Module, tokenizer: Tokenizer, task: str, asked: Mapping[str, list[Pair]]
    ) -> Iterator[dict[str, Any]]:
        """What the model says to each question, by its id, as plain data to keep."""
        names = list(asked)
        for place, scores in score_groups(net, list(asked.values()), batch_tokens=self.batch_tokens):
            yield {names[place]: [list(astuple(score)) for score in scores]}

    def _scores(self, kept: Any) -> Sequence[Any]:
        """What a task's `values` are made of, from what was kept."""
        return [ContinuationScore(*row) for row in kept]


def alone(folder: Path | None) -> AbstractContextManager[None]:
    """The folder, if there is one, is made, and no other process writes there meanwhile."""
    if folder is None:
        return nullcontext()
    folder.mkdir(parents=True, exist_ok=True)
    return locked_folder(folder)


def _file(folder: Path, task: str, questions: str) -> Path:
    """Where all of a task's scores are; those of an interrupted evaluation are elsewhere."""
    return folder / f"{safe_name(task)}-{questions[:8]}.json"


def safe_name(task: str) -> str:
    """A task's name in names of files."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", task)


class Kept:
    """What a model said to each question, by its name: in memory and, with a `folder`, on disk.

    There it is in `<task>-<first digits of the questions' hash>.json`, which an interrupted evaluation
    completes, and a later one reads.

    Raises InputError for a file that is damaged, or of another model.
    """

    def __init__(self, folder: Path | None, task: str, model: str, questions: str) -> None:
        self.rows: dict[str, Any] = {}
        self.task, self.sha256 = task, questions
        self.seconds = 0.0
        self._new: list[str] = []
        self._partial: PartialResults | None = None
        if folder is None:
            return
        settings = {"model": model, "questions": questions}
        output = _file(folder, task, questions)
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

    def _take(self, rows: Sequence[Any]) -> None:
        for name, said, seconds in rows:
            self.rows[name] = said
            self.seconds += seconds

    def fill(self, answers: Iterable[Mapping[str, Any]], *, total: int, progress: Progress | None) -> None:
        """Add the answers to the remaining questions, as plain data, and finish the file.

        The file is written every `_KEPT_EVERY` answers. Their time counts as `seconds`; errors name the task.
        """
        if progress is not None:
            answers = progress(answers, total=total, desc=self.task)
        self._since = time.monotonic()
        try:
            for some in answers:
                self.rows |= some
                self._new += some
                if len(self._new) >= _KEPT_EVERY:
                    self._write()
        except InputError as error:
            raise InputError(f"{self.task}: {error}") from error
        finally:
            self._write()
        if self._partial is not None:
            self._partial.finish()

    def _write(self) -> None:
        now = time.monotonic()
        took, self._since = now - self._since, now
        self.seconds += took
        if self._partial is not None and self._new:
            each = round(took / len(self._new), 6)
            self._partial.add([[name, self.rows[name], each] for name in self._new])
        self._new = []


def _result(
    task: Task, questions: Sequence[Question], scores: Sequence[Sequence[Any]], kept: Kept, left_out: int
) -> TaskResult:
    rows = [task.values(question, own) for question, own in zip(questions, scores, strict=True)]
    values = {name: np.array([row[name] for row in rows], dtype=np.float64) for name in rows[0]}
    grouped = task.grouped or task.primary

    def metrics(places: Sequence[int]) -> Metrics:
        own = {name: each[list(places)] for name, each in values.items()}
        return task.metrics([questions[place] for place in places], own)

    members: dict[str, list[int]] = {}
    for place, question in enumerate(questions):
        for group in question.groups:
            members.setdefault(group, []).append(place)
    primary, measure = values.get(task.primary, ()), task.measures.get(task.primary, Measure())
    columns = [values[name] for name in measure.columns if measure.compared]
    return TaskResult(
        primary=task.primary,
        metrics={name: made() for name, made in metrics(range(len(questions))).items()},
        values={each.id: float(value) for each, value in zip(questions, primary, strict=False)},
        groups={
            group: (len(members[group]), metrics(members[group])[grouped]()) for group in by_number(members)
        },
        grouped=grouped,
        questions=len(questions),
        answers=sum(map(len, scores)),
        left_out=left_out,
        shortened=sum(any(score.left_out for score in own) for own in scores),
        seconds=kept.seconds,
        about=task.about,
        sha256=kept.sha256,
        clusters={each.id: each.cluster for each in questions if each.cluster is not None},
        statistic=measure.statistic,
        parts={each.id: tuple(own) for each, *own in zip(questions, *columns, strict=True)}
        if columns
        else {},
    )


def by_number(names: Iterable[str]) -> list[str]:
    """Names in order, numbers in them by their value."""
    parts = re.compile(r"(\d+)")
    return sorted(names, key=lambda name: [int(p) if p.isdecimal() else p for p in parts.split(name)])


# --- two models -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Difference(Metric):
    """A task's primary metric of a model less that of another, on the same questions.

    `p` is that of the sign test over questions on which they differ (McNemar's exact test, where a question
    is right or wrong), two-sided; over clusters of questions, where these have them.
    """

    p: float
    questions: int


def difference(result: TaskResult, other: TaskResult) -> Difference:
    """How far one model is from another on the questions that both were asked, with the paired bootstrap.

    A context may have had no room for some. Raises InputError for other questions, and for none in common.
    """
    own, others = (
        each.parts or {name: (value,) for name, value in each.values.items()} for each in (result, other)
    )
    common = [each for each in own if each in others]
    if result.sha256 != other.sha256 or not common:
        raise InputError("the models were not asked the same questions: give the same suite, limit and seed")
    clusters = [result.clusters.get(each, each) for each in common]
    sums, other_sums = (
        cluster_sums(clusters, np.array([values[each] for each in common])) for values in (own, others)
    )

    def gain(places: NDArray[np.int64]) -> float:
        return result.statistic(sums[places]) - result.statistic(other_sums[places])

    of_clusters = [gain(np.array([place])) for place in range(len(sums))]
    p = sign_test(sum(each > 0 for each in of_clusters), sum(each < 0 for each in of_clusters))
    form = result.metrics[result.primary].form
    return Difference.of(gain, len(sums), p=p, questions=len(common), form=form)
