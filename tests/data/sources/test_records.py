"""Tables of texts: every format, and one clear line for everything that can be wrong in a file."""

import csv
import io
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptpl.data.sources.records import Example, text_rows
from gptpl.errors import InputError


def table(folder: Path, name: str, content: str | bytes, **settings: Any) -> Callable[..., Iterator[Example]]:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return partial(text_rows, path, **settings)


def read(table: Callable[..., Iterator[Example]]) -> list[tuple[int, str, str]]:
    return [(row.line, row.text, row.label) for row in table("text", "label")]


def test_csv_with_quotes_line_breaks_and_empty_lines(tmp_path: Path) -> None:
    content = '\ufeffid,label,text\r\n1,spam,"win, now"\r\n\r\n2,ham,"two\nlines"\r\n3,ham,"a ""quote"""\r\n'
    assert read(table(tmp_path, "a.csv", content)) == [
        (2, "win, now", "spam"),
        (4, "two\nlines", "ham"),
        (6, 'a "quote"', "ham"),
    ]


def test_tsv_takes_quotes_as_characters_and_needs_no_header(tmp_path: Path) -> None:
    content = 'ham\t"Hello\nspam\tsaid "win", now\n'
    found = read(table(tmp_path, "SMS", content, format="tsv", columns=["label", "text"]))
    assert found == [(1, '"Hello', "ham"), (2, 'said "win", now', "spam")]


def test_jsonl_with_numbers_as_labels(tmp_path: Path) -> None:
    content = '{"text": "naïve\\n", "label": 0}\n{"label": 1, "more": null, "text": "b"}'
    assert read(table(tmp_path, "a.jsonl", content)) == [(1, "naïve\n", "0"), (2, "b", "1")]


