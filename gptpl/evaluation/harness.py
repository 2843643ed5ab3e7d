"""Tasks of the LM Evaluation Harness (`lm_eval`), asked in this process; nothing else imports that package.

The harness makes the requests and the metrics, a `Requests` object answers: questions with several answers
are read once (see `gptpl.evaluation.likelihood`), texts are continued by `gptpl.generation`.
"""

import abc
import dataclasses
import hashlib
import itertools
import json
import logging
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import nn

from gptpl.errors import InputError
from gptpl.evaluation.benchmarks import About, Form, Metric, TaskResult, Values
from gptpl.evaluation.continuations import written
from gptpl.evaluation.likelihood import Pair, encode_pair, score_groups
from gptpl.evaluation.suite import Kept, ModelFacts, Progress, Suite, SuiteResult, alone
from gptpl.generation import SamplingRules
from gptpl.model.protocol import context_length
from gptpl.settings import COUNT_OR_NULL, check_limits
from gptpl.text import nearest, shortened
from gptpl.tokenizers import Tokenizer

log = logging.getLogger(__name__)

PRIMARY = ("acc_norm", "acc", "exact_match")
"""A task's primary metric is the first of these that it has, else its own first one."""
NEW_TOKENS = 256
"""The most tokens of a generated text, where the task does not say: as for the harness's own models."""
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_RULES = ("top_k", "top_p", "min_p", "typical_p", "repetition_penalty")
_FRACTIONS = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match")
_REFUSED = {
    "unsafe_code": "runs what a model writes",
    "doc_to_image": "has pictures",
    "doc_to_audio": "has sounds",
}
"""Settings of tasks that are not asked, and what such a task does."""
_KINDS = ("tasks", "groups")  # of what the harness loads by a name


# --- answers to the harness's requests ------------------------------------------------------------------


class Request(Protocol):
    """What is read of the harness's `Instance`: its arguments, task, and number of its document."""

    task_name: str | None
    doc_id: int | None

    @property
    def args(self) -> tuple[Any, ...]:
        """(context, continuation), (text,) or (context, settings of generation)."""


Answers = dict[int, tuple[Any, bool]]
"""By a request's number its answer, and whether the context had no room for its beginning."""
Asked = tuple[Iterable[Answers], int]
"""Answers as they come, and how many times some come."""


