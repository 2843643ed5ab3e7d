"""Text statistics against hand-counted n-grams and a plain BLEU written from its paper."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptpl.errors import InputError
from gptpl.evaluation.statistics import distinct_n, repetition_rate, self_bleu, text_statistics

# Few different tokens: many n-grams in common.
texts = st.lists(st.integers(0, 2), max_size=9)


def windows(ids: list[int], n: int) -> list[str]:
    return [" ".join(map(str, ids[i : i + n])) for i in range(len(ids)) if i + n <= len(ids)]


def plain_bleu_4(candidate: list[int], references: list[list[int]]) -> float:
    """Papineni et al. 2002: clipped precisions, their geometric mean, a penalty for brevity."""
    product = 1.0
    for n in (1, 2, 3, 4):
        counted = Counter(windows(candidate, n))
        clipped = sum(
            min(count, max(windows(reference, n).count(gram) for reference in references))
            for gram, count in counted.items()
        )
        product *= clipped / sum(counted.values())
    closest = min((abs(len(reference) - len(candidate)), len(reference)) for reference in references)[1]
    brevity = 1.0 if len(candidate) >= closest else math.exp(1 - closest / len(candidate))
    return brevity * product**0.25


@pytest.mark.parametrize(
    ("samples", "n", "expected"),
    [
        ([[1, 2, 1, 2]], 1, 2 / 4),
        ([[1, 2, 1, 2]], 2, 2 / 3),  # 12 21 12
        ([[1, 2, 1, 2]], 4, 1),
        ([[1, 2, 3], [2, 3, 4]], 2, 3 / 4),  # 12 23 | 23 34; no pair over the border
        ([[1, 2, 3], [], [7]], 2, 1),
        ([[5] * 10], 3, 1 / 8),
    ],
)
def test_distinct_n_by_hand(samples: list[list[int]], n: int, expected: float) -> None:
    assert distinct_n(samples, n) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("samples", "n", "expected"),
    [
        ([[1, 2, 3, 4, 5]], 4, 0),
        ([[5] * 10], 4, 6 / 7),
        ([[1, 2, 3, 4, 1, 2, 3, 4]], 4, 1 / 5),
        ([[1, 2, 1, 2]], 2, 1 / 3),
        ([[5] * 10, [1, 2, 3, 4, 5]], 4, 3 / 7),  # the mean of 6/7 and 0, not 6 of 9
        ([[5] * 10, [1, 2, 3, 4]], 4, 3 / 7),
        ([[5] * 10, [5, 5, 5], []], 4, 6 / 7),  # too short to count
    ],
)
def test_repetition_rate_by_hand(samples: list[list[int]], n: int, expected: float) -> None:
    assert repetition_rate(samples, n) == pytest.approx(expected)


def test_repetition_is_of_4_grams() -> None:
    assert repetition_rate([[1, 2, 3, 1, 2, 3]]) == 0
    assert repetition_rate([[1, 2, 3, 1, 2, 3, 1]]) == pytest.approx(1 / 4)


@given(samples=st.lists(texts, max_size=4), n=st.integers(1, 4))
def test_shares_of_ngrams_are_those_of_all_windows(samples: list[list[int]], n: int) -> None:
    grams = [windows(ids, n) for ids in samples]
    every = [gram for of_one in grams for gram in of_one]
    distinct = len(set(every)) / len(every) if every else math.nan
    rates = [1 - len(set(of_one)) / len(of_one) for of_one in grams if of_one]
    repetition = sum(rates) / len(rates) if rates else math.nan
    assert distinct_n(samples, n) == pytest.approx(distinct, nan_ok=True)
    assert repetition_rate(samples, n) == pytest.approx(repetition, nan_ok=True)


def test_self_bleu_of_the_same_text_is_1_and_of_strange_ones_0() -> None:
    assert self_bleu([[1, 2, 3, 4, 5]] * 3) == 1
    assert self_bleu([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [11, 12, 13, 14]]) == 0
    assert self_bleu([[1, 2, 3, 4], [4, 3, 2, 1]], n=1) == 1
    assert self_bleu([[1, 2, 3, 4], [4, 3, 2, 1]]) == 0


def test_self_bleu_by_hand() -> None:
    one_token_differs = [[1, 2, 3, 4, 5], [1, 2, 3, 4, 6]]
    assert self_bleu(one_token_differs) == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    half = [[1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7, 8]]
    too_short, long = math.exp(1 - 8 / 4), (4 / 8 * 3 / 7 * 2 / 6 * 1 / 5) ** 0.25
    assert self_bleu(half) == pytest.approx((too_short + long) / 2)
    assert self_bleu(half, n=2) == pytest.approx((too_short + (4 / 8 * 3 / 7) ** 0.5) / 2)


@given(samples=st.lists(texts.filter(lambda ids: len(ids) >= 4), min_size=2, max_size=4))
def test_self_bleu_is_the_mean_of_a_plain_one(samples: list[list[int]]) -> None:
    scores = [plain_bleu_4(ids, samples[:i] + samples[i + 1 :]) for i, ids in enumerate(samples)]
    assert self_bleu(samples) == pytest.approx(sum(scores) / len(scores), rel=1e-5, abs=1e-6)


def test_self_bleu_does_not_depend_on_the_order() -> None:
    samples = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4]]  # 4 and 8 are as close to 6
    assert self_bleu(samples) == self_bleu(samples[::-1])


def test_samples_too_short_for_self_bleu_take_no_part() -> None:
    samples = [[1, 2, 3, 4, 5], [1, 2, 3, 4, 6]]
    assert self_bleu([[], *samples, [1, 2, 3]]) == self_bleu(samples)
    assert math.isnan(self_bleu([samples[0], [], [1, 2, 3]]))


def test_text_statistics_by_hand() -> None:
    samples = [[1, 2, 1, 2, 1, 2], [1, 2, 1, 2, 1, 2], []]
    measured = text_statistics(samples, [[math.log(0.5)] * 6, [math.log(0.125)] * 6, []])
    assert measured.distinct_1 == pytest.approx(2 / 12)
    assert measured.distinct_2 == pytest.approx(2 / 10)
    assert measured.distinct_3 == pytest.approx(2 / 8)
    assert measured.repetition == pytest.approx(1 / 3)
    assert measured.self_bleu == 1
    assert measured.mean_log_probability == pytest.approx(math.log(0.25))
    assert measured.perplexity == pytest.approx(4)


def test_every_token_weighs_the_same() -> None:
    measured = text_statistics([[1], [1, 2, 3]], [[-4.0], [0.0, 0.0, 0.0]])
    assert measured.mean_log_probability == pytest.approx(-1)


def test_arrays_are_as_good_as_lists() -> None:
    samples, logs = [[1, 2, 3, 4, 5], [1, 2, 3, 4, 6], []], [[-1.0] * 5, [-2.0] * 5, []]
    expected = text_statistics(samples, logs)
    rows = [np.array(row, dtype=np.float32) for row in logs]
    assert text_statistics([np.array(ids, dtype=np.int64) for ids in samples], rows) == expected
    assert text_statistics([np.array(ids, dtype=np.uint16) for ids in samples], rows) == expected


def test_one_sample_has_no_self_bleu() -> None:
    assert text_statistics([[1, 2, 3, 4]], [[-1.0] * 4]).self_bleu is None


@pytest.mark.parametrize("count", [0, 1, 3])
def test_nothing_to_measure_is_nan(count: int) -> None:
    measured = text_statistics([[]] * count, [[]] * count)
    assert all(value is None or math.isnan(value) for value in astuple(measured))
    assert (measured.self_bleu is None) == (count < 2)


@pytest.mark.parametrize(("log_probability", "perplexity"), [(-math.inf, math.inf), (-1e6, math.inf), (0, 1)])
def test_extreme_probabilities(log_probability: float, perplexity: float) -> None:
    assert text_statistics([[1]], [[log_probability]]).perplexity == perplexity


@pytest.mark.parametrize(
    ("statistic", "message"),
    [
        (lambda: distinct_n([[1]], 0), "n must be 1 or more, got 0"),
        (lambda: repetition_rate([[1]], -1), "n must be 1 or more, got -1"),
        (lambda: self_bleu([[1], [2]], 0), "n must be 1 or more, got 0"),
        (lambda: self_bleu([[1, 2, 3, 4]]), "2 samples or more, got 1"),
        (lambda: self_bleu([]), "2 samples or more, got 0"),
        (lambda: distinct_n([1, 2, 3], 1), "samples[0] must be a flat"),  # type: ignore[list-item]
        (lambda: distinct_n([[1], np.ones((2, 2), dtype=int)], 1), "samples[1] must be a flat"),
        (lambda: repetition_rate([[0.5]]), "token ids, got 1 dimensions of float64"),  # type: ignore[list-item]
        (lambda: text_statistics([[1], [2]], [[-1.0]]), "one for each token: [1, 1], got [1]"),
        (lambda: text_statistics([[1], [2, 3]], [[-1.0], [-1.0]]), "one for each token: [1, 2], got [1, 1]"),
    ],
)
def test_impossible_values_are_named(statistic: Callable[[], float], message: str) -> None:
    with pytest.raises(InputError) as error:
        statistic()
    assert message in str(error.value)
    assert "\n" not in str(error.value)
