"""Entries from JSON and JSON Lines, and one clear line for everything that can be wrong with them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from gptpl.data.instructions.entries import Entry, read_entries
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
    expected = [Entry(**{key: value[key] for key in GOOD}) for value in values]
    assert read_entries(written(json.dumps(values))) == expected
    lines = "\n\n".join(json.dumps(value, ensure_ascii=False) for value in values)
    assert read_entries(written(lines + "\n", "entries.jsonl")) == expected


def test_columns_of_other_names_and_no_input(written):
    path = written(json.dumps([{"question": "Why?", "answer": "So."}]))
    entries = read_entries(path, instruction="question", input=None, output="answer")
    assert entries == [Entry(instruction="Why?", input="", output="So.")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", r"holds no entry: give a list"),
        (" \n ", r"is empty: "),
        (json.dumps([GOOD])[:-5], r", line 1: broken JSON \(.*\): mend it"),
        (json.dumps(GOOD) + "\n{oops\n", r", line 2: broken JSON \(.*\): give a list"),
        (json.dumps([GOOD, "x"]), r", entry 2 is \"x\", no object"),
        (json.dumps(GOOD) + "\n\n7", r", line 3 is 7, no object"),
        (json.dumps([GOOD, {"instruction": "a", "input": ""}]), r", entry 2 has no 'output', only 'instr"),
        (json.dumps([{**GOOD, "output": " \n"}]), r", entry 1: 'output' is empty: fill it in"),
        (json.dumps([{**GOOD, "instruction": ""}]), r", entry 1: 'instruction' is empty"),
        (json.dumps([{**GOOD, "input": None}]), r", entry 1: 'input' is null, no text"),
        (json.dumps(GOOD) + "\n" + json.dumps({**GOOD, "output": 4}), r", line 2: 'output' is 4, no text"),
        (json.dumps([{**GOOD, "output": ["a"] * 99}]), r", entry 1: 'output' is \[\"a\", .*\.\.\., no text"),
        ('[{"score": NaN}]', r" holds NaN, which is no JSON: give"),
        (json.dumps(GOOD) + '\n{"score": -Infinity}', r", line 2 holds -Infinity, which is no JSON"),
        (json.dumps([GOOD, {**GOOD, "output": "\ud83d"}]), r", entry 2 holds half of a surrogate pair: give"),
        ('{"score": ' + 5000 * "1" + "}", r", line 1 is no JSON that can be read \(.*\): mend it"),
        (100_000 * "[", r" is no JSON that can be read \(.*\): mend it"),
    ],
)
def test_bad_files(written, text, said):
    path = written(text)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))} ?{said}[^\n]*$"):
        read_entries(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"^cannot read .*no\.json \(No such file or directory\): check"):
        read_entries(tmp_path / "no.json")
