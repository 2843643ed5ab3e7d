"""Values and intervals: what is refused, what is tried before the first trial, how they are written."""

import pytest

from gptpl.errors import InputError
from gptpl.sweeps.study import SearchSpace, as_text, combinations, interval, one_at_a_time, values


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: interval("a", 2.0, 1.0), r"a=interval\(2\.0, 1\.0\) must have LOW < HIGH"),
        (lambda: interval("a", 1, 1), "must have LOW < HIGH"),
        (lambda: interval("a", 0.0, float("inf")), "must have LOW < HIGH"),
        (lambda: interval("a", 0.0, 1.0, log=True), "must begin above 0"),
        (lambda: values("a", ("1", "2", "1")), "a=1,2,1 has 1 twice"),
    ],
)
def test_values_that_cannot_be_are_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()


def test_a_grid_of_an_interval_is_refused_with_what_to_do():
    with pytest.raises(InputError, match=r"a=interval\(0\.0, 1\.0\) is an interval.* sweep=tpe"):
        combinations({"a": interval("a", 0.0, 1.0)})


def test_before_the_first_trial_every_value_is_tried_once_with_the_others_at_their_first():
    space: SearchSpace = {"a": values("a", ("1", "2", "3")), "b": interval("b", 1e-5, 0.1, log=True)}
    assert one_at_a_time(space) == [
        {"a": "1", "b": "1e-05"},
        {"a": "2", "b": "1e-05"},
        {"a": "3", "b": "1e-05"},
        {"a": "1", "b": "0.1"},
    ]


def test_a_space_is_written_as_it_would_be_given():
    space: SearchSpace = {
        "a": values("a", ("1", "x")),
        "b": interval("b", 1e-5, 0.1, log=True),
        "c": interval("c", 1, 4),
    }
    assert [as_text(each) for each in space.values()] == [
        "1,x",
        "tag(log, interval(1e-05, 0.1))",
        "int(interval(1, 4))",
    ]
