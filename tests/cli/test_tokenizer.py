"""`gptpl tokenizer train`, and everything that is done with a model of such a tokenizer."""

import json
import math
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import gptpl as library
from gptpl.tokenizers import END_OF_TEXT, FileTokenizer

TEXTS = [f"Story {n}: the keeper counted {n * n} gulls and {n + 7} boats.\n" * (n % 5 + 1) for n in range(90)]
LEARN = ("tokenizer", "train", "data=text_file", "data.path=in.txt", "tokenizer.vocab_size=300")
USE = (
    *("train", "data=text_file", "data.path=in.txt", "tokenizer=file", "tokenizer.path=tokenizer.json"),
    *("model=tiny", "trainer=cpu", "trainer.precision=32-true", "scheduler.warmup_steps=1", "run_dir=run"),
    *("trainer.max_steps=6", "callbacks=checkpoint_last", "data.max_length=16", "model.tie_weights=true"),
)


@pytest.fixture
def learned(gptpl, tmp_path) -> Path:
    (tmp_path / "in.txt").write_text("".join(TEXTS))
    outcome = gptpl(*LEARN)
    assert outcome.status == 0, outcome.err
    return tmp_path / "tokenizer.json"


@pytest.fixture(scope="module")
def trained(command, tmp_path_factory) -> Path:
    """A folder with the tokenizer and `run`, a run of 6 steps: not to be changed."""
    folder: Path = tmp_path_factory.mktemp("trained")
    (folder / "in.txt").write_text("".join(TEXTS))
    for arguments in (LEARN, USE):
        outcome = command(*arguments, cwd=folder)
        assert outcome.status == 0, outcome.err
    return folder


def test_the_file_and_what_is_printed(gptpl, tmp_path, learned):
    text = "".join(TEXTS)
    tokenizer = FileTokenizer(learned)
    assert tokenizer.vocab_size == 300
    assert tokenizer.decode(tokenizer.encode(text)) == text
    outcome = gptpl(*LEARN, "tokenizer.output=other.json")
    *table, name = outcome.out.splitlines()
    assert name == "other.json"
    assert (tmp_path / "other.json").read_bytes() == learned.read_bytes()
    own, gpt2 = (line.split() for line in table[-2:])
    assert own[:3] == ["new", "300", f"{len(text) / len(tokenizer.encode(text)):.2f}"]
    assert gpt2[:2] == ["gpt2", "50,257"]
    outcome = gptpl(*LEARN)
    assert outcome.status == 2
    assert "tokenizer.output=tokenizer.json is there already: give a new name, or remove it" in outcome.err


def test_a_run_keeps_its_tokenizer(gptpl, tmp_path, trained, learned, run_folder):
    assert gptpl(*USE, "trainer.stop_at_step=3").status == 0
    learned.unlink()
    outcome = gptpl("train", "resume=run")
    assert outcome.status == 0, outcome.err
    whole, parted = (run_folder(folder / "run").checkpoint("last") for folder in (trained, tmp_path))
    assert all(whole["state_dict"][name].equal(value) for name, value in parted["state_dict"].items())
    outcome = gptpl("generate", "checkpoint=run", "prompt=Story", "max_new_tokens=5")
    assert outcome.status == 0, outcome.err
    assert outcome.out.startswith("Story")
    outcome = gptpl("evaluate", "checkpoint=run")
    loss, bits = (float(re.findall(rf"{name} +([\d.]+)", outcome.out)[0]) for name in ("loss", "bits/byte"))
    assert bits < loss / math.log(2), "a token has more than a byte"


def test_exports_carry_it(gptpl, tmp_path, trained):
    for format in ("hf", "gptpl"):
        outcome = gptpl(
            "weights", "convert", f"checkpoint={trained / 'run'}", f"format={format}", f"output={format}"
        )
        assert outcome.status == 0, outcome.err
    theirs, own = AutoTokenizer.from_pretrained(tmp_path / "hf"), FileTokenizer(trained / "tokenizer.json")
    text = f"Story 3: 東京 gulls{END_OF_TEXT}the keeper's\n"
    assert theirs(text)["input_ids"] == own.encode(text).tolist()
    assert theirs.decode(own.encode(text)) == text
    assert (theirs.eos_token, theirs.eos_token_id) == (END_OF_TEXT, own.eot_id)
    for folder in ("hf", "gptpl"):
        outcome = gptpl("generate", f"checkpoint={folder}", "prompt=Story", "max_new_tokens=3")
        assert outcome.status == 0, outcome.err


