"""`gptpl inspect`: the page of a text, and its numbers, from the command line."""

import json
import re
from html import unescape
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from gptpl.checkpoints.loading import load_model


def models_of(page: str) -> list[Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.DOTALL)
    assert found is not None
    return list(json.loads(found[1]))


def data_of(page: str) -> list[list[Any]]:
    return list(models_of(page)[0]["surprisal"])


def text_of(page: str) -> str:
    inside = page.partition('class="text surprisals">')[2].partition("</div>")[0]
    return unescape(re.sub(r"<[^>]+>", "", re.sub(r"<i>.*?</i>", "", inside)))


@pytest.mark.parametrize("text", ["The sea was calm.", "'one,' she said, ${x} <b>", "über 日本 🙂\n\n  two"])
def test_the_page_holds_the_text_and_the_losses_of_the_model(text, gptpl, quick, tmp_path):
    outcome = gptpl("inspect", f"checkpoint={quick.run.path}", f"text={text}")
    assert outcome.status == 0, outcome.err
    page = (tmp_path / "inspect.html").read_text(encoding="utf-8")
    assert text_of(page) == text
    ids = list(text.encode())
    net = load_model(quick.run.path / "checkpoints/last.ckpt").net
    with torch.no_grad():
        logits = net(torch.tensor([[256, *ids[:-1]]]))[0]
    losses = F.cross_entropy(logits, torch.tensor(ids), reduction="none")
    rows = data_of(page)
    assert [row[1] for row in rows] == ids
    assert [row[2] for row in rows] == pytest.approx(losses.tolist(), abs=1e-3)
    assert all(len(row[5]) == 5 for row in rows)
    assert outcome.out.splitlines() == [
        f"tokens      {len(ids)}",
        "scored      every token once, from all tokens before it, in a long text from the last 32 to 64"
        " (more context than gptpl evaluate gives)",
        f"loss        {losses.mean():.4f} nats per token",
        f"perplexity  {losses.mean().exp():.2f}",
        "page        inspect.html",
    ]


def test_a_long_file_and_another_place(gptpl, quick, tmp_path):
    text = "All the words of a longer text. " * 20
    (tmp_path / "a, b.txt").write_text(text + "\n", encoding="utf-8")
    (tmp_path / "pages").mkdir()
    outcome = gptpl(
        *("inspect", f"checkpoint={quick.run.path}", "text_file=a, b.txt"),
        *("output=pages/x (1).html", "alternatives=2"),
    )
    assert outcome.status == 0, outcome.err
    page = (tmp_path / "pages/x (1).html").read_text(encoding="utf-8")
    assert text_of(page) == text
    assert {len(row[5]) for row in data_of(page)} == {2}
    assert sorted(path.name for path in tmp_path.rglob("*.html")) == ["x (1).html"]


def test_chosen_tabs_of_two_models(gptpl, quick, tmp_path):
    first, last = (quick.run.path / f"checkpoints/{name}.ckpt" for name in ("best", "last"))
    given = ("tabs=[lens,steps]", "max_tokens=5")
    outcome = gptpl("inspect", f"checkpoint={first}", f"beside={last}", "text=over the sea", *given)
    assert outcome.status == 0, outcome.err
    page = (tmp_path / "inspect.html").read_text(encoding="utf-8")
    assert page.count("<dt>checkpoint</dt>") == 2
    for model in models_of(page):
        assert list(model) == ["lens", "steps", "read"]
        assert model["read"] == ["<|endoftext|>", *"over"]


def test_bytes_of_a_character_can_be_told_apart(gptpl, quick, tmp_path):
    assert gptpl("inspect", f"checkpoint={quick.run.path}", "text=a🙂", "alternatives=257").status == 0
    rows = data_of((tmp_path / "inspect.html").read_text(encoding="utf-8"))
    assert [row[0] for row in rows] == ["a", r"\xf0", r"\x9f", r"\x99", "🙂"]
    assert len({shown for shown, _, _ in rows[0][5]}) > 250


def test_an_empty_file_is_named(refused, quick, tmp_path):
    (tmp_path / "empty.txt").write_text("\n", encoding="utf-8")
    line = refused("inspect", f"checkpoint={quick.run.path}", "text_file=empty.txt")
    assert "text_file=empty.txt is empty" in line


def test_a_file_that_is_not_utf8_is_named(refused, quick, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    line = refused("inspect", f"checkpoint={quick.run.path}", "text_file=latin.txt")
    assert "text_file=latin.txt is not UTF-8 (byte 3 is 0xe9)" in line


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((), ["text is not set", "text_file=FILE"]),
        (("text=",), ["the text is empty"]),
        (("text=a", "text_file=b"), ["text= and text_file= are both set"]),
        (("text_file=nowhere.txt",), ["text_file=nowhere.txt", "No such file"]),
        (("text=a", "output=no/where.html"), ["output=no/where.html", "folder that exists"]),
        (("text=a", "output=."), ["output=."]),
        (("text=a", "alternatives=-1"), ["alternatives must be 0 to 257, got -1"]),
        (("text=a", "alternatives=999"), ["alternatives must be 0 to 257, got 999"]),
        (("text=a", "tabs=[attenton]"), ["tabs has no attenton: choose of surprisal, attention"]),
        (("text=a", "tabs=[]"), ["tabs is empty"]),
        (("text=a", "max_tokens=1"), ["max_tokens must be at least 2, got 1"]),
        (("text=a", "beside=nowhere"), ["beside=nowhere"]),
        (("text=a", "device=tpu"), ["device must be one of", "got tpu"]),
        (("txt=a",), ["did you mean text?"]),
    ],
)
def test_wrong_settings_are_refused(given, words, refused, quick):
    line = refused("inspect", f"checkpoint={quick.run.path}", *given)
    assert all(word in line for word in words), line