def test_plain_lines_are_texts(tmp_path: Path) -> None:
    rows = list(table(tmp_path, "a.txt", "one\r\ntwo, three")("anything"))
    assert [(row.line, row.text, row.label) for row in rows] == [(1, "one", ""), (2, "two, three", "")]


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), min_size=1), min_size=1))
def test_whatever_csv_writes_is_read_back(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    texts = [text for text in texts if not text.isspace()] or ["x"]
    lines = io.StringIO(newline="")
    csv.writer(lines, quoting=csv.QUOTE_ALL).writerows([["text", "label"], *([text, "a"] for text in texts)])
    found = read(table(tmp_path_factory.mktemp("csv"), "a.csv", lines.getvalue()))
    assert [text for _, text, _ in found] == texts


GOOD = '{"text": "a", "label": "x"}\n'

WRONG: dict[str, tuple[str, str | bytes, str]] = {
    "missing column": ("a.csv", "txt,label\na,b\n", "line 2 has no 'text' (it has 'txt', 'label'): add it"),
    "missing key": ("a.jsonl", GOOD + '{"text": "a"}\n', "line 2 has no 'label' (it has 'text')"),
    "broken JSON": ("a.jsonl", GOOD + '{"text": \n', "line 2 is not valid JSON (Expecting value"),
    "not a number": ("a.jsonl", '{"text": "a", "label": "x", "p": NaN}', "line 1 is not valid JSON (NaN"),
    "no object": ("a.jsonl", "[1]\n", "line 1 must be a JSON object, got [1]"),
    "empty text": ("a.csv", "text,label\na,b\n ,b\n", "line 3: 'text' is empty: fill it in"),
    "no text": ("a.jsonl", '{"text": 5, "label": 1}', "line 1: 'text' must be a text, got 5"),
    "half a character": ("a.jsonl", '{"text": "\\ud800", "label": 1}', "line 1 is not valid JSON ("),
    "empty label": ("a.csv", "text,label\na,\n", "line 2: 'label' is empty"),
    "null label": ("a.jsonl", '{"text": "a", "label": null}', "line 1: 'label' must be a text, got None"),
    "boolean label": ("a.jsonl", '{"text": "a", "label": true}', "line 1: 'label' must be a text, got True"),
    "mixed labels": ("a.jsonl", GOOD + '{"text": "b", "label": 1}', "line 2: the label 1 is of another type"),
    "too many fields": (
        "a.csv",
        "text,label\na,b\na,b,c\n",
        "line 3 has 3 fields, not 2: repair it, or quote",
    ),
    "open quote": ("a.csv", 'text,label\na,b\n"a,b\n', "line 3 is not valid CSV (unexpected end of data)"),
    "text behind a quote": (
        "a.csv",
        'text,label\n"a"b,c\n',
        "line 2 is not valid CSV (',' expected after '\"'",
    ),
    "column twice": ("a.csv", "text,label,text\na,b,c\n", "names a column twice (text, label, text)"),
    "empty": ("a.csv", "", "is empty: remove it"),
    "header alone": ("a.csv", "text,label\n", "has no rows below its header"),
    "Latin-1": (
        "a.csv",
        "text,label\nä,b\n".encode("latin-1"),
        "line 2, is not UTF-8 (byte 0xE4 at offset 0)",
    ),
    "UTF-16": ("a.csv", "text,label\na,b\n".encode("utf-16"), "is UTF-16, not UTF-8: convert it"),
    "binary": ("a.csv", b"text,label\na\0,b\n", "line 2, is binary, not text"),
    "unknown kind": ("a.xlsx", "x", "has an unknown suffix: set data.format to one of csv, tsv"),
    "no labels": ("a.txt", "x\n", "is plain lines without labels"),
}


@pytest.mark.parametrize("name, content, message", WRONG.values(), ids=WRONG.keys())
def test_one_line_for_each_thing_that_is_wrong(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    with pytest.raises(InputError) as raised:
        read(table(tmp_path, name, content))
    said = str(raised.value)
    assert said.startswith(str(tmp_path / name))
    assert message in said
    assert "\n" not in said
    assert str(tmp_path / name) not in {file.path for file in psutil.Process().open_files()}


@pytest.mark.parametrize("name, separator", [("a.csv", ","), ("a.tsv", "\t")])
def test_a_header_is_no_example_where_columns_are_named(tmp_path: Path, name: str, separator: str) -> None:
    content = separator.join(["text", "label"]) + "\n" + separator.join(["hello", "ham"]) + "\n"
    with pytest.raises(InputError, match=r"has a header line: leave data\.columns out"):
        read(table(tmp_path, name, content, columns=["text", "label"]))


def test_columns_have_different_names(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.columns must be different names, got label, text, text"):
        read(table(tmp_path, "a.csv", "ham,a,b\n", columns=["label", "text", "text"]))


def test_columns_without_header_must_hold_the_wanted_ones(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no 'text' \(it has 'a', 'b'\).*data\.columns="):
        read(table(tmp_path, "a.tsv", "x\ty\n", columns=["a", "b"]))


@pytest.mark.parametrize("label, remedy", [(None, "text_column"), ("kind", "text_column and label_column")])
def test_a_missing_column_names_the_settings_that_there_are(
    tmp_path: Path, label: str | None, remedy: str
) -> None:
    wrong = table(tmp_path, "a.csv", "body\nhello\n", keys="")
    with pytest.raises(InputError) as raised:
        list(wrong("text", label))
    expected = f"(it has 'body'): add it, or set {remedy}, or columns=[...] if there is no header line"
    assert str(raised.value).endswith(expected)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*none\.csv \(No such file"):
        read(partial(text_rows, tmp_path / "none.csv"))


def test_rows_come_before_the_file_is_read_to_its_end(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"text {i}", "label": "a"}) for i in range(3)]
    rows = table(tmp_path, "a.jsonl", "\n".join([*lines, "{"]))("text", "label")
    assert [next(rows).text for _ in range(3)] == ["text 0", "text 1", "text 2"]
    with pytest.raises(InputError, match="line 4"):
        next(rows)
