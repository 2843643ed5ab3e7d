"""How sure a mean over a test set is, and whether one model wins by more than chance."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from gptpl.errors import InputError

_BLOCK_DRAWS = 1 << 20
"""So many draws are made at a time, which bounds the memory."""


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean over entries.

    Attributes:
        value: the mean; None over no entry.
        low, high: ends of the 95 % interval; None over fewer than two entries, which tell nothing of it.
        count: entries.
    """

    value: float | None
    low: float | None
    high: float | None
    count: int


def bootstrap_mean(values: Sequence[float], *, seed: int, samples: int) -> Mean:
    """The mean with its 95 % interval by the percentile bootstrap.

    For the difference of two models give the differences of each entry: that is the paired bootstrap.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13.

    Args:
        values: one for each entry.
        seed: of the draws; the same values and seed give the same interval.
        samples: resampled sets, 10,000 for ends that are steady to about a hundredth of the interval.

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
    """Two-sided p-value of so uneven a split if both were equally likely; ties are left out. Exact.

    1.0 where there is neither a win nor a loss.
    """
    n = wins + losses
    tail = ways = 1  # to have no win or no loss at all
    for k in range(1, min(wins, losses) + 1):
        ways = ways * (n - k + 1) // k  # n choose k
        tail += ways
    return float(min(Fraction(1), Fraction(2 * tail, 2**n)))
