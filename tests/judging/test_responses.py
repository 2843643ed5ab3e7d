"""Answers read from files, good and bad, and matched."""

import json

import pytest

from gptpl.errors import InputError
from gptpl.judging.responses import paired, read_responses

ENTRY = {"instruction": "Name a colour.", "input": "", "output": "Red.", "model_response": "Blue."}


@pytest.fixture
def read(tmp_path):
    """Reads what is given as the content of a file."""

    def read_content(content, name="r.json"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return read_responses(path)

    return read_content


def test_entries_keep_all_their_fields(read):
    rows = [ENTRY | {"tokens": 3, "seconds": 0.5}, {k: v for k, v in ENTRY.items() if k != "input"}]
    first, second = read(rows)
    assert (first.instruction, first.output, first.model_response) == ("Name a colour.", "Red.", "Blue.")
    assert first.fields == rows[0]
    assert (second.input, second.index) == ("", 1)


def test_a_byte_order_mark_and_any_script_are_read(read):
    [entry] = read(b"\xef\xbb\xbf" + json.dumps([ENTRY | {"output": "赤 🟥"}], ensure_ascii=False).encode())
    assert entry.output == "赤 🟥"


def without(key):
    return [ENTRY, {k: v for k, v in ENTRY.items() if k != key}]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is no JSON (Expecting value, line 1 column 1)"),
        (b'[{"instruction": "a",\n]', "line 2 column 1"),
        (b"[" * 200_000, "is no JSON that can be read"),
        (b"caf\xe9", "is not UTF-8 (byte 3 is 0xe9): save it as UTF-8"),
        (b"[NaN]", "holds NaN, which is no JSON"),
        (b"[1" + b"0" * 5000 + b"]", "is no JSON that can be read"),
        ([], "holds an empty list"),
        (ENTRY, "holds no list but an object"),
        ("text", "holds no list but a text"),
        ([ENTRY, 3], "entry 2 is a number, not an object"),
        (without("model_response"), "entry 2 has no model_response: give a file that gptpl respond wrote"),
        (without("output"), "entry 2 has no output"),
        (without("instruction"), "entry 2 has no instruction"),
        ([ENTRY | {"model_response": None}], "entry 1: model_response is null: give a text"),
        ([ENTRY | {"model_response": 3.5}], "entry 1: model_response is a number"),
        ([ENTRY | {"output": True}], "entry 1: output is true or false"),
        ([ENTRY | {"input": ["a"]}], "entry 1: input is a list"),
        ([ENTRY | {"model_response": "\ud800"}], "entry 1 holds half of a surrogate pair"),
    ],
)
def test_what_is_no_list_of_answers_is_refused_in_a_line(content, words, read):
    with pytest.raises(InputError) as raised:
        read(content)
    assert words in str(raised.value)
    assert "r.json" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"compare=.*none\.json cannot be read \(No such file"):
        read_responses(tmp_path / "none.json", key="compare")


def test_empty_answers_and_duplicates_are_said_and_kept(read, caplog):
    entries = read([ENTRY, ENTRY | {"model_response": " \n"}, ENTRY | {"input": "x"}])
    assert len(entries) == 3
    empty, again = (record.getMessage() for record in caplog.records)
    assert "1 of 3 answers are empty, the first is entry 2 ('Name a colour.')" in empty
    assert "judged as they are" in empty
    assert "2 entries share their instruction and input with another, the first is entry 1" in again


def test_answers_are_matched_by_their_tasks(read):
    other = ENTRY | {"instruction": "Name a bird."}
    first = read([ENTRY | {"model_response": "1"}, other, ENTRY | {"model_response": "2"}])
    second = read([other, ENTRY | {"model_response": "a"}, ENTRY | {"model_response": "b"}])
    texts = [(pair.first.model_response, pair.second.model_response) for pair in paired(first, second)]
    assert texts == [("1", "a"), ("Blue.", "Blue."), ("2", "b")]


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ([ENTRY, ENTRY | {"input": "x"}], [ENTRY], "entry 2 ('Name a colour.') of responses= has no partner"),
        ([ENTRY], [ENTRY, ENTRY], "entry 2 ('Name a colour.') of compare= has no partner"),
        ([ENTRY], [ENTRY | {"instruction": "x"}], "entry 1 ('Name a colour.') of responses= has no partner"),
        (
            [ENTRY],
            [ENTRY | {"output": "x"}],
            "entry 1 ('Name a colour.') of responses= has another reference",
        ),
    ],
)
def test_answers_to_different_test_sets_are_refused(first, second, words, read):
    with pytest.raises(InputError) as raised:
        paired(read(first), read(second))
    assert words in str(raised.value)
