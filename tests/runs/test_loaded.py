"""`gptpl.load`: what it gives is what the commands give, and what plain loops over the same tokens give."""

# T tokens in a sequence

import contextlib
import csv
import io
import json
import math
import os
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml

from gptpl.checkpoints.loading import load_model
from gptpl.cli.main import main
from gptpl.data.pretraining.datamodule import TextDataModule
from gptpl.data.sources import TextFiles
from gptpl.errors import InputError
from gptpl.files.durable import PartialResults
from gptpl.model.inference import can_multiply_int8
from gptpl.runs.export import export
from gptpl.runs.loaded import load
from gptpl.runs.models import Classifier, InstructionModel, LanguageModel
from gptpl.tokenizers import WordsTokenizer

TINY = (
    *("trainer=cpu", "trainer.precision=32-true", "tokenizer=bytes", "model=tiny", "model.context_length=32"),
    *("model.n_layers=1", "model.emb_dim=16", "model.n_heads=2", "model.drop_rate=0", "eval_every_n_steps=4"),
    *("scheduler.warmup_steps=1", "trainer.max_steps=8", "optimizer.lr=1e-2", "run_dir=run"),
)
needs_int8 = pytest.mark.skipif(not can_multiply_int8(), reason="int8 products are FBGEMM's, for x86 alone")
MARKER = "\n> "
ENTRIES = [{"instruction": f"Say {n}.", "input": "", "output": f"No {n}!"} for n in range(40)]


def gptpl(*arguments: str, cwd: Path) -> str:
    """What a command prints; it must succeed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(list(arguments))
    assert status == 0, err.getvalue()
    return out.getvalue()


@pytest.fixture(scope="module", autouse=True)
def _own_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = dict(os.environ)
    os.environ["GPTPL_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a text of its own, `text.txt` beside it."""
    folder = tmp_path_factory.mktemp("pretrained")
    draw = random.Random(0)
    (folder / "text.txt").write_text("".join(draw.choice("abcdefgh ") for _ in range(3000)))
    gptpl("train", *TINY, "data=text_file", f"data.path={folder / 'text.txt'}", cwd=folder)
    return folder / "run"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned")
    (folder / "entries.json").write_text(json.dumps(ENTRIES))
    gptpl(
        *("train", *TINY, "task=instruct", "data=instruction_file", f"data.path={folder / 'entries.json'}"),
        *("data.template='{{ instruction }}{{ input }}'", f"data.response_marker={MARKER}"),
        *("data.shuffle=false", "data.mask_instruction=true", "callbacks.sample_responses.entries=1"),
        cwd=folder,
    )
    return folder / "run"


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    draw = random.Random(0)
    rows = [("good", "o") if draw.random() < 0.5 else ("bad", "u") for _ in range(90)]
    lines = [f"{label},{letter}{draw.choice('xyz')}{i}" for i, (label, letter) in enumerate(rows)]
    (folder / "texts.csv").write_text("\n".join(["label,text", *lines]))
    gptpl(
        *("train", *TINY, "task=classify", "data=labelled", f"data.path={folder / 'texts.csv'}", "tune=all"),
        cwd=folder,
    )
    return folder / "run"


@pytest.fixture
def copied(pretrained: Path, tmp_path: Path) -> Path:
    """The run's folder, to be changed."""
    shutil.copytree(pretrained, tmp_path / "copy", symlinks=True)
    return tmp_path / "copy"


def language_model(source: Path | str, **settings: Any) -> LanguageModel:
    model = load(source, device="cpu", **settings)
    assert isinstance(model, LanguageModel)
    return model


def greedy(net: Any, ids: list[int], count: int) -> list[int]:
    """The tokens that follow by a plain loop, end-of-text included."""
    made: list[int] = []
    while len(made) < count and 256 not in made:
        with torch.no_grad():
            made.append(int(net(torch.tensor([[*ids, *made][-32:]]))[0, -1].argmax()))
    return made