def test_gguf_holds_it(gptpl, tmp_path, trained):
    gguf = pytest.importorskip("gguf")
    outcome = gptpl("weights", "convert", f"checkpoint={trained / 'run'}", "format=gguf", "output=gguf")
    assert outcome.status == 0, outcome.err
    fields = gguf.GGUFReader(next((tmp_path / "gguf").glob("*.gguf"))).fields
    content = json.loads((trained / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokens[:300] == sorted(content["model"]["vocab"], key=content["model"]["vocab"].__getitem__)
    assert fields["tokenizer.ggml.merges"].contents() == [
        " ".join(pair) for pair in content["model"]["merges"]
    ]
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 0


def test_another_file_is_another_tokenizer(gptpl, learned):
    assert gptpl(*USE, "trainer.stop_at_step=3").status == 0
    assert gptpl(*LEARN, "tokenizer.vocab_size=290", "tokenizer.output=small.json").status == 0
    outcome = gptpl("train", "resume=run", "tokenizer.path=small.json")
    assert outcome.status == 2
    assert "tokenizer" in outcome.err.splitlines()[-1]
    outcome = gptpl(*USE, "run_dir=next", "tokenizer.path=small.json", "init=run", "init.checkpoint=run")
    assert outcome.status == 2
    assert "the checkpoint's file vocabulary" in outcome.err


def test_a_small_text_and_a_part_of_a_text_are_said(gptpl, tmp_path):
    (tmp_path / "in.txt").write_text("".join(TEXTS))
    outcome = gptpl(*LEARN, "tokenizer.vocab_size=5000")
    assert outcome.status == 0, outcome.err
    found = FileTokenizer(tmp_path / "tokenizer.json").vocab_size
    assert f"the text gives {found:,} tokens, not tokenizer.vocab_size=5,000" in outcome.err
    outcome = gptpl(*LEARN, "tokenizer.sample_bytes=1000", "tokenizer.output=part.json")
    assert outcome.status == 0, outcome.err
    assert "learning from 1" in outcome.err
    assert "evenly spread" in outcome.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["tokenizer.vocab_size=200"], "tokenizer.vocab_size must be at least 257, got 200"),
        (["tokenizer.vocab_size=many"], "tokenizer.vocab_size"),
        (["tokenizer.special_tokens=[]"], "tokenizer.special_tokens must be different tokens"),
        (["tokenizer.sample_bytes=0"], "tokenizer.sample_bytes"),
        (["data.path=none.txt"], "data.path=none.txt does not exist"),
        (["data=sms_spam"], "a tokenizer is made from plain text: choose data=corpus"),
        (["data=mixture"], "data.sources is not set"),
        (["tokenizer.vocabsize=300"], "vocab_size"),
    ],
)
def test_bad_settings_are_refused(gptpl, tmp_path, changes, message):
    (tmp_path / "in.txt").write_text("".join(TEXTS))
    known = [each for each in LEARN if each.split("=")[0] not in {change.split("=")[0] for change in changes}]
    known = [each for each in known if each != "data.path=in.txt" or not changes[0].startswith("data=")]
    outcome = gptpl(*known, *changes)
    assert (outcome.status, outcome.out) == (2, "")
    assert message in outcome.err.splitlines()[-1]


def test_python_does_what_the_command_does(tmp_path, monkeypatch, learned):
    monkeypatch.chdir(tmp_path)
    trained = library.train_tokenizer(
        "data=text_file", "data.path=in.txt", "tokenizer.vocab_size=300", "tokenizer.output=new.json"
    )
    assert trained.tokenizer.state() == FileTokenizer(learned).state()
    assert not Path("new.json").exists()