class Requests:
    """Answers the three kinds of requests that the harness has, with a model of gptpl.

    Generated texts are drawn by `seed` and their number, where a task draws. In `folder` the answers of every
    task are kept, which the same requests to the model with the hash `sha256` read in place of asking again.

    Attributes:
        seconds: that each task took, over all sessions.
        cut: how many documents of each task lost their beginning, for which the context had no room.
        asked: the hash of each task's requests.
    """

    def __init__(
        self,
        net: nn.Module,
        tokenizer: Tokenizer,
        *,
        batch_tokens: int | None = None,
        seed: int = 0,
        folder: Path | None = None,
        sha256: str = "",
        progress: Progress | None = None,
    ) -> None:
        super().__init__()
        self._net, self._tokenizer = net, tokenizer
        self._batch_tokens, self._seed = batch_tokens, seed
        self._folder, self._sha256, self._progress = folder, sha256, progress
        self.seconds: dict[str, float] = {}
        self.cut: Counter[str] = Counter()
        self.asked: dict[str, str] = {}

    def loglikelihood(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """Each continuation's log-probability in nats, and whether greedy decoding would give it."""
        found = self._answers("loglikelihood", requests, self._score)
        return [(log_p, is_greedy) for log_p, is_greedy in found]  # lists, where they were kept

    def loglikelihood_rolling(self, requests: Sequence[Request]) -> list[float]:
        """The log-probability of each whole text, every token once, in windows as the harness cuts them."""
        return self._answers("loglikelihood_rolling", requests, self._score_texts)

    def generate_until(self, requests: Sequence[Request]) -> list[str]:
        """What follows each context, without the text that ended it; greedy, unless the settings say else."""
        return self._answers(f"generate_until, seed {self._seed}", requests, self._generate)

    def _answers(
        self, kind: str, requests: Sequence[Request], ask: Callable[[Mapping[int, Request]], Asked]
    ) -> list[Any]:
        """Those of every task in turn, in the order of the requests."""
        of_task: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            of_task.setdefault(request.task_name or "task", []).append(number)
        answers: dict[int, Any] = {}
        for task, numbers in of_task.items():
            own = [requests[number] for number in numbers]
            asked = hashlib.sha256(repr((kind, [each.args for each in own])).encode()).hexdigest()
            kept = Kept(self._folder, task, self._sha256, asked)
            missing = {place: each for place, each in enumerate(own) if str(place) not in kept.rows}
            if missing:
                try:
                    found, total = ask(missing)
                except InputError as error:
                    raise InputError(f"{task}: {error}") from error
                rows = ({str(place): answer for place, answer in some.items()} for some in found)
                kept.fill(rows, total=total, progress=self._progress)
            self.seconds[task] = self.seconds.get(task, 0.0) + kept.seconds
            cut = {own[int(place)].doc_id for place, (_, is_cut) in kept.rows.items() if is_cut}
            if cut:
                log.warning("%s: %d documents lost their beginning, too long for the context", task, len(cut))
            self.cut[task] += len(cut)
            answers |= {numbers[int(place)]: value for place, (value, _) in kept.rows.items()}
            self.asked[task] = asked
        return [answers[number] for number in range(len(requests))]

    def _score(self, requests: Mapping[int, Request]) -> Asked:
        # Answers to one document have a beginning in common, unless they stand alone.
        grouped = itertools.groupby(requests, lambda n: (requests[n].doc_id, not requests[n].args[0]))
        groups = [list(group) for _, group in grouped]
        pairs = [[self._pair(*requests[number].args) for number in group] for group in groups]
        scores = score_groups(self._net, pairs, batch_tokens=self._batch_tokens)

        def found() -> Iterator[Answers]:
            for place, own in scores:
                yield {
                    number: ((score.log_probability, score.is_greedy), score.left_out > 0)
                    for number, score in zip(groups[place], own, strict=True)
                }

        return found(), len(groups)

    def _pair(self, context: str, continuation: str) -> Pair:
        before, after = encode_pair(self._tokenizer, context, continuation)
        if not context and len(after) > 1 and after[0] == self._tokenizer.eot_id:
            return after[:1], after[1:]  # as the harness does: a text's own end-of-text is not repeated
        return before, after

    def _score_texts(self, requests: Mapping[int, Request]) -> Asked:
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        C, eot = context_length(self._net), self._tokenizer.eot_id
        parts: list[tuple[int, Pair]] = []
        for number, request in requests.items():
            tokens = self._tokenizer.encode(request.args[0]).tolist()
            windows = get_rolling_token_windows(tokens, eot, C, context_len=1)
            parts += [(number, make_disjoint_window(window)) for window in windows]
        scores = score_groups(self._net, [[part] for _, part in parts], batch_tokens=self._batch_tokens)
        missing = Counter(number for number, _ in parts)

        def found() -> Iterator[Answers]:
            yield {number: (0.0, False) for number in requests if not missing[number]}
            scored: dict[int, list[float]] = {number: [] for number, _ in parts}
            for place, [score] in scores:
                number = parts[place][0]
                scored[number].append(score.log_probability)
                missing[number] -= 1
                yield {} if missing[number] else {number: (sum(scored[number]), False)}

        return found(), len(parts) + 1

    def _generate(self, requests: Mapping[int, Request]) -> Asked:
        of_settings: dict[str, list[int]] = {}
        for number, request in requests.items():
            of_settings.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        asked: list[tuple[dict[int, Sequence[int]], Generation]] = []
        cut = set()
        for numbers in of_settings.values():
            settings = Generation.of(requests[numbers[0]].args[1], self._tokenizer)
            room = context_length(self._net) - settings.max_new_tokens
            if room < 1:
                raise InputError(
                    f"it asks for texts of {settings.max_new_tokens} tokens, the model's context of"
                    f" {context_length(self._net)} has no room for them and a prompt: leave the task out"
                )
            prompts: dict[int, Sequence[int]] = {}
            for number in numbers:
                tokens = self._tokenizer.encode(requests[number].args[0]).tolist()
                prompts[number] = tokens[-room:] or [self._tokenizer.eot_id]
                if len(tokens) > room:
                    cut.add(number)
            asked.append((prompts, settings))

        def found() -> Iterator[Answers]:
            for prompts, settings in asked:
                texts = written(self._net, self._tokenizer, prompts, seed=self._seed, **vars(settings))
                yield from ({number: (each.text, number in cut)} for number, each in texts)

        return found(), len(requests)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """How a task wants a text to be generated."""

    rules: SamplingRules
    stop: tuple[str, ...]
    max_new_tokens: int

    @classmethod
    def of(cls, settings: Mapping[str, Any], tokenizer: Tokenizer) -> "Generation":
        """Of the task's `generation_kwargs`. Raises InputError for one that is unknown.

        Greedy, unless do_sample or a temperature says else. Stop strings that the tokenizer cannot write, and
        so never end a text, are left out.
        """
        given = {name: value for name, value in settings.items() if value is not None}
        until = given.pop("until", ())
        limits = [given.pop(name) for name in _LIMITS if name in given]
        samples, temperature = given.pop("do_sample", None), given.pop("temperature", None)
        if samples is False:
            temperature = 0.0
        elif temperature is None:
            temperature = 1.0 if samples else 0.0
        rules = {name: given.pop(name) for name in _RULES if name in given}
        if rules.get("top_k") == 0:  # Hugging Face's word for all
            del rules["top_k"]
        if given.pop("num_beams", 1) != 1 or given:
            named = ", ".join(sorted(given)) or "num_beams"
            known = ", ".join(["until", "do_sample", "temperature", *_RULES, *_LIMITS])
            raise InputError(f"generation_kwargs has {named}, unknown to gptpl's generation: it has {known}")
        return cls(
            rules=SamplingRules.of({"temperature": float(temperature), **rules}),
            stop=tuple(
                text
                for text in dict.fromkeys([until] if isinstance(until, str) else until)
                if text and text in tokenizer.decode(tokenizer.encode(text).tolist())
            ),
            max_new_tokens=int(limits[0]) if limits else NEW_TOKENS,
        )


# --- the suite ------------------------------------------------------------------------------------------


class Harness(Suite):
    """Tasks of the LM Evaluation Harness by their names in it, also groups and tags of several.

    `include_path` is a folder with the YAML files of further tasks, which may name functions in Python files
    beside them; `num_fewshot` as in the harness, None: as each task says; `limit` the first documents of
    each task; `seed` draws the examples and, where a task draws them, texts. Figures are the harness's own,
    intervals those of gptpl's suites.

    Loading a task runs the Python files that belong to it, the harness's own or those of `include_path`, and
    some of the harness's fetch more: ask for tasks that you trust.
    """

    runs_named_code = True

    def __init__(
        self,
        *,
        tasks: Sequence[str],
        num_fewshot: int | None = None,
        limit: Annotated[int | None, COUNT_OR_NULL] = None,
        include_path: str | None = None,
        seed: int = 1234,
        batch_tokens: Annotated[int | None, COUNT_OR_NULL] = None,
    ) -> None:
        self.names = list(dict.fromkeys(tasks))
        if not self.names:
            raise InputError("suite.tasks is empty: give names of the harness's tasks, such as [hellaswag]")
        if num_fewshot is not None and num_fewshot < 0:
            raise InputError(f"suite.num_fewshot must be 0 or more, or null, got {num_fewshot}")
        self.num_fewshot = num_fewshot
        self.include_path = None if include_path is None else str(Path(include_path).expanduser())
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise InputError(f"suite.include_path={include_path} is not a folder: give one with YAML files")
        check_limits(Harness.__init__, "suite.", limit=limit, batch_tokens=batch_tokens)
        self.tasks, self._questions = {}, {}  # the harness has its own kind, which `run` loads
        self.limit, self.seed, self.batch_tokens = limit, seed, batch_tokens

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
        """See `Suite.run`. Raises InputError for unknown tasks, and those whose data cannot be had, too."""
        facts = model or ModelFacts.of("model", net, tokenizer)
        with _seeded(), alone(folder):
            loaded = self._load()
            from lm_eval.evaluator import evaluate

            lm = harness_model(
                net, tokenizer, batch_tokens=self.batch_tokens, seed=self.seed, folder=folder,
                sha256=facts.sha256, progress=progress,
            )  # fmt: skip
            together: dict[str, Any] = {kind: {} for kind in _KINDS}
            for some, kind in itertools.product(loaded.values(), _KINDS):
                together[kind] |= some[kind]
            found = evaluate(lm, together, limit=self.limit, bootstrap_iters=0)
        results: dict[str, TaskResult] = {}
        for named, some in loaded.items():
            own = {each: _result(task, found, lm) for each, task in some["tasks"].items()}
            group = some["groups"].get(named)
            if group is not None and group.has_aggregation:
                own = {named: _group_result(group, found["results"][named], own)}
            results |= own
        return SuiteResult(suite=name, model=facts, tasks=results)

    def _load(self) -> dict[str, Any]:
        """For each name the harness's tasks and groups, with documents, set up as its own command does it."""
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise InputError(
                "suite=harness needs the LM Evaluation Harness, which is not installed: pip install"
                " 'gptpl[eval]', or 'lm-eval>=0.4.13'"
            ) from error
        all_own = self.include_path is not None  # the harness's own 14,000 take 10 seconds
        manager = TaskManager(include_path=self.include_path, include_defaults=not all_own)
        if all_own and not set(self.names) <= set(manager.all_tasks):
            manager = TaskManager(include_path=self.include_path)
        for name in self.names:
            if name not in manager.all_tasks:
                raise InputError(
                    f"suite.tasks has {name}, no task of the harness or of"
                    f" suite.include_path={self.include_path}{nearest(name, manager.all_tasks)}"
                )
        for name, settings in _settings(manager.task_index, self.names):
            for key, does in _REFUSED.items():
                if settings.get(key) not in (None, False):
                    raise InputError(f"{name} {does}, which suite=harness does not take: leave it out")
        loaded = {name: _loaded(manager, name) for name in self.names}
        tasks = [item for some in loaded.values() for item in some["tasks"].items()]
        names = Counter(name for name, _ in tasks)
        if twice := [name for name, count in names.items() if count > 1]:
            raise InputError(f"suite.tasks has {twice[0]} twice, once in a group: leave one out")
        for name, task in tasks:
            for flag, key in (("UNSAFE_CODE", "unsafe_code"), ("MULTIMODAL", "doc_to_image")):
                if getattr(task, flag, False):  # a class of the harness's own says so itself
                    does = _REFUSED[key]
                    raise InputError(f"{name} {does}, which suite=harness does not take: leave it out")
            own = task.get_config("num_fewshot")
            if self.num_fewshot is not None and own != 0:  # 0 says that a task takes no examples
                task.set_config(key="num_fewshot", value=self.num_fewshot)
            elif own is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=self.seed)
        return loaded


