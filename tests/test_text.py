"""Values as texts: expected ones written by hand."""

import math

import pytest

from gptpl.text import (
    bytes_text,
    count_text,
    duration_text,
    loss_text,
    nearest,
    one_line,
    printable,
    setting_text,
    shortened,
    table,
)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (4.21, "4.2 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1:00"),
        (65.4, "1:05"),
        (3599.7, "1:00:00"),
        (7384, "2:03:04"),
        (100800, "28:00:00"),
        (math.nan, "-"),
        (math.inf, "-"),
        (-1, "-"),
    ],
)
def test_durations(seconds, text):
    assert duration_text(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (999_960, "1.0 MB"), (2e9, "2.0 GB"), (5e15, "5000.0 TB")],
)
def test_sizes(size, text):
    assert bytes_text(size) == text


def test_counts_losses_and_settings():
    assert [count_text(count, "run") for count in (0, 1, 1200)] == ["0 runs", "1 run", "1,200 runs"]
    assert [loss_text(loss) for loss in (3.02571, math.nan, None)] == ["3.0257", "-", "-"]
    values = (0.003, 1e-6, 0.123456, 40, True, "None", "adamw", None, "a" * 40)
    texts = ["0.003", "1e-06", "0.1235", "40", "true", "null", "adamw", "-", "a" * 12]
    assert [setting_text(value) for value in values] == texts
    assert setting_text(0.123456, exact=True) == "0.123456"


ESCAPES = "a\x1b[31m\x9b2J\u202eb\r\nc\td\x00"


def test_nothing_that_is_printed_acts_on_the_terminal():
    assert one_line(ESCAPES) == "a�[31m�2J�b c d�"
    assert printable("a\n\tb\x1b\r") == "a\n\tb��"
    assert shortened(ESCAPES, 6) == "a�[31…"
    assert table([["a\x1b", "b"], ["c", "d\n\te"]]) == ["a�  b", "c   d  e"]


def test_columns_are_aligned():
    assert table([["a", "bb", "c"], ["aaa", "b", ""]], right=[1]) == ["a    bb  c", "aaa   b"]


def test_the_nearest_word():
    assert nearest("optimiser", ["optimizer", "logger"]) == ": did you mean optimizer?"
    assert nearest("xyz", ["optimizer"]) == ""
    assert nearest("model.x", ["model"]) == "", "the group of a key is not what it was meant to be"
