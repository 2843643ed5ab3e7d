"""A judge model at work: its questions, its replies, and the file that keeps them."""

import hashlib
import json
import logging
import os
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, Generic, TypeVar

from gptpl.files.durable import append_durably
from gptpl.judging.client import JudgeClient, Message, UnreadableReplyError
from gptpl.judging.responses import Answer
from gptpl.judging.settings import FIRST, TIE, JudgeModel, NoJudge, parse_score, parse_winner
from gptpl.text import count_text

__all__ = ["JudgeModel", "NoJudge"]  # which YAML files written before name here

log = logging.getLogger(__name__)

Value = TypeVar("Value")
Thing = TypeVar("Thing")
Result = TypeVar("Result")

WIN, LOSS, DRAW = "win", "loss", "tie"
"""Of the first model."""
POINTS = {WIN: 1.0, DRAW: 0.5, LOSS: 0.0, None: None}
"""Their mean is the win rate."""


@dataclass(frozen=True)
class Verdict(Generic[Value]):
    """What the judge's last reply says, None if it could not be read, and all replies as they came.

    A reply that does not follow the server's protocol is recorded as its reason in brackets.
    """

    value: Value | None
    replies: tuple[str, ...]

    @property
    def failure(self) -> str | None:
        """The last reply if none could be read, else None."""
        return self.replies[-1] if self.value is None else None


class Judge:
    """A model that is asked, and whose replies are remembered; for any number of threads.

    `asked` counts the questions sent to the server so far, `remembered` those answered from the cache, which
    is a file, see `ReplyCache`. Raises InputError for a wrong address or a missing key.
    """

    def __init__(self, settings: JudgeModel, cache: Path | None = None) -> None:
        self.settings, self.client, self.cache = settings, JudgeClient(settings), ReplyCache(cache)
        self.asked = self.remembered = 0
        self._lock = threading.Lock()

    def verdict(self, prompt: str, parse: Callable[[str], Value | None], *, reminder: str) -> Verdict[Value]:
        """Ask until `parse` can read the reply, at most `asks` times, each time with a reminder of the form.

        A reply that does not follow the protocol is not kept: the same question is asked again. Raises
        InputError as `JudgeClient.reply` does.
        """
        system = self.settings.system
        messages: list[Message] = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": prompt})
        replies: list[str] = []
        for _ in range(self.settings.asks):
            try:
                reply = self._reply(messages)
            except UnreadableReplyError as error:
                replies.append(f"({error})")
                continue
            replies.append(reply)
            if (value := parse(reply)) is not None:
                return Verdict(value, tuple(replies))
            messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": reminder}]
        return Verdict(None, tuple(replies))

    def _reply(self, messages: list[Message]) -> str:
        body = self.client.body(messages)
        key = question_key(self.settings.protocol, body)
        known = self.cache.get(key)
        with self._lock:
            self.asked += known is None
            self.remembered += known is not None
        if known is not None:
            return known
        reply = self.client.reply(body)
        self.cache.add(key, reply)
        return reply


# --- the whole test set ---------------------------------------------------------------------------------


def judged(answers: Sequence[Answer], judge: Judge) -> Iterator[tuple[int, Verdict[float]]]:
    """Yield (index, verdict) as the judge replies; the value of a verdict is a score.

    The judge reads the answer itself, which may be written to influence it. Raises InputError if the judge
    can no longer be asked.
    """
    settings = judge.settings
    prompt, reminder = settings.score_prompts()
    low, high = settings.min_score, settings.max_score
    parse = partial(parse_score, low=low, high=high)

    def score(answer: Answer) -> Verdict[float]:
        fields = _fields(answer, settings) | {"model_response": answer.model_response}
        fields |= {"min_score": f"{low:g}", "max_score": f"{high:g}"}
        return judge.verdict(prompt.filled(fields), parse, reminder=reminder.filled(fields))

    return in_threads(answers, score, threads=settings.max_concurrent)


def _fields(answer: Answer, settings: JudgeModel) -> dict[str, object]:
    """The fields of every prompt."""
    task = {"instruction": answer.instruction, "input": answer.input, "output": answer.output}
    return {**task, "rubric": settings.rubric}


@dataclass(frozen=True, kw_only=True)
class Preference:
    """The judge's opinion of a pair of answers.

    Attributes:
        result: WIN, LOSS or DRAW of the first model; None if a reply could not be read.
        contradictory: whether the winner depended on the order of the answers, which counts as a tie.
        swapped: for each of the `verdicts`, whether the second answer came first.
    """

    result: str | None
    contradictory: bool
    swapped: tuple[bool, ...]
    verdicts: tuple[Verdict[str], ...]

    @property
    def failure(self) -> str | None:
        """As of a verdict, of the first one that has one."""
        return next((each.failure for each in self.verdicts if each.failure is not None), None)


