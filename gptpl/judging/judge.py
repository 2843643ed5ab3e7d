"""A judge model: what it is asked and how often, on which server, and what it has answered already."""

import hashlib
import json
import logging
import math
import os
import queue
import random
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from gptpl.errors import InputError
from gptpl.files.template import SafeTemplate
from gptpl.judging.client import (
    PROTOCOLS,
    JudgeClient,
    Message,
    Options,
    UnreadableReplyError,
    api_key,
    checked_address,
)
from gptpl.judging.prompts import (
    COMPARISON_FIELDS,
    COMPARISON_PROMPT,
    COMPARISON_REMINDER,
    FIRST,
    PROMPT,
    REMINDER,
    RUBRIC,
    SCORE_FIELDS,
    TIE,
    asked_again,
    conversation,
    parse_score,
    parse_winner,
)
from gptpl.judging.responses import Entry, Pair

log = logging.getLogger(__name__)

Value = TypeVar("Value")
Thing = TypeVar("Thing")
Result = TypeVar("Result")

WIN, LOSS, DRAW = "win", "loss", "tie"
"""Of the first model."""


@dataclass(frozen=True, kw_only=True)
class NoJudge:
    """The scores against the references alone."""


@dataclass(frozen=True, kw_only=True)
class JudgeModel:
    """A model behind an HTTP server, and its prompts; checked when it is made.

    Attributes:
        model: its name on the server.
        protocol: what the server speaks.
        address: http(s) address of the server, without the protocol's path.
        api_key_env: environment variable that holds the key; None: the server wants none.
        temperature, seed, num_ctx, max_tokens, options: see `client.Options`; `options` are its extra ones.
        system: the system message; "" is none.
        rubric: what is good, a field of the templates.
        prompt: Jinja template with `prompts.SCORE_FIELDS`.
        reminder: Jinja template of what is said after a reply that could not be read, the same fields.
        comparison_prompt: Jinja template with `prompts.COMPARISON_FIELDS`.
        comparison_reminder: the reminder of a comparison.
        min_score, max_score: the scale.
        asks: see `Judge`.
        timeout_seconds, retries, backoff_seconds, max_wait_seconds: see `JudgeClient`.
        max_concurrent: questions under way at a time.
    """

    model: str
    protocol: Literal["ollama", "openai"] = "ollama"
    address: str = "http://localhost:11434"
    api_key_env: str | None = None
    temperature: float | None = 0.0
    seed: int | None = 123
    num_ctx: int | None = None
    max_tokens: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    system: str = ""
    rubric: str = RUBRIC
    prompt: str = PROMPT
    reminder: str = REMINDER
    comparison_prompt: str = COMPARISON_PROMPT
    comparison_reminder: str = COMPARISON_REMINDER
    min_score: float = 0
    max_score: float = 100
    asks: int = 3
    timeout_seconds: float = 120
    retries: int = 4
    backoff_seconds: float = 1
    max_wait_seconds: float = 120
    max_concurrent: int = 1

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise InputError(
                f"judge.protocol={self.protocol} is unknown: choose one of {', '.join(PROTOCOLS)}"
            )
        if not self.model.strip():
            raise InputError("judge.model is empty: name a model that the server has")
        if not -math.inf < self.min_score < self.max_score < math.inf:
            raise InputError(
                f"judge.min_score={self.min_score:g} is not below judge.max_score={self.max_score:g}:"
                " give a scale such as 0 to 100"
            )
        for name, lowest in (("asks", 1), ("max_concurrent", 1), ("retries", 0)):
            if getattr(self, name) < lowest:
                raise InputError(f"judge.{name}={getattr(self, name)} is too few: give {lowest} or more")
        if not 0 < self.timeout_seconds < math.inf:
            raise InputError(f"judge.timeout_seconds={self.timeout_seconds:g} is no time: give more than 0")
        for name in ("backoff_seconds", "max_wait_seconds"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"judge.{name}={getattr(self, name):g} is no time: give 0 or more")
        self.score_prompts()
        self.comparison_prompts()
        PROTOCOLS[self.protocol].body(self.model, [], self._options())

    def template(self, key: str, needed: Collection[str] = ()) -> SafeTemplate:
        """One of the four prompts, by its name here. Raises InputError for a template that is wrong."""
        fields = COMPARISON_FIELDS if key.startswith("comparison") else SCORE_FIELDS
        source = getattr(self, key)
        return SafeTemplate(source, name=f"judge.{key}", fields=fields, needed=needed, trim_blocks=True)

    def score_prompts(self) -> tuple[SafeTemplate, SafeTemplate]:
        """The question for a score, and the reminder."""
        return self.template("prompt", ("model_response",)), self.template("reminder")

    def comparison_prompts(self) -> tuple[SafeTemplate, SafeTemplate]:
        """The question which answer is better, and the reminder."""
        both = ("answer_a", "answer_b")
        return self.template("comparison_prompt", both), self.template("comparison_reminder")

    def connected(self, cache: Path | None = None) -> "Judge":
        """The judge, not asked yet; `cache` is the file of its replies, see `ReplyCache`.

        Raises InputError for a wrong address or a missing key.
        """
        protocol = PROTOCOLS[self.protocol]
        client = JudgeClient(
            address=checked_address(self.address, protocol),
            protocol=protocol,
            model=self.model,
            api_key=api_key(self.api_key_env),
            timeout_seconds=self.timeout_seconds,
            retries=self.retries,
            backoff_seconds=self.backoff_seconds,
            max_wait_seconds=self.max_wait_seconds,
        )
        return Judge(client=client, options=self._options(), cache=ReplyCache(cache), asks=self.asks)

    def _options(self) -> Options:
        return Options(
            temperature=self.temperature,
            seed=self.seed,
            num_ctx=self.num_ctx,
            max_tokens=self.max_tokens,
            extra=self.options,
        )


