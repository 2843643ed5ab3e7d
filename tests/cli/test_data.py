"""`gptpl data encode` and `gptpl data show`, and training on `data=corpus`."""

import json
import math
import os
import re
import subprocess
import sys
from typing import Any

import pytest

import gptpl as library

TEXTS = [f"Story {n}: the keeper counted {n * n} gulls and {n + 7} boats. " * (n % 5 + 1) for n in range(120)]
OF = ("data=corpus", "data.path=in", "data.val_tokens=1500", "tokenizer=bytes", "model=tiny")
ENCODE = ("data", "encode")
TRAIN = (
    "train",
    "trainer=cpu",
    "trainer.precision=32-true",
    "scheduler.warmup_steps=1",
    *OF,
    "run_dir=run",
    "callbacks=checkpoint_last",
)


@pytest.fixture
def stories(tmp_path):
    """A folder of JSON Lines."""
    folder = tmp_path / "in"
    folder.mkdir()
    for n in range(3):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[n::3])
        (folder / f"{n}.jsonl").write_text(lines, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTPL_CACHE", str(tmp_path / "cache"))


def test_encode_ahead_and_train(gptpl, stories):
    outcome = gptpl("data", "encode", *OF)
    assert outcome.status == 0, outcome.err
    assert outcome.out.startswith("data: corpus, 120 documents, bytes tokenizer (257 tokens)")
    assert "training tokens for every parameter" in outcome.out or "1 training token for" in outcome.out
    assert "encoding corpus" in outcome.err
    outcome = gptpl(*TRAIN, "trainer.max_steps=3")
    assert outcome.status == 0, outcome.err
    assert "encoding" not in outcome.err
    data = outcome.run.record["data"]
    assert (data["name"], len(data["sha256"])) == ("corpus", 64)


def test_encoded_by_a_run_that_is_resumed_to_the_bit(gptpl, stories, run_folder):
    steps = (*TRAIN, "trainer.max_steps=6")
    assert gptpl(*steps, "run_dir=whole").status == 0
    assert gptpl(*steps, "trainer.stop_at_step=3").status == 0
    assert gptpl("train", "resume=run").status == 0
    whole, parted = (run_folder(stories.parent / name).checkpoint("last") for name in ("whole", "run"))
    assert all(whole["state_dict"][name].equal(value) for name, value in parted["state_dict"].items())


@pytest.fixture
def trained(gptpl, stories):
    assert gptpl(*TRAIN, "trainer.max_steps=3").status == 0
    return stories


def test_what_is_done_with_a_run(gptpl, trained):
    outcome = gptpl("evaluate", "checkpoint=run")
    assert outcome.status == 0, outcome.err
    loss, bits = (float(re.findall(rf"{name} +([\d.]+)", outcome.out)[0]) for name in ("loss", "bits/byte"))
    assert bits == pytest.approx(loss / math.log(2), rel=0.02)  # but for the ends of documents
    outcome = gptpl("generate", "checkpoint=run", "prompt=Story", "max_new_tokens=20", "memorisation=true")
    assert outcome.status == 0, outcome.err
    outcome = gptpl("plan", *OF, "trainer=cpu", "plan.timed_steps=1")
    assert outcome.status == 0, outcome.err
    assert "training tokens" in outcome.out


def test_embeddings_from_counts(gptpl, stories):
    outcome = gptpl(*TRAIN, "trainer.max_steps=2", "init=cooccurrence")
    assert outcome.status == 0, outcome.err
    assert "from counts of" in outcome.err


@pytest.mark.hosts
def test_two_processes_continue_what_one_began(gptpl, stories, run_folder):
    # The global batches are the same; what is dropped differs from process to process.
    steps = (*TRAIN, "trainer.max_steps=6", "model.drop_rate=0")
    assert gptpl(*steps, "data.batch_size=4", "run_dir=whole").status == 0
    assert gptpl(*steps, "data.batch_size=4", "trainer.stop_at_step=3").status == 0
    two = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "data.batch_size=2")
    command = [sys.executable, "-m", "gptpl", "train", "resume=run", *two]
    done = subprocess.run(command, cwd=stories.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole, parted = (run_folder(stories.parent / name).rows for name in ("whole", "run"))
    losses = [[float(row["train/loss"]) for row in rows if row["train/loss"]] for rows in (whole, parted)]
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


def test_another_text_is_not_resumed(gptpl, stories, refused):
    assert gptpl(*TRAIN, "trainer.max_steps=6", "trainer.stop_at_step=3").status == 0
    path = stories / "1.jsonl"
    time = path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes().replace(b"gulls", b"geese", 1))
    os.utime(path, ns=(time + 10**9, time + 10**9))
    outcome = gptpl("train", "resume=run")
    assert outcome.status == 2
    assert "1.jsonl has changed since corpus was encoded" in outcome.err
    assert "SHA-256" in outcome.err


