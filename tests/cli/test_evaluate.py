"""`gptpl evaluate`: the numbers are those of a plain loop over the same tokens."""

# T tokens in a window

import math
import re

import pytest
import torch
import torch.nn.functional as F

from gptpl.checkpoints.loading import load_model
from gptpl.data.sources import Tale
from gptpl.model.inference import can_multiply_int8
from gptpl.tokenizers import WordsTokenizer


def plain_loss(folder, tokens: list[int], T: int) -> tuple[float, int]:
    """Mean nats a token, each scored once, from the tokens before it in its window of T; and how many."""
    net = load_model(folder / "checkpoints/last.ckpt").net
    losses: list[float] = []
    for start in range(0, len(tokens) - 1, T):
        window = torch.tensor(tokens[start : start + T + 1])
        with torch.no_grad():
            logits = net(window[None, :-1])[0]
        losses += F.cross_entropy(logits, window[1:], reduction="none").tolist()
    return math.fsum(losses) / len(losses), len(losses)


def numbers_of(out: str) -> dict[str, float]:
    """The number behind each name in what the command printed."""
    found = re.findall(r"^(tokens|loss|perplexity|bits/byte) +([\d,.]+)", out, flags=re.MULTILINE)
    return {name: float(value.replace(",", "")) for name, value in found}


def tale_tokens(split: str) -> list[int]:
    """The bytes of the first 90 % of the characters, of the rest, or of both."""
    corpus = Tale()
    text = corpus.read(corpus.files()[0])
    cut = int(len(text) * 0.9)
    return list({"train": text[:cut], "val": text[cut:], "all": text}[split].encode())


@pytest.mark.parametrize("split", ["train", "val", "all"])
def test_the_loss_is_that_of_a_plain_loop(split, gptpl, quick):
    loss, count = plain_loss(quick.run.path, tale_tokens(split), T=64)
    outcome = gptpl("evaluate", f"checkpoint={quick.run.path}", f"split={split}")
    assert outcome.status == 0, outcome.err
    numbers = numbers_of(outcome.out)
    assert numbers["tokens"] == count == len(tale_tokens(split)) - 1
    assert numbers["loss"] == pytest.approx(loss, abs=1e-4)
    assert numbers["perplexity"] == pytest.approx(math.exp(loss), abs=0.01)
    assert numbers["bits/byte"] == pytest.approx(loss / math.log(2), abs=1e-4)  # a token is a byte
    assert f"tale, split {split}" in outcome.out
    assert list(outcome.folder.iterdir()) == []


def test_batches_and_windows_can_be_chosen(gptpl, quick):
    loss, count = plain_loss(quick.run.path, tale_tokens("val"), T=10)
    outcome = gptpl("evaluate", f"checkpoint={quick.run.path}", "data.max_length=10", "data.batch_size=7")
    numbers = numbers_of(outcome.out)
    assert numbers["tokens"] == count
    assert numbers["loss"] == pytest.approx(loss, abs=1e-4)


def test_a_run_whose_windows_overlapped_is_scored_on_each_token_once(gptpl, copy):
    run = copy("run", {"data.stride": 16})
    numbers = numbers_of(gptpl("evaluate", f"checkpoint={run}").out)
    assert numbers["tokens"] == len(tale_tokens("val")) - 1


@pytest.mark.skipif(not can_multiply_int8(), reason="int8 products are FBGEMM's, for x86 alone")
def test_int8_weights_have_nearly_the_same_perplexity(gptpl, quick):
    exact, rounded = (
        numbers_of(gptpl("evaluate", f"checkpoint={quick.run.path}", f"precision={precision}").out)
        for precision in ("32-true", "int8")
    )
    assert rounded["tokens"] == exact["tokens"]
    assert rounded["perplexity"] == pytest.approx(exact["perplexity"], rel=0.002)


def test_any_text_can_be_scored_even_one_shorter_than_a_window(gptpl, quick, tmp_path):
    (tmp_path / "my text, 1.txt").write_text("Every effort moves you.", encoding="utf-8")
    loss, count = plain_loss(quick.run.path, list(b"Every effort moves you."), T=64)
    outcome = gptpl(
        "evaluate", f"checkpoint={quick.run.path}", "data=text_file", "data.path=my text, 1.txt", "split=all"
    )
    numbers = numbers_of(outcome.out)
    assert numbers["tokens"] == count
    assert numbers["loss"] == pytest.approx(loss, abs=1e-4)


def test_a_model_of_words_keeps_its_words_on_another_text(gptpl, words, tmp_path):
    text = "The old pilot sang, and the zebra was still. " * 30
    (tmp_path / "other.txt").write_text(text, encoding="utf-8")
    run_dir = words.run.path
    tokenizer = load_model(run_dir / "checkpoints/last.ckpt").tokenizer
    assert isinstance(tokenizer, WordsTokenizer)
    assert "zebra" not in tokenizer.vocabulary
    loss, _ = plain_loss(run_dir, tokenizer.encode(text[: int(len(text) * 0.9)]).tolist(), T=16)
    outcome = gptpl(
        "evaluate", f"checkpoint={run_dir}", "data=text_file", "data.path=other.txt", "split=train"
    )
    assert numbers_of(outcome.out)["loss"] == pytest.approx(loss, abs=1e-4)
    assert "bits/byte" not in outcome.out  # words have lost the spaces


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("split=test",), ["split=test", "train, val, all"]),
        (("data.max_length=65",), ["data.max_length=65", "64"]),
        (("data.max_length=0",), ["data.max_length must be at least 1, got 0"]),
        (("data=tale", "data.stride=3"), ["data.stride=3"]),
        (("data.batch_size=0",), ["data.batch_size must be at least 1, got 0"]),
        (("data=tale", "data.train_ratio=1"), ["data.train_ratio=1"]),
        (("data=text_file",), ["data.path is not set"]),
        (("data=text_file", "data.path=missing.txt"), ["data.path=missing.txt", "does not exist"]),
        (("data=tails",), ["did you mean tale?"]),
        (("device=tpu",), ["device must be one of", "got tpu"]),
        (("tokenizer=words",), ["gptpl evaluate has no setting tokenizer"]),
    ],
)
def test_wrong_settings_are_refused(given, words, refused, quick):
    line = refused("evaluate", f"checkpoint={quick.run.path}", *given)
    assert all(word in line for word in words), line


def test_a_setting_of_other_data_names_those_of_the_run_first(refused, words):
    line = refused("evaluate", f"checkpoint={words.run.path}", "data.path=my.txt", "split=all")
    assert line == (
        "data.path is a setting of data=text_file, which the model's own run has: add that, or leave"
        " data.path out"
    )


def test_a_text_of_one_token_has_nothing_to_score(refused, quick, tmp_path):
    (tmp_path / "a.txt").write_text("a")
    line = refused(
        "evaluate", f"checkpoint={quick.run.path}", "data=text_file", "data.path=a.txt", "split=all"
    )
    assert "1 token" in line