@dataclass(frozen=True)
class Verdict(Generic[Value]):
    """What the judge said of one thing: the value of its last reply, None where none could be read.

    `replies` are all of them, as they came; those that were no reply at all with the reason in brackets.
    """

    value: Value | None
    replies: tuple[str, ...]


@dataclass(kw_only=True)
class Judge:
    """Asks one model, and keeps what it says.

    A question is put up to `asks` times, with a reminder of the form from the second time on, until its reply
    can be read; `asked` counts those put to the server so far, `remembered` those that the cache answered.
    """

    client: JudgeClient
    options: Options
    cache: "ReplyCache"
    asks: int
    asked: int = 0
    remembered: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def verdict(
        self, messages: list[Message], parse: Callable[[str], Value | None], *, reminder: str
    ) -> Verdict[Value]:
        """What `parse` reads from the reply, for any number of threads.

        A reply that is none (no JSON, no text in it) is not kept: the same question is put again.

        Raises InputError as `JudgeClient.reply` does.
        """
        replies: list[str] = []
        for _ in range(self.asks):
            try:
                reply = self._reply(messages)
            except UnreadableReplyError as error:
                replies.append(f"({error})")
                continue
            replies.append(reply)
            value = parse(reply)
            if value is not None:
                return Verdict(value, tuple(replies))
            messages = asked_again(messages, reply, reminder)
        return Verdict(None, tuple(replies))

    def _reply(self, messages: list[Message]) -> str:
        protocol = self.client.protocol
        body = protocol.body(self.client.model, messages, self.options)
        key = question_key(protocol.name, body)
        known = self.cache.get(key)
        with self._lock:
            self.asked += known is None
            self.remembered += known is not None
        if known is not None:
            return known
        reply = self.client.reply(body)
        self.cache.add(key, reply)
        return reply


# ----------------------------------------------------------------------------------------- the whole test set


def judged(
    entries: Sequence[Entry], judge: Judge, settings: JudgeModel
) -> Iterator[tuple[int, Verdict[float]]]:
    """Yields (place, verdict) as the judge answers; a verdict's value is a score, or None.

    The answer is part of what the judge reads: one that is written to sway it may do so.

    Raises InputError where the judge cannot be asked any more.
    """
    prompt, reminder = settings.score_prompts()
    low, high = settings.min_score, settings.max_score
    parse = partial(parse_score, low=low, high=high)

    def score(entry: Entry) -> Verdict[float]:
        fields = {**_texts(entry), "model_response": entry.model_response, "rubric": settings.rubric}
        fields |= {"min_score": f"{low:g}", "max_score": f"{high:g}"}
        messages = conversation(settings.system, prompt.filled(fields))
        return judge.verdict(messages, parse, reminder=reminder.filled(fields))

    return in_threads(entries, score, threads=settings.max_concurrent)


def _texts(entry: Entry) -> dict[str, object]:
    return {"instruction": entry.instruction, "input": entry.input, "output": entry.output}


@dataclass(frozen=True, kw_only=True)
class Preference:
    """What the judge thinks of one pair.

    Attributes:
        result: WIN, LOSS or DRAW of the first model; None where a reply could not be read.
        contradictory: whether the two orders gave different results, which counts as a tie.
        swapped: for each of the `verdicts`, whether the second model's answer came first.
    """

    result: str | None
    contradictory: bool
    swapped: tuple[bool, ...]
    verdicts: tuple[Verdict[str], ...]

    @property
    def points(self) -> float | None:
        """1 for a win, 0.5 for a tie, 0 for a loss: their mean is the win rate."""
        return None if self.result is None else {WIN: 1.0, DRAW: 0.5, LOSS: 0.0}[self.result]


