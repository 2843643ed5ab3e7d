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
        (b"", "is not valid JSON (Expecting value: line 1 column 1"),
        (b"caf\xe9", "is not UTF-8 (byte 3): save it as UTF-8"),
        (b"[NaN]", "NaN is not JSON"),
        ([], "must be a list with at least one entry: give a file that gptpl respond wrote"),
        (ENTRY, "must be a list"),
        ("text", "must be a list"),
        ([ENTRY, 3], "entry 2 must be an object, got 3"),
        (without("model_response"), "entry 2: model_response must be text, got null: give a file that"),
        (without("output"), "entry 2: output must be text"),
        (without("instruction"), "entry 2: instruction must be text"),
        ([ENTRY | {"model_response": 3.5}], "entry 1: model_response must be text, got 3.5"),
        ([ENTRY | {"output": True}], "entry 1: output must be text, got true"),
        ([ENTRY | {"input": ["a"]}], 'entry 1: input must be text, got ["a"]'),
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
    assert "1 of 3 answers are empty" in empty
    assert "are judged as they are, the first is entry 2 ('Name a colour.')" in empty
    assert "2 entries repeat an instruction and input, each counts; the first is entry 1" in again


def test_answers_are_matched_by_their_tasks(read):
    other = ENTRY | {"instruction": "Name a bird."}
    first = read([ENTRY | {"model_response": "1"}, other, ENTRY | {"model_response": "2"}])
    second = read([other, ENTRY | {"model_response": "a"}, ENTRY | {"model_response": "b"}])
    texts = [(ours.model_response, theirs.model_response) for ours, theirs in paired(first, second)]
    assert texts == [("1", "a"), ("Blue.", "Blue."), ("2", "b")]


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (
            [ENTRY, ENTRY | {"input": "x"}],
            [ENTRY],
            "entry 2 ('Name a colour.') of responses= is missing in compare=",
        ),
        ([ENTRY], [ENTRY, ENTRY], "entry 2 ('Name a colour.') of compare= is missing in responses="),
        (
            [ENTRY],
            [ENTRY | {"instruction": "x"}],
            "entry 1 ('Name a colour.') of responses= is missing in compare=",
        ),
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
