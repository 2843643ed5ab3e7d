"""Intervals and the sign test against numbers counted by hand."""

import itertools
import math

import numpy as np
import pytest

from gptpl.judging.responses import bootstrap_mean, sign_test


@pytest.mark.parametrize("values", [[0.0, 1.0], [0.0, 3.0, 9.0], [1.0, 2.0, 4.0, 8.0, 16.0]])
def test_the_interval_is_that_of_all_resamples(values):
    every = [np.mean(each) for each in itertools.product(values, repeat=len(values))] * 100
    expected = np.percentile(every, [2.5, 97.5])
    mean = bootstrap_mean(values, seed=0, samples=20_000)
    assert mean.value == pytest.approx(np.mean(values))
    assert mean.count == len(values)
    assert (mean.low, mean.high) == pytest.approx(tuple(expected), abs=0.21)


def test_the_interval_of_many_values_is_that_of_the_normal_distribution():
    values = np.random.default_rng(0).normal(50, 10, 400)
    mean = bootstrap_mean(list(values), seed=1, samples=10_000)
    half = 1.96 * values.std() / math.sqrt(400)
    assert mean.low == pytest.approx(values.mean() - half, abs=0.06)
    assert mean.high == pytest.approx(values.mean() + half, abs=0.06)


def test_the_seed_decides():
    values = list(np.random.default_rng(0).random(50))
    first, same, other = (bootstrap_mean(values, seed=seed, samples=200) for seed in (1, 1, 2))
    assert first == same != other


def test_too_few_values_have_no_interval():
    one, none = (bootstrap_mean(values, seed=0, samples=100) for values in ([3.0], []))
    assert (one.value, one.low, one.high, one.count) == (3.0, None, None, 1)
    assert (none.value, none.low, none.high, none.count) == (None, None, None, 0)


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    [
        (0, 0, 1),
        (1, 0, 1),
        (5, 5, 1),
        (5, 4, 1),
        (9, 1, 22 / 1024),
        (1, 9, 22 / 1024),
        (10, 0, 2 / 1024),
        (8, 2, 112 / 1024),
        (2000, 2000, 1),
    ],
)
def test_the_sign_test_counts(wins, losses, p):
    assert sign_test(wins, losses) == pytest.approx(p, rel=1e-12)
