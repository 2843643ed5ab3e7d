"""JSON from users' files: what is read and what is refused."""

import pytest

from gptpl.errors import InputError
from gptpl.files.plain import parse_json


def test_values_are_read_as_the_standard_says():
    assert parse_json('{"a": [1, 2.5, true, null, "\\u8d64"]}', "f") == {"a": [1, 2.5, True, None, "赤"]}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "line 1 column 1"),
        ('{"a": 1,\n]', "line 2 column 1"),
        ("[NaN]", "NaN is not JSON"),
        ("[-Infinity]", "-Infinity is not JSON"),
        ('["\\ud800"]', "surrogates not allowed"),
        ("1" + "0" * 5000, "digits"),
        ("[" * 200_000, "recursion"),
    ],
)
def test_anything_else_is_an_error_of_one_line_that_names_the_place(text, reason):
    with pytest.raises(InputError) as raised:
        parse_json(text, "data.jsonl, line 3")
    message = str(raised.value)
    assert message.startswith("data.jsonl, line 3 is not valid JSON (")
    assert reason in message
    assert "\n" not in message
