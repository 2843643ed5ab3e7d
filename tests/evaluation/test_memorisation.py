"""The memorisation meter against comparing every sample position with every training position."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from gptpl.errors import InputError
from gptpl.evaluation.memorisation import Memorisation, TrainingText, memorisation

# Few different tokens: long matches, and many of them.
tokens = st.lists(st.integers(0, 3), max_size=30)
training_tokens = st.lists(st.integers(0, 2), min_size=1, max_size=60)  # never a 3


def common_prefix(a: list[int], b: list[int]) -> int:
    length = 0
    while length < min(len(a), len(b)) and a[length] == b[length]:
        length += 1
    return length


def plain_match_lengths(sample: list[int], training: list[int]) -> list[int]:
    return [
        max(common_prefix(sample[i:], training[p:]) for p in range(len(training))) for i in range(len(sample))
    ]


def occurs(gram: list[int], training: list[int]) -> bool:
    return any(training[p : p + len(gram)] == gram for p in range(len(training)))


@given(sample=tokens, training=training_tokens)
def test_match_lengths_are_those_of_comparing_everywhere(sample: list[int], training: list[int]) -> None:
    assert TrainingText(training).match_lengths(sample).tolist() == plain_match_lengths(sample, training)


@given(training=training_tokens, data=st.data())
def test_a_copy_is_found_as_a_whole(training: list[int], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(training) - 1))
    stop = data.draw(st.integers(start + 1, len(training)))
    lengths = TrainingText(training).match_lengths(training[start:stop])
    assert lengths.tolist() == list(range(stop - start, 0, -1))


@given(sample=tokens, training=training_tokens, n=st.integers(1, 6))
def test_shares_are_those_of_looking_up_every_ngram(sample: list[int], training: list[int], n: int) -> None:
    grams = [sample[i : i + n] for i in range(len(sample) - n + 1)]
    expected = sum(occurs(gram, training) for gram in grams) / len(grams) if grams else math.nan
    share = memorisation(sample, TrainingText(training), n_values=[n]).shares[n]
    assert share == pytest.approx(expected, nan_ok=True)


def test_match_lengths_by_hand() -> None:
    training = TrainingText([10, 11, 12, 13, 10, 11, 99])
    assert training.match_lengths([11, 12, 13, 5, 10, 11, 99, 10]).tolist() == [3, 2, 1, 0, 3, 2, 1, 1]


def test_a_run_may_not_go_on_over_the_end_of_the_training_text() -> None:
    assert TrainingText([1, 2, 3]).match_lengths([2, 3, 1, 2, 3]).tolist() == [2, 1, 3, 2, 1]
    assert TrainingText([7]).match_lengths([7, 7]).tolist() == [1, 1]


def test_memorisation_by_hand() -> None:
    training = TrainingText(list(range(100, 120)))
    sample = [1, 102, 103, 2, 105, 106, 107, 108, 3, 111, 112, 113, 114]
    found = memorisation(sample, training, n_values=(1, 2, 4, 13, 14))
    assert (found.longest_run, found.longest_start) == (4, 4)  # the first of two
    assert found.shares == {
        1: pytest.approx(10 / 13),
        2: pytest.approx(7 / 12),
        4: pytest.approx(2 / 10),
        13: 0,
        14: pytest.approx(math.nan, nan_ok=True),
    }


def test_the_shares_are_of_4_8_and_16_tokens() -> None:
    found = memorisation(range(16), TrainingText(range(16)))
    assert found == Memorisation(longest_run=16, longest_start=0, shares={4: 1, 8: 1, 16: 1})


def test_nothing_in_common() -> None:
    found = memorisation([1, 2, 3, 4], TrainingText([5, 6]), n_values=[4])
    assert found == Memorisation(longest_run=0, longest_start=0, shares={4: 0})


def test_an_empty_sample() -> None:
    training = TrainingText([1, 2])
    assert training.match_lengths([]).shape == (0,)
    found = memorisation([], training, n_values=[1])
    assert (found.longest_run, found.longest_start) == (0, 0)
    assert math.isnan(found.shares[1])


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64])
def test_any_integer_dtype(dtype: type) -> None:
    training: NDArray[np.integer[Any]] = np.array([3, 1, 2, 3, 1], dtype=dtype)
    sample: NDArray[np.integer[Any]] = np.array([1, 2, 9, 3, 1], dtype=dtype)
    assert TrainingText(training).match_lengths(sample).tolist() == [2, 1, 0, 2, 1]
    assert training.tolist() == [3, 1, 2, 3, 1]


def test_ids_beyond_16_bits_are_not_mixed_up() -> None:
    wide = 2**16
    assert TrainingText([0, wide, wide + 1]).match_lengths([1, wide, wide + 1]).tolist() == [0, 2, 1]
    assert TrainingText([0, wide]).match_lengths([wide, 0]).tolist() == [1, 1]
    assert TrainingText([0, 1]).match_lengths([wide, wide + 1]).tolist() == [0, 0]
    assert TrainingText([-1, 5]).match_lengths([wide - 1, -1, 5]).tolist() == [0, 2, 1]


def test_samples_do_not_leave_traces() -> None:
    training = TrainingText([1, 2, 3, 4])
    first = training.match_lengths([1, 2, 3])
    training.match_lengths([4, 3, 2, 1])
    assert training.match_lengths([1, 2, 3]).tolist() == first.tolist() == [3, 2, 1]


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        (lambda: TrainingText([]), "the training text has 0 tokens"),
        (
            lambda: TrainingText(np.zeros((2, 2), dtype=int)),
            "the training text must be a flat sequence",
        ),
        (lambda: TrainingText(np.zeros(2)), "token ids, got 1 dimensions of float64"),  # type: ignore[arg-type]
        (lambda: TrainingText([1]).match_lengths([[1]]), "the sample must be"),  # type: ignore[list-item]
        (lambda: memorisation([1], TrainingText([1]), n_values=[4, 0]), "n must be 1 or more, got 0"),
    ],
)
def test_impossible_values_are_named(measure: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError) as error:
        measure()
    assert message in str(error.value)
    assert "\n" not in str(error.value)
