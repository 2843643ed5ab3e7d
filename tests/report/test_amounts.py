"""Numbers as texts: expected values written by hand."""

import math

import pytest

from gptpl.report.amounts import digits, duration, gigabytes, setting_text, whole


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


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (4.21, "4.2 s"),
        (59.96, "1 min 0 s"),
        (65.4, "1 min 5 s"),
        (3599.7, "1 h 0 min"),
        (7380, "2 h 3 min"),
        (86399, "1 d 0 h"),
        (100800, "1 d 4 h"),
        (math.nan, "-"),
    ],
)
def test_durations_have_two_units(seconds, text):
    assert duration(seconds) == text


def test_sizes_counts_and_settings():
    assert (gigabytes(512345678), gigabytes(12.3456e9), gigabytes(math.nan)) == ("0.512 GB", "12.3 GB", "-")
    assert (whole(15360.0), whole(math.nan)) == ("15,360", "-")
    assert [setting_text(value) for value in (0.003, 1e-6, 40, True, "None", "adamw", None)] == [
        *("0.003", "1e-06", "40", "true", "null", "adamw", "-")
    ]
