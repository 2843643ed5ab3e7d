"""Numbers as texts: expected values written by hand."""

import math

import pytest

from gptpl.reports.ranking import digits, gigabytes, whole


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3.025710, "3.026"),
        (20.6086, "20.61"),
        (29256.3, "29,260"),
        (1234567.0, "1,235,000"),
        (0.00012345, "0.0001234"),
        (0.0, "0"),
        (-2.5, "-2.500"),
        (math.nan, "-"),
        (math.inf, "-"),
    ],
)
def test_four_digits(value, text):
    assert digits(value) == text


def test_sizes_and_counts():
    assert (gigabytes(512345678), gigabytes(12.3456e9), gigabytes(math.nan)) == ("0.512 GB", "12.3 GB", "-")
    assert (whole(15360.0), whole(math.nan)) == ("15,360", "-")
