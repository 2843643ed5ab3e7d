"""Which of two models answers better, by a judge who does not know which is which."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gptpl.judging.judge import Judge, Verdict
from gptpl.judging.parsing import FIRST, TIE, parse_winner
from gptpl.judging.prompts import conversation
from gptpl.judging.responses import Pair
from gptpl.judging.settings import JudgeModel
from gptpl.judging.threads import in_threads

WIN, LOSS, DRAW = "win", "loss", "tie"
"""Of the first model."""


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
