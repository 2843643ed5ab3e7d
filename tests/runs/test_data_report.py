"""`gptpl.data_report`: the report on a run's text, and the sequences that it trains on."""

import json
from pathlib import Path

import pytest
import torch

import gptpl
from gptpl.tokenizers import BytesTokenizer, WordsTokenizer

CHEAP = ("model=tiny", "tokenizer=bytes")


@pytest.fixture(autouse=True)
def _in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPTPL_CACHE", str(tmp_path / "cache"))


def write(texts):
    Path("x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return (*CHEAP, "data=corpus", "data.path=x.jsonl", "data.val_tokens=500", "data.max_length=32", "seed=5")


def test_the_default_text_is_counted_and_not_encoded(tmp_path):
    report = gptpl.data_report(*CHEAP)
    assert (report.name, report.documents, report.max_length) == ("tale", 1, 64)
    assert not (tmp_path / "cache").exists()


def test_the_sequences_are_those_that_a_run_trains_on():
    texts = [f"Story {n}: the keeper counted {n * n} gulls." for n in range(400)]
    config = write(texts)
    report = gptpl.data_report(*config, sequences=5)
    run = gptpl.build(*config, "trainer=cpu", "trainer.max_steps=3", "run_dir=run")
    batches = list(run.datamodule.train_dataloader())
    inputs = torch.cat([batch[0] for batch in batches])[:5]
    targets = torch.cat([batch[1] for batch in batches])[:5]
    assert [row[:-1] for row in report.sequences] == inputs.tolist()
    assert [row[1:] for row in report.sequences] == targets.tolist()
    lines = report.lines()
    start = next(n for n, line in enumerate(lines) if line.startswith("The first 5 sequences"))
    shown = "\n".join(lines[start:])
    ends = sum(row.count(256) for row in report.sequences)
    assert ends > 0
    assert shown.count("end of document: <|endoftext|>") == report.page().count("<b>end of document") == ends
    first = BytesTokenizer().decode([each for each in report.sequences[0] if each != 256])
    texts_shown = [line[4:] for line in lines[start:] if line.startswith("  | ")]
    assert "".join(texts_shown).startswith(first)


def test_a_vocabulary_of_all_the_text_is_that_of_the_sequences():
    texts = [f"word{n} and the same end" for n in range(600)]
    config = [*write(texts), "tokenizer=words"]
    report = gptpl.data_report(*config, sequences=2, sample_bytes=3000)
    assert report.sampled
    assert report.tokenizer.vocab_size == WordsTokenizer().fitted_to(texts).vocab_size
    assert len(report.token_counts) == report.tokenizer.vocab_size
    assert "end" in "\n".join(report.lines())


def test_why_there_are_no_sequences():
    config = write(["good"] * 30)
    with Path("x.jsonl").open("a") as file:
        file.write("broken\n")
    report = gptpl.data_report(*config, sequences=2)
    assert report.documents == 30
    assert not report.sequences
    assert "x.jsonl, line 31" in report.no_sequences
    for text in ("\n".join(report.lines()), report.page()):
        assert "cannot be shown: " in text


def test_data_that_are_not_plain_text_are_refused():
    with pytest.raises(gptpl.InputError, match="reads plain text, these data are a LabelledDataModule"):
        gptpl.data_report(*CHEAP, "task=classify", "data=labelled", "data.path=my.csv")
    with pytest.raises(gptpl.InputError, match="resume=run"):
        gptpl.data_report(*CHEAP, "resume=run")
