"""Scores of an answer against its reference, and the uncertainty of a mean over a test set."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gptpl.errors import InputError
from gptpl.judging.responses import Answer

TITLES = {
    "exact_match": "exact match",
    "token_f1": "token F1",
    "rouge_l": "ROUGE-L",
    "well_formed": "well-formed",
    "judge": "judge's score",
    "win_rate": "win rate",
}
"""Names of the scores in tables and pictures."""


def reference_scores(answer: Answer, *, markers: Sequence[str]) -> dict[str, float]:
    """Scores of one answer against its reference, each from 0 to 1.

    `exact_match`: 1 if it equals the reference up to case, punctuation, articles and white space (SQuAD;
    Rajpurkar et al. 2016). `token_f1`: harmonic mean of precision and recall of the words, order ignored
    (SQuAD). `rouge_l`: F-measure of the longest common subsequence of words (Lin 2004); ROUGE sees the
    letters a to z and digits only, so it says nothing about texts in other scripts. `well_formed`: 1 if the
    answer is not blank, contains none of the `markers` (texts of the prompt's template), and its entry does
    not have `"well_formed": false`, which marks an answer that the model did not end.
    """
    from torchmetrics.functional.text import rouge_score, squad  # here because the import takes seconds

    text = answer.model_response
    target = {"answers": {"text": [answer.output], "answer_start": [0]}, "id": "0"}
    words = squad({"prediction_text": text, "id": "0"}, target)  # type: ignore[arg-type]
    rouge = rouge_score(text, answer.output, rouge_keys="rougeL")
    ended = answer.fields.get("well_formed") is not False
    return {
        "exact_match": float(words["exact_match"]) / 100,
        "token_f1": float(words["f1"]) / 100,
        "rouge_l": float(rouge["rougeL_fmeasure"]),
        "well_formed": float(ended and bool(text.strip()) and not any(mark in text for mark in markers)),
    }


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean over `count` values, None over none, with its 95 % interval, None for fewer than two."""

    value: float | None
    low: float | None
    high: float | None
    count: int


def bootstrap_mean(values: Sequence[float], *, seed: int, samples: int) -> Mean:
    """The mean with its 95 % interval by the percentile bootstrap of so many resampled sets.

    For two models give the differences of each entry: that is the paired bootstrap. Source: Efron and
    Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13.
    """
    numbers = np.asarray(values, dtype=np.float64)
    n = len(numbers)
    if n < 2:
        return Mean(value=float(numbers[0]) if n else None, low=None, high=None, count=n)
    generator = np.random.default_rng(seed)
    means = [numbers[generator.integers(n, size=n)].mean() for _ in range(samples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Mean(value=float(numbers.mean()), low=float(low), high=float(high), count=n)


def check_bootstrap(*, seed: int, samples: int) -> None:
    """Raise InputError for settings of `bootstrap_mean` that give no interval."""
    if samples < 100:
        raise InputError(f"bootstrap_samples must be at least 100, got {samples}")
    if seed < 0:
        raise InputError(f"seed must be 0 or more, got {seed}")


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p-value of so uneven a split if both outcomes were equally likely."""
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**n)