def compared(
    pairs: Sequence[tuple[Answer, Answer]], judge: Judge, *, seed: int, both_orders: bool
) -> Iterator[tuple[int, Preference]]:
    """Yield (index, preference) as the judge replies.

    Judges prefer the first or the second place (Zheng et al. 2023, "Judging LLM-as-a-Judge with MT-Bench and
    Chatbot Arena", 3.4), so the order of each pair is drawn from the seed, or with `both_orders` each pair is
    shown in both. Raises InputError if the judge can no longer be asked.
    """
    draw = random.Random(seed)
    orders = [(False, True) if both_orders else (draw.random() < 0.5,) for _ in pairs]
    prompt, reminder = judge.settings.comparison_prompts()

    def ask(pair: tuple[Answer, Answer], swapped: bool) -> Verdict[str]:
        first, second = reversed(pair) if swapped else pair
        fields = _fields(pair[0], judge.settings)
        fields |= {"answer_a": first.model_response, "answer_b": second.model_response}
        return judge.verdict(prompt.filled(fields), parse_winner, reminder=reminder.filled(fields))

    def prefer(index: int) -> Preference:
        order = orders[index]
        verdicts = tuple(ask(pairs[index], swapped) for swapped in order)
        results = {_result(verdict.value, swapped) for verdict, swapped in zip(verdicts, order, strict=True)}
        contradictory = len(results) > 1 and None not in results
        result = DRAW if contradictory else None if None in results else results.pop()
        return Preference(result=result, contradictory=contradictory, swapped=order, verdicts=verdicts)

    return in_threads(range(len(pairs)), prefer, threads=judge.settings.max_concurrent)


def _result(winner: str | None, swapped: bool) -> str | None:
    """The first model's result, of a verdict on its answer as A, or as B if they were swapped."""
    if winner is None or winner == TIE:
        return None if winner is None else DRAW
    return WIN if (winner == FIRST) != swapped else LOSS


def in_threads(
    things: Sequence[Thing], work: Callable[[Thing], Result], *, threads: int
) -> Iterator[tuple[int, Result]]:
    """Yield (index, `work(thing)`) in the order of completion.

    The first error of `work` is raised here; after it, or when the iterator is closed, no new thing is begun.
    Threads of a ThreadPool are daemons, so the program can end while a server keeps one waiting, unlike those
    of `concurrent.futures`.
    """
    stopped = threading.Event()

    def run(index: int) -> tuple[int, Result]:
        if stopped.is_set():
            raise RuntimeError("the work has been stopped")  # nobody waits for it
        try:
            return index, work(things[index])
        except BaseException:
            stopped.set()
            raise

    pool = ThreadPool(max(1, min(threads, len(things))))
    try:
        yield from pool.imap_unordered(run, range(len(things)))
    finally:
        stopped.set()
        pool.terminate()


# --- replies on disk ------------------------------------------------------------------------------------


def question_key(protocol: str, body: Mapping[str, Any]) -> str:
    """SHA-256 of all that a reply depends on: protocol, model, options and the full prompt."""
    text = json.dumps([protocol, body], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


class ReplyCache:
    """Replies by the keys of their questions: a line of JSON each, on disk before `add` returns.

    Damaged lines, such as the last one of a process that was killed, are dropped with a warning; their
    questions are asked again. Without a path, replies are kept in memory only. Threads may share an object.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._replies: dict[str, str] = {}
        if path is None or not path.exists():
            return
        *lines, rest = path.read_bytes().split(b"\n")
        damaged = int(bool(rest))
        for line in lines:
            try:
                found = json.loads(line)
                key, reply = found["key"], found["reply"]
                if not (isinstance(key, str) and isinstance(reply, str)):
                    raise TypeError(f"{key!r} and {reply!r} must be texts")
                self._replies.setdefault(key, reply)
            except (ValueError, LookupError, TypeError, RecursionError):
                damaged += 1
        if rest:
            os.truncate(path, path.stat().st_size - len(rest))  # so that the next line begins on its own
        if damaged:
            log.warning("%s: %s dropped, to be asked again", path, count_text(damaged, "damaged line"))

    def __len__(self) -> int:
        return len(self._replies)

    def get(self, key: str) -> str | None:
        """The reply; None for a question that was never answered."""
        return self._replies.get(key)

    def add(self, key: str, reply: str) -> None:
        """Record a reply, unless another thread has answered the same question."""
        with self._lock:
            if key in self._replies:
                return
            if self.path is not None:
                append_durably(self.path, json.dumps({"key": key, "reply": reply}) + "\n")
            self._replies[key] = reply
