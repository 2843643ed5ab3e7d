"""Every answer scored, or every pair compared, by a judge model: several questions under way at a time."""

import queue
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from gptpl.judging.judge import Judge, JudgeModel, Verdict
from gptpl.judging.prompts import FIRST, TIE, conversation, parse_score, parse_winner
from gptpl.judging.responses import Entry, Pair

WIN, LOSS, DRAW = "win", "loss", "tie"
"""Of the first model."""
Thing = TypeVar("Thing")
Result = TypeVar("Result")


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
        fields: dict[str, object] = {
            "instruction": entry.instruction,
            "input": entry.input,
            "output": entry.output,
            "model_response": entry.model_response,
            "rubric": settings.rubric,
            "min_score": f"{low:g}",
            "max_score": f"{high:g}",
        }
        messages = conversation(settings.system, prompt.filled(fields))
        return judge.verdict(messages, parse, reminder=reminder.filled(fields))

    return in_threads(entries, score, threads=settings.max_concurrent)


@dataclass(frozen=True, kw_only=True)
class Preference:
    """What the judge thinks of one pair.

    Attributes:
        result: WIN, LOSS or DRAW of the first model; None where a reply could not be read.
        contradictory: whether the two orders gave different results, which counts as a tie.
        swapped: for each time it was asked, whether the second model's answer came first.
        verdicts: the judge's, in the same order.
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
        fields: dict[str, object] = {
            "instruction": pair.first.instruction,
            "input": pair.first.input,
            "output": pair.first.output,
            "answer_a": first.model_response,
            "answer_b": second.model_response,
            "rubric": settings.rubric,
        }
        messages = conversation(settings.system, prompt.filled(fields))
        return judge.verdict(messages, parse_winner, reminder=reminder.filled(fields))

    def prefer(task: tuple[Pair, tuple[bool, ...]]) -> Preference:
        pair, order = task
        return preference(order, [ask(pair, swapped) for swapped in order])

    return in_threads(list(zip(pairs, orders, strict=True)), prefer, threads=settings.max_concurrent)


def preference(swapped: Sequence[bool], verdicts: Sequence[Verdict[str]]) -> Preference:
    """The result of one pair, from what was said of it in each order."""
    results = {_result(verdict.value, other) for verdict, other in zip(verdicts, swapped, strict=True)}
    contradictory = len(results) > 1 and None not in results
    result = DRAW if contradictory else None if None in results else results.pop()
    return Preference(
        result=result, contradictory=contradictory, swapped=tuple(swapped), verdicts=tuple(verdicts)
    )


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