def test_python_does_what_the_command_does(stories, monkeypatch):
    monkeypatch.chdir(stories.parent)
    data: Any = library.encode(*OF)
    characters = sum(map(len, TEXTS))
    assert 0.9 * characters <= data.train_tokens - data.encoded.stats.train_documents < characters
    assert "120 documents" in data.report(parameters=1, world_size=1)[0]


def test_show_prints_and_writes_a_page(gptpl, stories):
    (stories / "3.jsonl").write_text('{"text": "<b>Story</b>"}\n{"text": \n')
    outcome = gptpl("data", "show", *OF)
    assert outcome.status == 0, outcome.err
    assert re.search(r"^  documents +121$", outcome.out, re.MULTILINE)
    assert "in/3.jsonl, line 2 is not valid JSON" in outcome.out
    assert outcome.out.endswith("\npage  data.html\n")
    assert "in/3.jsonl, line 2 is not valid JSON" in (stories.parent / "data.html").read_text(
        encoding="utf-8"
    )
    assert not (stories.parent / "cache").exists()


def test_show_sequences(gptpl, stories):
    outcome = gptpl("data", "show", *OF, "sequences=6", "output=null")
    assert outcome.status == 0, outcome.err
    assert "The first 6 sequences of training" in outcome.out
    assert "+--- end of document" in outcome.out
    assert not (stories.parent / "data.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sequences", "3"], "gptpl data show has no flag --sequences: did you mean sequences=VALUE?"),
        (["sequences=-1"], "sequences must be 0 or more, got -1"),
        (["sample_bytes=0"], "sample_bytes must be a positive whole number, got 0"),
        (["output=page.pdf"], "output=page.pdf must be a file whose name ends in .html"),
        (["data.path=nothing"], "data.path=nothing does not exist"),
        (["task=classify", "data=labelled"], "gptpl data encode describes them"),
    ],
)
def test_what_show_refuses(gptpl, stories, arguments, message):
    outcome = gptpl("data", "show", *OF[:2], *OF[3:], *arguments)
    assert (outcome.status, outcome.out) == (2, "")
    assert message in outcome.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("command", "changes", "message"),
    [
        (ENCODE, ["data.val_tokens=0"], "data.val_tokens must be a positive whole number, got 0"),
        (ENCODE, ["data.encode_workers=-1"], "data.encode_workers must be a positive whole number, got -1"),
        (ENCODE, ["data.split=words"], "data.split"),
        (ENCODE, ["data.path=nothing"], "data.path=nothing does not exist"),
        (ENCODE, ["data.field=body"], "0.jsonl, line 1 has no 'body' (it has 'text')"),
        (ENCODE, ["resume=run"], "resume=run"),
        (ENCODE, ["data.pattern=*.parquet"], "no file matches *.parquet"),
        (("train",), ["data.path=nothing"], "data.path=nothing does not exist"),
        (("train",), ["data.field=body"], "0.jsonl, line 1 has no 'body' (it has 'text')"),
        (("train",), ["resume=run"], "resume=run"),
    ],
)
def test_bad_settings_are_refused(gptpl, stories, command, changes, message):
    outcome = gptpl(*command, *OF, *changes)
    assert (outcome.status, outcome.out) == (2, "")
    assert message in outcome.err.splitlines()[-1]


def test_help_lists_it(gptpl):
    assert "data encode" in gptpl("--help").out
    outcome = gptpl("data", "encode", "--help")
    assert "Encode the text of a training run ahead of it" in outcome.out
    assert gptpl("data").out.count("\n") < 20
