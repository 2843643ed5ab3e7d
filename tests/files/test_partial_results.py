"""Results kept as they come: nothing is lost, nothing stands twice, nothing is mixed."""

import json
from pathlib import Path

import pytest

from gptpl.errors import InputError
from gptpl.files.durable import PartialResults

SETTINGS = {"model": "abc", "rules": {"temperature": 0.0}}


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "answers.json"


def test_it_goes_on_and_becomes_a_list(output):
    first = PartialResults(output, SETTINGS)
    first.add([{"a": "ü\u2028"}, {"a": "2"}])
    second = PartialResults(output, SETTINGS)
    assert second.values == [{"a": "ü\u2028"}, {"a": "2"}]
    second.add([{"a": "3"}])
    assert not output.exists()
    second.finish()
    assert json.loads(output.read_text(encoding="utf-8")) == [{"a": "ü\u2028"}, {"a": "2"}, {"a": "3"}]
    assert [path.name for path in output.parent.iterdir()] == ["answers.json"]
    with pytest.raises(
        InputError, match=r"^output=.*answers.json is there already: give a new name, or remove it"
    ):
        PartialResults(output, SETTINGS)


@pytest.mark.parametrize("torn", ['{"a": "3', '{"a": "3"}', ""])
def test_a_torn_last_line_is_made_anew(output, torn):
    begun = PartialResults(output, SETTINGS)
    begun.add([{"a": "1"}])
    with begun.path.open("a") as file:
        file.write(torn)
    again = PartialResults(output, SETTINGS)
    assert again.values == [{"a": "1"}]
    again.add([{"a": "2"}])
    assert PartialResults(output, SETTINGS).values == [{"a": "1"}, {"a": "2"}]


def test_other_settings_are_refused_and_nothing_is_touched(output):
    path = PartialResults(output, SETTINGS).path
    before = path.read_bytes()
    with pytest.raises(InputError, match=r'^.*json.partial was started with model="abc", not "x": rem'):
        PartialResults(output, {**SETTINGS, "model": "x"})
    with pytest.raises(InputError, match=r"was started with seed=null, not 1"):
        PartialResults(output, {**SETTINGS, "seed": 1})
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", ["", "oops\n", '["no header"]\n', '{"settings": {}}\n{broken\n'])
def test_a_damaged_file_is_refused(output, content):
    output.with_name("answers.json.partial").write_text(content)
    with pytest.raises(InputError, match=r"^.*answers.json.partial is damaged: remove it[^\n]*$"):
        PartialResults(output, {})


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"none.* is in a folder that does not exist: make it first$"):
        PartialResults(tmp_path / "none/answers.json", {})
