"""Damaged and hostile files of runs: an error of one line, or what is still there; never a traceback."""

import contextlib
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gptpl.cli.main import main
from gptpl.errors import InputError
from gptpl.files.run_record import (
    read_config,
    read_run,
    read_run_json,
    write_config,
    write_run_json,
)
from gptpl.files.run_settings import differing_beside, differing_settings

DEEP_JSON = "[" * 100_000 + "]" * 100_000
VALUES: list[Any] = [
    *(None, True, -1, 0, 10**400, -(10**400), 1e308, math.nan, math.inf, 0.5, "", "x"),
    *([], {}, [None], [[]], [{}], [1, "a"], {"step": {}}, {"": []}, ["\x1b"], "\x1b[31m\x9b2J\u202e"),
    *("0001-01-01", "9999-12-31T23:59", "2026-01-01T10:00:00+00:00"),
    *({"step": "\x1b", "error": ["\r"], "reason": 10**400, "name": {"a": []}}, [{"changes": [1]}]),
    *({"checkpoint": ["/"]}, {"checkpoint": "/\x00\x1b"}, {"parent": {"step": 10**400}}),
]  # fmt: skip
YAML = [
    *("a: &a [*a]", "&a {b: *a}", "a: !!timestamp x", "a: !!int ''", 'a: !!float ""', "? [a]\n: b"),
    *("a: !!python/object/apply:os.system [true]", "\t", "a: 2026-13-45", "- a", "a: {", "trainer: 1"),
    *("a: !!binary =", "model: [1]", "tags: {a: b}", "notes: [1]", "task: {_target_: [1]}", 'run_dir: "\\0"'),
    *("a: " + "[" * 60 + "]" * 60, "a: " + "[" * 50_000, "a: " + "[" * 3_000 + "]" * 3_000, "- " * 50_000),
    *("a: " + "9" * 5000, "tags: ['\\e[31m', '\\u202e']", "trainer: {max_steps: .nan, max_epochs: 1e400}"),
    "\n".join(["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12))]),
]  # fmt: skip
"""Lines put into `config.yaml`."""


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to all that a JSON value holds."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield (*path, key)
        yield from places(each, (*path, key))


def torn(text: bytes, chance: random.Random) -> bytes:
    """Cut short, or with a byte that is another one or one too many."""
    at = chance.randrange(len(text))
    byte = bytes([chance.randrange(256)])
    more = chance.choice([b"\xff", b"\0", b"\x1b", b"[", b"{", b'"', b"\n", b"1e999"])
    return chance.choice([text[:at], text[:at] + byte + text[at + 1 :], text[:at] + more + text[at:]])


def changed_json(text: bytes, chance: random.Random) -> bytes:
    """Another value somewhere in it, or the entry left out."""
    record = json.loads(text)
    *way, last = chance.choice(list(places(record)))
    inner = record
    for key in way:
        inner = inner[key]
    if chance.random() < 0.2 and isinstance(inner, dict):
        del inner[last]
    else:
        inner[last] = chance.choice(VALUES)
    return json.dumps(record).encode()


def changed_yaml(text: bytes, chance: random.Random) -> bytes:
    lines = text.decode().split("\n")
    lines[chance.randrange(len(lines))] = chance.choice(YAML)
    return "\n".join(lines).encode()


def ask_all(folder: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command and reader answers, or says in one line what is wrong."""
    for words in ("list runs", "list --json", "show runs/a", "show --json runs/a", "diff runs/a whole"):
        status = main(["runs", *words.split()])
        out, err = capsys.readouterr()
        assert status in (0, 2), (words, err)
        assert len(err.splitlines()) == (status == 2), err
        assert not {"\x1b", "\x9b", "\u202e", "\r", "\0"} & set(out + err), (words, out, err)
    for read in (read_config, read_run_json, read_run):
        with contextlib.suppress(InputError):
            read(folder)
    with contextlib.suppress(InputError):
        run = read_run(folder)
        assert run.state in ("finished", "stopped", "failed", "unfinished")
        assert min(run.steps, run.tokens_seen) >= -1
        assert isinstance(run.notes, str)
        both = [run, read_run(whole)]
        assert isinstance(differing_settings(both), dict)
        assert isinstance(differing_beside(both), dict)


@pytest.fixture
def runs(tmp_path, make_run, monkeypatch):
    """A run to damage and another one."""
    monkeypatch.chdir(tmp_path)
    resumed = [{"step": 2, "changes": {"optimizer.lr": 0.1}}]
    start = {"init": "run", "checkpoint": "/x/best.ckpt", "parent": {"step": 3}}
    more = {
        "tokenizer": {"name": "bytes", "vocab_size": 256},
        "parameters": 100,
        "peak_memory_bytes": 10**8,
        "metrics": {"val/loss": 4.5},
        "tags": ["a"],
        "notes": "b",
    }
    folder = make_run(tmp_path / "runs/a", resumed=resumed, start=start, **more)
    (folder / "samples.jsonl").write_text('{"step": 4, "prompt": "\\u001b[2J", "continuation": [1]}\n')
    return folder, make_run(tmp_path / "whole")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("run.json", torn),
        ("run.json", changed_json),
        ("config.yaml", torn),
        ("config.yaml", changed_yaml),
    ],
)
def test_whatever_happens_to_a_file_there_is_an_answer(
    runs, capsys, name: str, change: Callable[[bytes, random.Random], bytes]
):
    folder, whole = runs
    text = (folder / name).read_bytes()
    chance = random.Random(18)
    for _ in range(25):
        (folder / name).write_bytes(change(text, chance))
        ask_all(folder, whole, capsys)


def test_each_entry_of_run_json_may_have_any_value(runs, capsys):
    folder, whole = runs
    record = json.loads((folder / "run.json").read_text())
    for at, value in enumerate(VALUES):
        states = dict.fromkeys(("finished", "stopped", "failed")[at % 3 :], value)
        (folder / "run.json").write_text(json.dumps(dict.fromkeys(record, value) | states))
        ask_all(folder, whole, capsys)


@pytest.mark.parametrize("text", [DEEP_JSON, '{"a": ' + DEEP_JSON + "}", "9" * 5000, "\ufeff{}", ""])
def test_text_that_is_no_record(runs, capsys, text):
    folder, whole = runs
    (folder / "run.json").write_text(text)
    ask_all(folder, whole, capsys)
    with pytest.raises(InputError, match=r"run\.json is damaged"):
        write_run_json(folder, tags=[])
    assert (folder / "run.json").read_text() == text


def test_each_line_of_hostile_yaml(runs, capsys):
    folder, whole = runs
    text = (folder / "config.yaml").read_text()
    for line in YAML:
        (folder / "config.yaml").write_text(text + line + "\n")
        ask_all(folder, whole, capsys)


def test_a_value_of_the_wrong_type_counts_as_missing(runs):
    folder, _ = runs
    write_run_json(folder, steps="many", resumed={}, data=[], seconds=math.nan, mine=[1])
    record = read_run_json(folder)
    assert not {"steps", "resumed", "data", "seconds"} & record.keys()
    assert (record["mine"], record["tokens_seen"]) == ([1], 400)
    write_run_json(folder, finished=None, remove=["failed", "planned_steps"])
    assert json.loads((folder / "run.json").read_text())["steps"] == "many", "writing loses nothing"
    assert "planned_steps" not in read_run_json(folder)


def test_a_config_that_lost_its_end_is_damaged(runs):
    folder, _ = runs
    whole = (folder / "config.yaml").read_text()
    assert read_config(folder, needs=("model", "trainer"))["trainer"]["max_steps"] == 4
    (folder / "config.yaml").write_text(whole[: whole.index("trainer")])
    with pytest.raises(InputError, match=r"config\.yaml is damaged \(it has no section trainer\)"):
        read_config(folder, needs=("model", "trainer"))


def test_settings_come_back_as_they_were_here_and_in_omegaconf(tmp_path):
    omegaconf = pytest.importorskip("omegaconf").OmegaConf
    texts = [
        "1e-3",
        "1e5",
        ".5e3",
        "2026-01-01",
        "yes",
        "null",
        "a: b",
        "12:30:45",
        "é\x1b",
        "x\ny",
        "~",
    ]
    config = {
        "texts": texts,
        "numbers": [0.001, 1e-6, 1e22, 3, -0.0],
        "nested": {"a": {}, "b": [], "c": None, "d": True, "e": [{"f": "${g}"}]},
        "same": [texts, texts],
    }
    write_config(tmp_path, config)
    assert repr(read_config(tmp_path)) == repr(config)
    assert repr(omegaconf.to_container(omegaconf.load(tmp_path / "config.yaml"))) == repr(config)
    theirs = omegaconf.to_yaml(omegaconf.create(config))
    assert (tmp_path / "config.yaml").read_text() == theirs
    (tmp_path / "config.yaml").write_text("lr: 1e-3\nday: 2026-01-01\n")  # written by hand
    assert read_config(tmp_path) == {"lr": 0.001, "day": "2026-01-01"}