def plain_loss(net: Any, tokens: list[int], T: int) -> float:
    """Mean nats a token, each scored once, from the tokens before it in its sequence of T."""
    losses: list[float] = []
    for start in range(0, len(tokens) - 1, T):
        part = torch.tensor(tokens[start : start + T + 1])
        with torch.no_grad():
            losses += F.cross_entropy(net(part[None, :-1])[0], part[1:], reduction="none").tolist()
    return math.fsum(losses) / len(losses)


# --- what is loaded -------------------------------------------------------------------------------------


def test_a_run_its_files_and_its_export_are_the_same_model(pretrained: Path, tmp_path: Path) -> None:
    gptpl("weights", "convert", f"checkpoint={pretrained}", "format=hf", "output=hf", cwd=tmp_path)
    last = pretrained / "checkpoints/last.ckpt"
    texts = {
        language_model(source).generate("ab", temperature=0, max_new_tokens=9)
        for source in (pretrained, str(pretrained), last, tmp_path / "hf")
    }
    assert len(texts) == 1
    model = language_model(pretrained)
    assert (model.step, model.path, model.run_dir, model.task["name"]) == (8, last, pretrained, "pretrain")
    assert load_model(str(pretrained)).step == 8


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"precision": "16"}, "precision=16 is unknown"),
        ({"device": "tpu"}, "device must be one of .*, got tpu"),
        ({"base": "elsewhere"}, "base is for an adapter"),
    ],
)
def test_wrong_settings_are_refused(pretrained: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        load(pretrained, **settings)


def test_int8_is_for_language_models_on_a_cpu(
    pretrained: Path, classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="precision=int8: a classifier is read in 32-true"):
        load(classifier, precision="int8")
    monkeypatch.setattr("gptpl.runs.loaded.device_type", lambda device, key: "cuda")
    with pytest.raises(InputError, match="int8 is for CPUs, the device is cuda: give device=cpu or"):
        load(pretrained, precision="int8")
    monkeypatch.undo()
    monkeypatch.setattr("gptpl.model.inference.can_multiply_int8", lambda: False)
    with pytest.raises(InputError, match=r"needs an x86 processor.*: use precision=bf16-true"):
        load(pretrained, device="cpu", precision="int8")


@needs_int8
def test_int8_weights_are_used_and_not_exported(pretrained: Path, tmp_path: Path) -> None:
    model, small = language_model(pretrained), language_model(pretrained, precision="int8")
    tokens = torch.tensor([list(b"abcdefgh abc")])
    with torch.inference_mode():
        difference = (small.net(tokens) - model.net(tokens)).abs().max()
    assert 0 < difference < 0.05
    assert small.evaluate().perplexity == pytest.approx(model.evaluate().perplexity, rel=0.002)
    assert small.generate("ab", seed=3, max_new_tokens=9)
    assert small.complete(["ab"], num_beams=2, max_new_tokens=3)
    with pytest.raises(InputError, match=r"this model is a gptpl\.model\.inference\.Int8GPT"):
        export(small, "hf", tmp_path / "hf")


# --- text -----------------------------------------------------------------------------------------------


def test_text_is_that_of_the_command_and_of_a_plain_loop(pretrained: Path, tmp_path: Path) -> None:
    model = language_model(pretrained)
    cases: list[dict[str, Any]] = [{}, {"temperature": 2.0, "top_k": None, "top_p": 0.9}]
    for rules in cases:
        given = [f"{name}={'null' if value is None else value}" for name, value in rules.items()]
        command = ("generate", f"checkpoint={pretrained}", "prompt=ab", "seed=3", "device=cpu", *given)
        text = model.generate("ab", seed=3, **rules)
        assert f"ab{text}\n" == gptpl(*command, cwd=tmp_path)
        assert "".join(model.stream("ab", seed=3, **rules)) == text
    ids = greedy(model.net, list(b"ab"), 40)
    assert model.generate("ab", temperature=0, max_new_tokens=40) == bytes(ids).decode(errors="replace")


def test_several_texts_beams_and_stops(pretrained: Path) -> None:
    model = language_model(pretrained)
    made = model.complete(["ab", "c"], num_samples=2, temperature=3, seed=1, max_new_tokens=6)
    assert [(each.prompt, each.sample, len(each.tokens)) for each in made] == [
        (0, 0, 6), (0, 1, 6), (1, 0, 6), (1, 1, 6),
    ]  # fmt: skip
    stop = made[0].text[2:4]
    [stopped] = model.complete(["ab"], stop=[stop], temperature=3, seed=1, max_new_tokens=6)
    assert stopped.text == made[0].text[:2]
    beams = model.complete(["ab", "c"], num_beams=3, num_samples=2, max_new_tokens=4)
    assert [(each.prompt, each.sample) for each in beams] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for wrong in ({"num_beams": 1, "num_samples": 2}, {"num_beams": 2, "stop": ["a"]}, {"tempratur": 1}):
        with pytest.raises(InputError):
            model.complete(["a"], **wrong)
    for method in (model.generate, model.stream):
        with pytest.raises(InputError, match="prompt must be one text, got list: several are for complete"):
            method(["a", "b"])  # type: ignore[arg-type]


def test_surprisals_statistics_and_memorisation(pretrained: Path) -> None:
    model = language_model(pretrained)
    text = "abc de"
    found = model.inspect(text)
    with torch.no_grad():
        logits = model.net(torch.tensor([[256, *text[:-1].encode()]]))[0]
    losses = F.cross_entropy(logits, torch.tensor(list(text.encode())), reduction="none")
    assert [each.surprisal for each in found.tokens] == pytest.approx(losses.tolist(), abs=1e-4)
    assert found.perplexity == pytest.approx(float(losses.mean().exp()), rel=1e-4)
    assert "".join(found.texts) == text
    assert found.page().startswith("<!DOCTYPE html>")
    made = model.complete(["ab"], num_samples=2, seed=1, alternatives=0)
    learned = (pretrained.parent / "text.txt").read_bytes()[:2700]
    for each, memory in zip(made, model.memorisation(made), strict=True):
        written = bytes(token % 256 for token in each.tokens)  # end-of-text, 256, is in no text
        parts = [(i, j) for i in range(51) for j in range(i, 51) if written[i:j] in learned]
        assert memory.longest_run == max(j - i for i, j in parts)
    assert model.statistics(made).distinct_1 == len({t for m in made for t in m.tokens}) / 100


# --- evaluation -----------------------------------------------------------------------------------------


def test_a_model_is_evaluated_on_its_own_validation_text(pretrained: Path, tmp_path: Path) -> None:
    model = language_model(pretrained)
    tokens = list((pretrained.parent / "text.txt").read_bytes())
    found = model.evaluate()
    assert found.loss == pytest.approx(plain_loss(model.net, tokens[2700:], T=32), abs=1e-4)
    assert found.tokens == 299
    assert model.evaluate(split="all", max_length=10).loss == pytest.approx(
        plain_loss(model.net, tokens, T=10), abs=1e-4
    )
    printed = gptpl("evaluate", f"checkpoint={pretrained}", "device=cpu", cwd=tmp_path)
    assert f"loss        {found.loss:.4f} nats" in printed
    assert "laid end to end" in printed
    tale = gptpl("evaluate", f"checkpoint={pretrained}", "device=cpu", "data=tale", cwd=tmp_path)
    assert "data        tale, split val" in tale
    assert f"loss        {found.loss:.4f} nats" not in tale


def test_a_model_is_evaluated_on_a_file_a_corpus_and_a_datamodule(pretrained: Path, tmp_path: Path) -> None:
    model = language_model(pretrained)
    path = tmp_path / "other.txt"
    path.write_text("hgf edc ba " * 30)
    tokens = list(path.read_bytes())
    whole = plain_loss(model.net, tokens, T=32)
    for data in (path, str(path), TextFiles(path)):
        assert model.evaluate(data).loss == pytest.approx(whole, abs=1e-4)
    settings: dict[str, Any] = {"corpus": TextFiles(path), "max_length": 7, "stride": 7, "batch_size": 3}
    datamodule = TextDataModule(tokenizer=model.tokenizer, **settings)
    assert model.evaluate(datamodule).loss == pytest.approx(
        plain_loss(model.net, tokens[297:], T=7), abs=1e-4
    )
    with pytest.raises(InputError, match="which is not the model's"):
        model.evaluate(TextDataModule(tokenizer=WordsTokenizer(), **settings))
    with pytest.raises(InputError, match="longer than the model's context of 32"):
        model.evaluate(path, max_length=33)
    with pytest.raises(InputError, match="split=test is unknown"):
        model.evaluate(split="test")


def test_a_text_that_was_changed_is_not_the_runs_own(copied: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((copied / "config.yaml").read_text())
    (tmp_path / "changed.txt").write_text("abc " * 500)
    config["data"]["corpus"]["path"] = str(tmp_path / "changed.txt")
    (copied / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(InputError, match="not what its model was trained on"):
        language_model(copied).evaluate()


def test_a_lone_checkpoint_opens_nothing_that_it_names(
    pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(pretrained / "checkpoints/last.ckpt", tmp_path / "lone.ckpt")
    model = language_model(tmp_path / "lone.ckpt")
    monkeypatch.setattr(TextFiles, "files", lambda self: pytest.fail("a file was looked for"))
    with pytest.raises(InputError, match="is not in a run's folder"):
        model.evaluate()
    assert model.memorisation([]) == []  # the text that it was trained on, in this machine's cache
    monkeypatch.setenv("GPTPL_CACHE", str(tmp_path / "empty"))
    with pytest.raises(InputError, match="is not in this machine's cache of encoded texts"):
        model.memorisation([])


STRANGERS_MODULE = """
from pathlib import Path
from gptpl.data.sources import TextFiles
Path({mark!r}).touch()
class Theirs(TextFiles): pass
"""


def test_a_strangers_run_calls_only_what_is_trusted(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "strangers_pkg.py").write_text(STRANGERS_MODULE.format(mark=str(tmp_path / "imported")))
    monkeypatch.syspath_prepend(str(tmp_path))
    config = yaml.safe_load((copied / "config.yaml").read_text())

    def evaluated(slot: str, target: str, **settings: Any) -> None:
        changed = json.loads(json.dumps(config))
        node = changed["data"] if slot == "data" else changed["data"]["corpus"]
        node["_target_"] = target
        (copied / "config.yaml").write_text(yaml.safe_dump(changed))
        language_model(copied, **settings).evaluate()

    for slot in ("data", "corpus"):
        for target in ("pathlib.Path", "strangers_pkg.Theirs", "os.system", ""):
            with pytest.raises(InputError, match="neither gptpl's nor trusted"):
                evaluated(slot, target)
        for target in ("gptpl.files.download.download", "gptpl.callbacks.checkpoints.LastCheckpoint"):
            with pytest.raises(InputError, match="is not a "):
                evaluated(slot, target)
    assert not (tmp_path / "imported").exists()
    try:
        with pytest.raises(InputError, match="not what its model was trained on"):  # by another class
            evaluated("corpus", "strangers_pkg.Theirs", trust=["strangers_pkg"])
        assert (tmp_path / "imported").exists()
    finally:
        sys.modules.pop("strangers_pkg", None)


# --- instructions ---------------------------------------------------------------------------------------


def test_answers_are_those_of_a_plain_loop_and_of_the_command(tuned: Path, tmp_path: Path) -> None:
    model = load(tuned, device="cpu")
    assert isinstance(model, InstructionModel)
    ids = greedy(model.net, list(f"Say 3.{MARKER}".encode()), 9)
    text = bytes(token for token in ids if token != 256).decode(errors="replace").strip()
    assert model.respond("Say 3.", max_new_tokens=9) == text
    given = ("respond", f"checkpoint={tuned}", "instruction=Say 3.", "device=cpu", "max_new_tokens=9")
    assert gptpl(*given, cwd=tmp_path) == f"{text}\n"
    assert "".join(model.stream_response("Say 3.", max_new_tokens=9)).strip() == text
    drawn = model.respond("Say 3.", max_new_tokens=9, temperature=2, seed=5)
    assert gptpl(*given, "temperature=2", "seed=5", cwd=tmp_path) == f"{drawn}\n"


def test_many_answers_resume_where_they_were_interrupted(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tuned, device="cpu")
    assert isinstance(model, InstructionModel)
    settings: dict[str, Any] = {"batch_size": 2, "max_new_tokens": 4, "temperature": 2.0, "seed": 1}
    records = ENTRIES[:5]
    whole = model.respond_all(records, output=tmp_path / "a.json", **settings)
    assert [(each["instruction"], each["output"]) for each in whole] == [
        (each["instruction"], each["output"]) for each in records
    ]
    add = PartialResults.add

    def interrupt(self: PartialResults, values: Any) -> None:
        if self.values:
            raise KeyboardInterrupt
        add(self, values)

    with monkeypatch.context() as patched:
        patched.setattr(PartialResults, "add", interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.respond_all(records, output=tmp_path / "b.json", **settings)
    seen: list[list[int]] = []

    def progress(batches: Any) -> Any:
        seen.append(list(batches))
        return batches

    again = model.respond_all(records, output=tmp_path / "b.json", progress=progress, **settings)
    assert again == whole == json.loads((tmp_path / "b.json").read_text())
    assert seen == [[2, 4]]
    own = model.respond_all("test", output=tmp_path / "c.json", max_new_tokens=1)
    assert [each["instruction"] for each in own] == [each["instruction"] for each in ENTRIES[34:38]]


def test_a_tuned_model_is_evaluated_on_its_own_answers(tuned: Path, tmp_path: Path) -> None:
    model = language_model(tuned)

    def plain(entries: list[dict[str, str]]) -> float:
        losses: list[float] = []
        for entry in entries:
            prompt = f"{entry['instruction']}{MARKER}".encode()
            tokens = torch.tensor([*prompt, *entry["output"].encode(), 256])
            with torch.no_grad():
                each = F.cross_entropy(model.net(tokens[None, :-1])[0], tokens[1:], reduction="none")
            losses += each[len(prompt) - 1 :].tolist()
        return math.fsum(losses) / len(losses)

    assert model.evaluate().loss == pytest.approx(plain(ENTRIES[38:]), abs=1e-4)
    assert model.evaluate(split="test").loss == pytest.approx(plain(ENTRIES[34:38]), abs=1e-4)
    (tmp_path / "all.json").write_text(json.dumps(ENTRIES))
    assert model.evaluate(tmp_path / "all.json").loss == pytest.approx(plain(ENTRIES), abs=1e-4)


# --- classes --------------------------------------------------------------------------------------------


def test_a_classifier_is_evaluated_on_its_own_test_texts(classifier: Path, pretrained: Path) -> None:
    model = load(classifier, device="cpu")
    assert isinstance(model, Classifier)
    assert model.path.name == "best.ckpt"
    with (classifier / "data/test.csv").open(newline="") as file:
        rows = [(row["text"], row["label"]) for row in csv.DictReader(file)]
    losses, right = [], 0
    for text, label in rows:
        ids = torch.tensor([list(text.encode())])
        with torch.no_grad():
            logits = model.net(ids, torch.tensor([ids.shape[1]]))[0]
        right += model.labels[int(logits.argmax())] == label
        losses.append(float(F.cross_entropy(logits, torch.tensor(model.labels.index(label)))))
    found = model.evaluate()
    assert found.scores.accuracy == right / len(rows)
    assert found.loss == pytest.approx(math.fsum(losses) / len(rows), abs=1e-4)
    assert found.texts == len(rows)
    again = model.evaluate(classifier / "data/test.csv")
    assert (again.loss, again.texts) == (found.loss, found.texts)
    predicted = model.classify([text for text, _ in rows])
    assert sum(each.label == label for each, (_, label) in zip(predicted, rows, strict=True)) == right
    [alone] = model.classify(rows[0][0])  # a batch of one may be computed by another kernel
    assert alone.probabilities == pytest.approx(predicted[0].probabilities, abs=1e-6)
    assert (alone.text, alone.label) == (predicted[0].text, predicted[0].label)
    made = model.classify_file(classifier / "data/test.csv", output=classifier.parent / "made.csv")
    with made.open(newline="") as file:
        assert [(row["text"], row["label"]) for row in csv.DictReader(file)] == [
            (each.text, each.label) for each in predicted
        ]
    with pytest.raises(InputError, match="does not know"):
        model.evaluate(_labelled(classifier.parent / "other.csv"))


def _labelled(path: Path) -> Path:
    path.write_text("label,text\nfine,x\n")
    return path