def compared(
    pairs: Sequence[Pair], judge: Judge, settings: JudgeModel, *, seed: int, both_orders: bool
) -> Iterator[tuple[int, Preference]]:
    """Yields (place, preference) as the judge answers.

    Judges prefer what comes first, or second: which answer does is drawn anew for each pair from the seed,
    or each pair is shown in both orders, and a result counts only if both give it.

    Source: Zheng et al. 2023, "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena", 3.4.

    Raises InputError where the judge cannot be asked any more.
    """
    draw = random.Random(seed)
    orders = [(False, True) if both_orders else (draw.random() < 0.5,) for _ in pairs]
    prompt, reminder = settings.comparison_prompts()

    def ask(pair: Pair, swapped: bool) -> Verdict[str]:
        first, second = (pair.second, pair.first) if swapped else (pair.first, pair.second)
        fields = {**_texts(pair.first), "rubric": settings.rubric}
        fields |= {"answer_a": first.model_response, "answer_b": second.model_response}
        messages = conversation(settings.system, prompt.filled(fields))
        return judge.verdict(messages, parse_winner, reminder=reminder.filled(fields))

    def prefer(task: tuple[Pair, tuple[bool, ...]]) -> Preference:
        pair, order = task
        verdicts = tuple(ask(pair, swapped) for swapped in order)
        results = {_result(verdict.value, swapped) for verdict, swapped in zip(verdicts, order, strict=True)}
        contradictory = len(results) > 1 and None not in results
        result = DRAW if contradictory else None if None in results else results.pop()
        return Preference(result=result, contradictory=contradictory, swapped=order, verdicts=verdicts)

    return in_threads(list(zip(pairs, orders, strict=True)), prefer, threads=settings.max_concurrent)


def _result(winner: str | None, swapped: bool) -> str | None:
    if winner is None or winner == TIE:
        return None if winner is None else DRAW
    return WIN if (winner == FIRST) != swapped else LOSS


def in_threads(
    things: Sequence[Thing], work: Callable[[Thing], Result], *, threads: int
) -> Iterator[tuple[int, Result]]:
    """Yields (place, `work(thing)`) as they are ready, with so many under way at a time.

    The first error of `work` is raised here, and no new thing is begun after it, nor after the iterator is
    closed. The threads are daemons: the program ends though a server keeps one of them waiting, which
    `concurrent.futures` would not allow.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    ready: queue.SimpleQueue[tuple[int, Result | None, BaseException | None]] = queue.SimpleQueue()
    stopped = threading.Event()
    for place in range(len(things)):
        waiting.put(place)

    def run() -> None:
        while not stopped.is_set():
            try:
                place = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                ready.put((place, work(things[place]), None))
            except BaseException as error:  # noqa: BLE001 - it is raised below, in the thread that waits for it
                stopped.set()  # here, before another thing is begun
                ready.put((place, None, error))

    for _ in range(min(threads, len(things))):
        threading.Thread(target=run, daemon=True).start()
    try:
        for _ in things:
            place, result, error = ready.get()
            if error is not None:
                raise error
            yield place, result  # type: ignore[misc]
    finally:
        stopped.set()


# ------------------------------------------------------------------------------------------ replies on disk


def question_key(protocol: str, body: Mapping[str, Any]) -> str:
    """SHA-256 of all that a reply depends on: protocol, model, options and the full prompt."""
    text = json.dumps([protocol, body], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


class ReplyCache:
    """Replies by the keys of their questions: a line of JSON each, on disk before `add` returns.

    Lines that cannot be read, such as the last one of a process that was killed, are dropped with a warning;
    the questions are then put again. Threads may share an object. The file at `path` is made by the first
    reply; None: replies are kept in memory only.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._replies: dict[str, str] = {}
        if path is None or not path.exists():
            return
        data = path.read_bytes()
        whole, _, rest = data.rpartition(b"\n")
        damaged = int(bool(rest))
        for line in whole.split(b"\n") if whole else []:
            try:
                found = json.loads(line)
                key, reply = found["key"], found["reply"]
            except (ValueError, LookupError, TypeError, RecursionError):
                key = reply = None
            if isinstance(key, str) and isinstance(reply, str):
                self._replies.setdefault(key, reply)
            else:
                damaged += 1
        if rest:
            os.truncate(path, len(data) - len(rest))  # the next line must not be glued to it
        if damaged:
            lines = "1 damaged line is" if damaged == 1 else f"{damaged} damaged lines are"
            log.warning("%s: %s dropped, and asked for again", path, lines)

    def __len__(self) -> int:
        return len(self._replies)

    def get(self, key: str) -> str | None:
        """The reply; None where the question was never answered."""
        return self._replies.get(key)

    def add(self, key: str, reply: str) -> None:
        """Records a reply; another thread's earlier one to the same question stays."""
        line = json.dumps({"key": key, "reply": reply}) + "\n"
        with self._lock:
            if key in self._replies:
                return
            if self.path is not None:
                # Appending, so that two processes do not overwrite each other.
                with self.path.open("ab") as file:
                    file.write(line.encode("ascii"))
                    file.flush()
                    os.fsync(file.fileno())
            self._replies[key] = reply