def harness_model(net: nn.Module, tokenizer: Tokenizer, **settings: Any) -> Any:
    """A model of the harness's own kind, for `lm_eval.simple_evaluate(model=...)`; settings of `Requests`."""
    from lm_eval.api.model import LM

    return abc.ABCMeta("GptplModel", (Requests, LM), {})(net, tokenizer, **settings)


def _settings(index: Mapping[str, Any], names: Iterable[Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The settings of all tasks that names stand for, as their YAML files have them: no code is loaded.

    A member of a group may be a name, or settings on top of a name's.
    """
    waiting, seen = list(names), set()
    while waiting:
        member = waiting.pop()
        own = member if isinstance(member, Mapping) else {}
        name = str(own.get("group") or own.get("task") if own else member)
        yield name, own
        entry = index.get(name)
        if isinstance(own.get("task"), list):  # a group that stands in another one
            waiting += own["task"]
        if entry is None or name in seen:
            continue
        seen.add(name)
        settings = entry.cfg or {}
        yield name, settings
        if isinstance(settings.get("task"), list):
            waiting += settings["task"]
        if entry.yaml_path is None:  # a tag has names alone
            waiting += sorted(entry.tags)


def _loaded(manager: Any, name: str) -> Any:
    try:
        return manager.load([name])
    except ConnectionError as error:
        raise InputError(
            f"the data of {name} are not on this machine, and cannot be fetched: run once with a network, or"
            f" give a task with local files by suite.include_path=FOLDER ({shortened(str(error), 200)})"
        ) from error
    except (OSError, ImportError, RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"the harness cannot read {name}: {type(error).__name__}: {shortened(str(error), 200)}"
        ) from error


@contextmanager
def _seeded() -> Iterator[None]:
    """The random numbers of the harness's own command, for tasks that draw; afterwards those from before."""
    before, numpy_before = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(0)
    np.random.seed(1234)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(numpy_before)  # noqa: NPY002


# --- results --------------------------------------------------------------------------------------------


def _result(task: Any, found: Any, lm: Requests) -> TaskResult:
    from lm_eval.api.metrics import mean

    name = task.task_name
    figures, samples = found["results"][name], found["samples"][name]
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    documents = [sample for sample in samples if sample["filter"] == filters[0]]
    chance = None
    if task.OUTPUT_TYPE == "multiple_choice" and not getattr(task, "multiple_target", 0):
        chance = float(np.mean([1 / len(task.doc_to_choice(each["doc"])) for each in documents]))
    metrics: dict[str, Metric] = {}
    values: dict[str, dict[str, float]] = {}
    for key, value in figures.items():
        metric, _, filter = key.partition(",")
        if not filter or metric.endswith("_stderr") or not isinstance(value, int | float | np.number):
            continue
        rows = [each for each in samples if each["filter"] == filter and metric in each]
        items = [each[metric] for each in rows]
        aggregation = task.aggregation().get(metric, mean)
        shown = metric if filter == "none" or len(filters) == 1 else f"{metric},{filter}"
        better = "low" if task.higher_is_better().get(metric) is False else "high"
        known = {"better": better, "chance": chance if metric in ("acc", "acc_norm", "acc_bytes") else None}
        if aggregation is mean:
            values[shown] = {str(each["doc_id"]): float(each[metric]) for each in rows}
            made = Metric.mean(items, **known)
        else:
            made = _resampled(aggregation, items, **known)
        metrics[shown] = dataclasses.replace(made, value=float(value), form=_form(metric))
    if not metrics:
        raise InputError(f"{name} has no metric that is a number: leave it out")
    primary = _primary(metrics)
    shots = found["n-shot"].get(name) or 0
    return TaskResult(
        primary=primary,
        metrics=metrics,
        values=values.get(primary, {}),
        grouped=primary,
        sha256=lm.asked[name],
        questions=len(documents),
        answers=sum(len(each["arguments"]) for each in documents),
        shortened=lm.cut[name],
        seconds=lm.seconds[name],
        about=About(
            source=f"LM Evaluation Harness, {name}, version {task.VERSION}, {shots} examples, data"
            f" {task.dump_config().get('dataset_path')}"
        ),
    )


def _form(metric: str) -> Form:
    return "percent" if metric in _FRACTIONS else "number"


def _resampled(aggregation: Callable[[list[Any]], float], items: list[Any], **known: Any) -> Metric:
    """With an interval, unless items are texts, whose metrics take too long for a thousand sets of them."""
    parts = [part for item in items for part in (item if isinstance(item, tuple | list) else (item,))]
    if all(isinstance(part, int | float | np.number) for part in parts):
        return Metric.of(lambda at: float(aggregation([items[n] for n in at])), len(items), **known)
    return Metric(value=math.nan, **known)


def _group_result(group: Any, figures: Mapping[str, Any], members: Mapping[str, TaskResult]) -> TaskResult:
    """Of a group that has figures: as the harness has them, and those of its tasks beside them."""
    by_size = {each.metric: each.weight_by_size for each in group.aggregate_metric_list}
    metrics: dict[str, Metric] = {}
    for key, value in figures.items():
        metric, _, filter = key.partition(",")
        if metric in by_size and isinstance(value, int | float):
            metrics[metric if filter == "none" else key] = Metric(value=float(value), form=_form(metric))
    if not metrics:
        raise InputError(f"{group.name} has no figure of its own: give its tasks by their names")
    primary = _primary(metrics)
    own = {name: each for name, each in members.items() if primary in each.metrics}
    values = {}
    if all(each.primary == primary and each.values for each in members.values()):
        values = {f"{name} {of}": each.values[of] for name, each in members.items() for of in each.values}
        numbers = np.array(list(values.values()))
        member = np.repeat(np.arange(len(members)), [len(each.values) for each in members.values()])
        weighted = by_size[primary.partition(",")[0]]
        made = Metric.mean(numbers) if weighted else _mean_of_means(numbers, member)
        figure = metrics[primary]
        metrics[primary] = dataclasses.replace(made, value=figure.value, form=figure.form)
    return TaskResult(
        primary=primary,
        metrics=metrics,
        values=values,
        groups={name: (each.questions, each.metrics[primary]) for name, each in own.items()},
        grouped=primary,
        sha256=hashlib.sha256("".join(each.sha256 for each in members.values()).encode()).hexdigest(),
        questions=sum(each.questions for each in members.values()),
        answers=sum(each.answers for each in members.values()),
        shortened=sum(each.shortened for each in members.values()),
        seconds=sum(each.seconds for each in members.values()),
        about=About(source=f"LM Evaluation Harness, {group.name}: {len(members)} tasks"),
    )


def _mean_of_means(values: Values, member: NDArray[np.int64]) -> Metric:
    """Each task counts the same, however many questions it has."""

    def statistic(at: NDArray[np.int64]) -> float:
        sums, counts = (np.bincount(member[at], weights) for weights in (values[at], None))
        return float((sums[counts > 0] / counts[counts > 0]).mean())

    return Metric.of(statistic, len(values))


def _primary(metrics: Iterable[str]) -> str:
    named = list(metrics)
    return next((each for first in PRIMARY for each in named if each.partition(",")[0] == first), named[0])
