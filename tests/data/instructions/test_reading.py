"""Entries from JSON and JSON Lines, and one clear line for everything that can be wrong with them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from gptpl.data.instructions.records import Instruction, read_instructions
from gptpl.errors import InputError

GOOD = {"instruction": "Name a colour.", "input": "", "output": "Red."}


@pytest.fixture
def written(tmp_path: Path):
    """Writes the text into a file and gives its path."""

    def write(text: str, name: str = "entries.json") -> Path:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


@pytest.mark.parametrize("many", [1, 2])
def test_a_list_and_lines_give_the_same(written, many):
    other: dict[str, Any] = {"instruction": "Say it in \u2028 two.", "input": "x", "output": "ü\n", "more": 1}
    values = [GOOD, other][:many]
    expected = [Instruction(**{key: value[key] for key in GOOD}) for value in values]
    assert read_instructions(written(json.dumps(values))) == expected
    lines = "\n\n".join(json.dumps(value, ensure_ascii=False) for value in values)
    assert read_instructions(written(lines + "\n", "entries.jsonl")) == expected


def test_the_only_record_may_have_a_list_of_objects(written):
    path = written(json.dumps({**GOOD, "history": [GOOD]}))
    assert read_instructions(path) == [Instruction(**GOOD)]


def test_columns_of_other_names_and_no_input(written):
    path = written(json.dumps([{"question": "Why?", "answer": "So."}]))
    entries = read_instructions(path, instruction="question", input=None, output="answer")
    assert entries == [Instruction(instruction="Why?", input="", output="So.")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", r"holds no records: give a list"),
        (" \n ", r"is empty: "),
        (json.dumps([GOOD])[:-5], r"is not valid JSON \(.*line 1 column \d+"),
        (json.dumps(GOOD) + "\n{oops\n", r", line 2 is not valid JSON \(.*column 2"),
        (json.dumps([GOOD, "x"]), r", entry 2 must be a JSON object, got 'x'"),
        (json.dumps(GOOD) + "\n\n7", r", line 3 must be a JSON object, got 7"),
        (json.dumps([GOOD, {"instruction": "a", "input": ""}]), r", entry 2 has no 'output' \(it has 'instr"),
        (json.dumps([{**GOOD, "output": " \n"}]), r", entry 1: 'output' is empty: fill it in"),
        (json.dumps([{**GOOD, "instruction": ""}]), r", entry 1: 'instruction' is empty"),
        (json.dumps([{**GOOD, "input": None}]), r", entry 1: 'input' must be a text, got None"),
        (json.dumps(GOOD) + "\n" + json.dumps({**GOOD, "output": 4}), r", line 2: 'output' must be a text"),
        (json.dumps([{**GOOD, "output": ["a"] * 99}]), r", entry 1: 'output' must be a text, got \['a', "),
        ('[{"score": NaN}]', r" is not valid JSON \(NaN"),
        (json.dumps(GOOD) + '\n{"score": -Infinity}', r", line 2 is not valid JSON \(-Infinity"),
        (json.dumps([GOOD, {**GOOD, "output": "\ud83d"}]), r" is not valid JSON \(.*surrogates"),
        ('{"score": ' + 5000 * "1" + "}", r", line 1 is not valid JSON \(.*digits"),
        (
            json.dumps([{"prompt": "a"}]),
            r", entry 1 .*\(it has 'prompt'\): add it, or set data\.instruction_column to the key",
        ),
        (json.dumps([{"instruction": "a"}]), r", entry 1 has no 'input' .* set data\.input_column .* null"),
        (json.dumps([{"instruction": "a", "input": ""}]), r", entry 1 .* set data\.output_column to the key"),
        (json.dumps({"data": [GOOD]}), r"is one object \('data'\): give the list of records alone"),
        (json.dumps({"v": "1", "data": [GOOD]}, indent=1), r"is one object \('v', 'data'\): give the list"),
        (100_000 * "[", r" is not valid JSON \(.*recursion"),
    ],
)
def test_bad_files(written, text, said):
    path = written(text)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))} ?{said}[^\n]*$"):
        read_instructions(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"^cannot read .*no\.json \(No such file or directory\): check"):
        read_instructions(tmp_path / "no.json")
