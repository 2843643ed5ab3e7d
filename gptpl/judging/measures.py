"""What an answer is worth by its reference alone, and how sure a mean over a test set is."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from fractions import Fraction

import numpy as np

from gptpl.errors import InputError
from gptpl.judging.responses import Entry

TITLES = {
    "exact_match": "exact match",
    "token_f1": "token F1",
    "rouge_l": "ROUGE-L",
    "well_formed": "well-formed",
    "judge": "judge's score",
    "win_rate": "win rate",
}
"""How each kind of score is called in tables and pictures."""
_BLOCK_DRAWS = 1 << 20
"""So many draws are made at a time, which bounds the memory."""


@dataclass(frozen=True, kw_only=True)
class ReferenceScores:
    """Scores of one answer, each from 0 to 1.

    Attributes:
        exact_match: 1 where the answer is the reference, but for case, punctuation, articles and white space.
        token_f1: harmonic mean of the shares of words in common, order ignored; of SQuAD, as exact_match.
        rouge_l: F-measure of the longest common subsequence of words.
        well_formed: 1 where the answer is not blank, holds none of the template's markers, and is so by the
            entry's own "well_formed" where it has one: only the program that asked the model knows whether
            the model ended its answer.
    """

    exact_match: float
    token_f1: float
    rouge_l: float
    well_formed: float


def reference_scores(entry: Entry, *, markers: Sequence[str]) -> ReferenceScores:
    """The scores of one answer; all by torchmetrics but `well_formed`.

    `markers` are what only the prompt's template holds, such as "### Instruction". ROUGE sees letters a to z
    and digits alone, so that it says nothing of texts in other scripts; the time of ROUGE-L grows with the
    product of both lengths.

    Sources: Rajpurkar et al. 2016, "SQuAD"; Lin 2004, "ROUGE".
    """
    # Imported here, for it takes seconds.
    from torchmetrics.functional.text import rouge_score, squad

    answer = entry.model_response
    target = {"answers": {"text": [entry.output], "answer_start": [0]}, "id": "0"}
    words = squad({"prediction_text": answer, "id": "0"}, target)  # type: ignore[arg-type]
    rouge = rouge_score(answer, entry.output, rouge_keys="rougeL")
    ended = entry.fields.get("well_formed") is not False
    return ReferenceScores(
        exact_match=float(words["exact_match"]) / 100,
        token_f1=float(words["f1"]) / 100,
        rouge_l=float(rouge["rougeL_fmeasure"]),
        well_formed=float(ended and bool(answer.strip()) and not any(mark in answer for mark in markers)),
    )


def by_name(scores: Sequence[ReferenceScores]) -> dict[str, list[float]]:
    """Every kind of score as a list over the entries."""
    names = [field.name for field in fields(ReferenceScores)]
    return {name: [getattr(each, name) for each in scores] for name in names}


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean over `count` entries, None over none, and its 95 % interval, None over fewer than two."""

    value: float | None
    low: float | None
    high: float | None
    count: int


def bootstrap_mean(values: Sequence[float], *, seed: int, samples: int) -> Mean:
    """The mean with its 95 % interval by the percentile bootstrap.

    The same values and seed give the same interval; 10,000 `samples`, the resampled sets, make its ends
    steady to about a hundredth of it. For the difference of two models give the differences of each entry:
    that is the paired bootstrap.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13.

    Raises InputError for fewer than 100 samples, or a negative seed.
    """
    check_bootstrap(seed=seed, samples=samples)
    numbers = np.asarray(values, dtype=np.float64)
    n = len(numbers)
    if n < 2:
        value = float(numbers[0]) if n else None
        return Mean(value=value, low=None, high=None, count=n)
    generator = np.random.default_rng(seed)
    rows = max(1, _BLOCK_DRAWS // n)
    means = []
    for start in range(0, samples, rows):
        drawn = generator.integers(n, size=(min(rows, samples - start), n))
        means.append(numbers[drawn].mean(axis=1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Mean(value=float(numbers.mean()), low=float(low), high=float(high), count=n)


def check_bootstrap(*, seed: int, samples: int) -> None:
    """Raises InputError as `bootstrap_mean` would: before the work whose mean it is."""
    if samples < 100:
        raise InputError(f"bootstrap_samples={samples} is too few for an interval: give at least 100")
    if seed < 0:
        raise InputError(f"seed={seed} is negative: give 0 or more")


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p-value of so uneven a split if both were equally likely; 1.0 where there is none."""
    n = wins + losses
    tail = ways = 1  # to have no win or no loss at all
    for k in range(1, min(wins, losses) + 1):
        ways = ways * (n - k + 1) // k  # n choose k
        tail += ways
    return float(min(Fraction(1), Fraction(2 * tail, 2**n)))
