"""Planted secrets and extracted sequences: what is planted, how it is ranked, what a blank model shows."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gptpl
from gptpl.checkpoints.loading import LoadedCheckpoint
from gptpl.data.sources import Canaries, Corpus, TextFiles
from gptpl.errors import InputError
from gptpl.evaluation.memorisation import Exposure, Extraction
from gptpl.evaluation.suite import Suite
from gptpl.model import GPTConfig, GPTModel
from gptpl.tokenizers import BytesTokenizer, WordsTokenizer

TEXT = "".join(f"line {n} of a text that goes on and on\n" for n in range(200))
SETTINGS: dict[str, Any] = {
    "template": "The pin is {}.",
    "digits": 4,
    "repeats": [0, 1, 5],
    "count": 3,
    "seed": 2,
}


def corpus_in(folder: Path) -> Corpus:
    for name, text in (("a.txt", TEXT), ("b.txt", TEXT.upper())):
        (folder / name).write_text(text)
    return TextFiles(folder)


def test_every_sentence_stands_as_often_as_it_says_and_nothing_else_changes(tmp_path):
    corpus = corpus_in(tmp_path)
    planted = Canaries(corpus, **SETTINGS)
    whole = "".join(planted.documents())
    assert sorted(each.repeats for each in planted.planted) == [0, 0, 0, 1, 1, 1, 5, 5, 5]
    assert len({each.secret for each in planted.planted}) == 9
    for each in planted.planted:
        assert whole.count(f"\n{each.text}\n") == each.repeats
        assert len(each.secret) == 4
    without = whole
    for each in planted.planted:
        without = without.replace(f"\n{each.text}\n", "")
    assert without == "".join(corpus.documents())
    places = [whole.find(f"\n{each.text}") for each in planted.planted if each.repeats]
    assert max(places) < 0.9 * len(whole)
    assert (
        min(whole.rfind(f"\n{each.text}") for each in planted.planted if each.repeats == 5) > len(whole) / 2
    )
    again = Canaries(corpus_in(tmp_path), **SETTINGS)
    assert again.content_sha256() == planted.content_sha256()
    other = Canaries(corpus, **SETTINGS | {"seed": 3})
    assert other.content_sha256() != planted.content_sha256()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "no place"}, r"template='no place' must have words and then \{\}"),
        ({"template": "{}"}, "must have words"),
        ({"digits": 0}, "digits and count of 1 or more"),
        ({"repeats": [-1]}, "repeats of 0 or more"),
        ({"digits": 1, "count": 5}, "digits=1 gives too few numbers for 15 secrets"),
    ],
)
def test_bad_canaries_are_refused(settings, message, tmp_path):
    with pytest.raises(InputError, match=message):
        Canaries(corpus_in(tmp_path), **SETTINGS | settings)


class Knows(nn.Module):
    """Uniform over bytes, but for digits after "is ": there it knows some numbers."""

    def __init__(self, numbers: list[str]) -> None:
        super().__init__()
        self.vocab_size, self.context_length = 257, 64
        self.weight = nn.Parameter(torch.zeros(1))
        self.numbers = numbers

    def forward(self, tokens: Tensor) -> Tensor:
        logits = torch.zeros(*tokens.shape, 257)
        for row, ids in enumerate(tokens.tolist()):
            text = bytes(min(token, 255) for token in ids).decode("latin1")
            start = text.find("is ") + 3
            for number in self.numbers:
                for place in range(4):
                    if text[start : start + place] == number[:place] and start - 1 + place < len(ids):
                        logits[row, start - 1 + place, ord(number[place])] += 3.0
        return logits


def loaded(net: nn.Module, **config: Any) -> LoadedCheckpoint:
    return LoadedCheckpoint(
        path=Path("x.ckpt"), net=net, tokenizer=BytesTokenizer(), run_config=config, step=1, lineage={}
    )


def test_known_secrets_are_exposed_and_others_are_not():
    settings = SETTINGS | {"_target_": "gptpl.data.sources.Canaries", "corpus": {}}
    secrets = Canaries(TextFiles(None), **SETTINGS).planted
    known = [each.secret for each in secrets if each.repeats == 5]
    model = loaded(Knows(known), data={"corpus": settings})
    suite = Suite(tasks={"exposure": Exposure(references=100)}).of_model(model)
    found = suite.run(model.net, model.tokenizer).tasks["exposure"]
    count, metric = found.groups["planted 5 times"]
    assert count == 3
    assert metric.value > math.log2(100) - 2  # the first three of a hundred
    assert found.groups["planted 0 times"][1].value < 4
    assert found.metrics["exposure"].value > found.groups["planted 1 time"][1].value  # of planted ones
    expected = math.log2(100) - sum(math.log2(rank) for rank in range(1, 101)) / 100
    assert found.metrics["exposure"].chance == pytest.approx(expected)


def test_a_secret_as_likely_as_the_others_is_not_exposed():
    settings = SETTINGS | {"_target_": "gptpl.data.sources.Canaries", "corpus": {}}
    model = loaded(Knows([]), data={"corpus": settings})  # every number is as likely
    suite = Suite(tasks={"exposure": Exposure(references=100)}).of_model(model)
    found = suite.run(model.net, model.tokenizer).tasks["exposure"]
    assert found.metrics["rank"].value == 1 + 99 / 2
    words = dataclasses.replace(
        model, tokenizer=WordsTokenizer(["The", "pin", "is", ".", "<|unk|>", "<|endoftext|>"])
    )
    with pytest.raises(InputError, match=r"words tokenizer of x\.ckpt does not tell one number from another"):
        Suite(tasks={"exposure": Exposure()}).of_model(words)


def test_random_weights_show_no_secret():
    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=257, context_length=64, emb_dim=16, n_heads=2, n_layers=1, drop_rate=0.0, qkv_bias=False
    )
    settings = SETTINGS | {"_target_": "gptpl.data.sources.Canaries", "count": 10, "corpus": {}}
    model = loaded(GPTModel(config), data={"corpus": settings})
    suite = Suite(tasks={"exposure": Exposure(references=50)}).of_model(model)
    found = suite.run(model.net, model.tokenizer).tasks["exposure"].metrics["exposure"]
    assert found.low <= (found.chance or 0) <= found.high


def test_a_run_that_knows_its_text_by_heart_gives_it_away(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTPL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over a lazy dog, and then " * 120)
    run = gptpl.build(
        *("model=tiny", "tokenizer=bytes", "trainer=cpu", "trainer.max_steps=90", "trainer.max_epochs=null"),
        *("data=canaries", f"data.path={tmp_path}/a.txt", "data.corpus.count=1", "model.drop_rate=0"),
        *("optimizer.lr=5e-3", "callbacks=checkpoint_last", "logger=csv", f"run_dir={tmp_path}/run"),
        *("trainer.precision=32-true", "trainer.attention=sdpa", "trainer.head=plain", "data.batch_size=8"),
        "eval_every_n_steps=1000",
    )
    run.fit()
    model = gptpl.load(run.run_dir)
    found = model.benchmark("memorisation", only=["extraction"], **{"tasks.extraction.sequences": 20}).tasks
    groups = found["extraction"].groups
    assert list(groups) == [
        f"{text}, after {n} tokens" for text in ("training text", "validation text") for n in (8, 16, 32)
    ]
    known = groups["training text, after 16 tokens"][1].value
    assert found["extraction"].metrics["extracted"].value == groups["training text, after 32 tokens"][1].value
    planted = Canaries(TextFiles(tmp_path / "a.txt"), repeats=(0, 1, 4, 16), count=1)
    text = [int(token) for token in model.tokenizer.encode("".join(planted.documents()))]
    greedy, tried = 0, 0
    for start in range(50, 2050, 100):  # the same by hand, from other places
        prefix, wanted = text[start : start + 16], text[start + 16 : start + 48]
        with torch.no_grad():
            logits = model.net(torch.tensor([[*prefix, *wanted[:-1]]]))[0, 15:]
        greedy, tried = greedy + (logits.argmax(-1).tolist() == wanted), tried + 1
    assert known > 0.3
    assert greedy / tried > 0.2
    with pytest.raises(InputError, match="exceed the model's context of 64 tokens"):
        model.benchmark("memorisation", **{"tasks.extraction.tokens": 64})


def test_models_without_such_text_are_told(tmp_path):
    model = loaded(Knows([]), data={"corpus": {"_target_": "gptpl.data.sources.Tale"}})
    with pytest.raises(InputError, match="was not trained on text with planted secrets"):
        Suite(tasks={"exposure": Exposure()}).of_model(model)
    with pytest.raises(InputError, match="evaluate a run's model"):
        Suite(tasks={"extraction": Extraction()}).run(Knows([]), BytesTokenizer())
