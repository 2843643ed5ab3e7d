"""Training a classifier and using it, as a user would: the commands, their files, and what they refuse."""

import csv
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GPT2ForSequenceClassification

import gptpl

TINY = (
    *("trainer=cpu", "trainer.precision=32-true", "tokenizer=bytes", "model=tiny", "model.context_length=32"),
    *("model.n_layers=1", "model.emb_dim=16", "model.n_heads=2"),
)
CLASSIFY = (
    *("train", *TINY, "task=classify", "data=labelled", "data.path=texts.csv", "data.duplicates=group"),
    *("tune=all", "optimizer.lr=1e-2", "scheduler.warmup_steps=1", "eval_every_n_steps=5"),
)


def write_texts(path: Path) -> None:
    """96 texts: "good" where there is an o in them; some are there twice."""
    draw = random.Random(0)
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["label", "text"])
        for i in range(96):
            label = draw.choice(["good", "bad"])
            text = "".join(draw.choice("xyz, ") for _ in range(draw.randrange(1, 9)))
            rows.writerow([label, ("o" if label == "good" else "u") + text + ("" if i % 3 else str(i))])


@pytest.fixture(scope="module")
def trained(command: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A classifier after 12 steps. Copy its folder before changing anything in it."""
    folder = tmp_path_factory.mktemp("classifier")
    write_texts(folder / "texts.csv")
    outcome = command(*CLASSIFY, "run_dir=run", "trainer.max_steps=12", cwd=folder)
    assert outcome.status == 0, outcome.err
    return outcome


@pytest.fixture
def run(trained: Any, tmp_path: Path) -> Path:
    """A copy of the run, named `run`, in the test's folder."""
    shutil.copytree(trained.folder / "run", tmp_path / "run", symlinks=True)
    shutil.copy(trained.folder / "texts.csv", tmp_path)
    return tmp_path / "run"


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# --- training -------------------------------------------------------------------------------------------


def test_a_run_leaves_its_splits_pictures_and_test_scores(trained: Any) -> None:
    folder = trained.run.path
    assert {"confusion.png", "calibration.png", "loss.png", "checkpoints/best.ckpt"} <= trained.run.files
    splits = {name: rows_of(folder / f"data/{name}.csv") for name in ("train", "validation", "test")}
    whole = rows_of(trained.folder / "texts.csv")
    kept = [(row["text"], row["label"]) for rows in splits.values() for row in rows]
    assert sorted(kept) == sorted((row["text"], row["label"]) for row in whole)
    texts = [{row["text"] for row in rows} for rows in splits.values()]
    assert not texts[0] & texts[1] | texts[0] & texts[2] | texts[1] & texts[2]
    metrics = trained.run.record["metrics"]
    assert 0.4 < metrics["test/accuracy"] < 1
    assert metrics["test/f1"] == pytest.approx((metrics["test/f1_bad"] + metrics["test/f1_good"]) / 2)
    assert {"best_train/accuracy", "best_val/accuracy", "test/calibration_error", "val/f1"} <= metrics.keys()
    assert "test, best weights: accuracy" in trained.err


def test_test_scores_are_those_of_the_best_weights(trained: Any, command: Any) -> None:
    found = command("evaluate", "checkpoint=run", "split=test", "device=cpu", cwd=trained.folder)
    assert found.status == 0, found.err
    values = dict(line.rsplit(maxsplit=1) for line in found.out.splitlines()[2:5])
    metrics = trained.run.record["metrics"]
    assert values["accuracy"] == f"{metrics['test/accuracy']:.2%}"
    assert values["F1, mean"] == f"{metrics['test/f1']:.4f}"
    assert values["calibration error"] == f"{metrics['test/calibration_error']:.4f}"
    assert "best.ckpt" in found.err
    own = command(
        *("evaluate", "checkpoint=run", "data=labelled", "data.path=run/data/test.csv", "split=all"),
        *("device=cpu",),
        cwd=trained.folder,
    )
    assert own.out.splitlines()[1:] == found.out.splitlines()[1:]


def test_a_resumed_run_ends_as_the_unbroken_one(trained: Any, gptpl: Any, tmp_path: Path) -> None:
    shutil.copy(trained.folder / "texts.csv", tmp_path)
    settings = (*CLASSIFY, "run_dir=run", "trainer.max_steps=12", "trainer.stop_at_step=7")
    assert gptpl(*settings).status == 0
    outcome = gptpl("train", "resume=run")
    assert outcome.status == 0, outcome.err
    whole, resumed = (each.run.checkpoint("last")["state_dict"] for each in (trained, outcome))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    assert outcome.run.record["metrics"]["test/loss"] == trained.run.record["metrics"]["test/loss"]


def test_a_run_is_not_resumed_with_other_texts(run: Path, refused: Any, tmp_path: Path) -> None:
    text = (tmp_path / "texts.csv").read_text()
    (tmp_path / "texts.csv").write_text(text.replace("good", "bad", 1))
    line = refused("train", "resume=run", "trainer.max_steps=14", "data.path=texts.csv")
    assert "data.path=texts.csv holds another text" in line


def test_a_file_that_was_cut_off_at_the_end_of_a_row_is_noticed(
    run: Path, refused: Any, tmp_path: Path
) -> None:
    """Such a file is valid: only the recorded number of rows shows that some are missing."""
    rows = (tmp_path / "texts.csv").read_text().splitlines(keepends=True)
    (tmp_path / "texts.csv").write_text("".join(rows[:90]))
    assert json.loads((run / "run.json").read_text())["data"]["rows"] == 96
    line = refused("train", "resume=run", "trainer.max_steps=14", "data.path=texts.csv")
    assert "89 rows, not 96" in line


def test_a_sweep_takes_its_settings_and_metrics(
    gptpl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_program: tuple[str, ...]
) -> None:
    """The trials are those of a program that writes the F1 score 1 - seed / 10 at their end."""
    monkeypatch.setattr("gptpl.sweeps.worker.PROGRAM", (*fake_program, "record=own"))
    page = SimpleNamespace(page="report.html")
    monkeypatch.setattr("gptpl.cli.commands.sweep.report", lambda *args, **settings: page)
    write_texts(tmp_path / "texts.csv")
    outcome = gptpl("sweep", *CLASSIFY[1:], "seed=1,3", "sweep.metric=val/f1", "hydra.sweep.dir=s")
    assert outcome.status == 0, outcome.err
    rows = rows_of(tmp_path / "s/results.csv")
    assert [(row["overrides"], row["state"]) for row in rows] == [
        ("seed=1", "finished"),
        ("seed=3", "finished"),
    ]
    assert [float(row["best_val/f1"]) for row in rows] == pytest.approx([0.9, 0.7])


def test_a_classifier_begins_with_a_run_and_its_words(gptpl: Any, words: Any, tmp_path: Path) -> None:
    rows = [
        f"{'old' if i % 2 else 'tall'},The {noun} sang {i}" for i in range(40) for noun in ("pilot", "seal")
    ]
    (tmp_path / "texts.csv").write_text("\n".join(["label,text", *rows]))
    outcome = gptpl(
        *("train", "task=classify", "data=labelled", "data.path=texts.csv", "model=tiny", "tokenizer=words"),
        *("model.context_length=16", "init=run", f"init.checkpoint={words.run.path}", "run_dir=run"),
        *("trainer=cpu", "trainer.precision=32-true", "trainer.max_steps=2", "scheduler.warmup_steps=1"),
    )
    assert outcome.status == 0, outcome.err
    header = outcome.run.checkpoint("last")["gptpl"]
    assert header["tokenizer"] == words.run.checkpoint("last")["gptpl"]["tokenizer"]
    assert header["start"]["init"] == "run"
    answered = gptpl("classify", "checkpoint=run", "text=The old pilot sang", "device=cpu")
    assert answered.status == 0, answered.err


# --- a filter -------------------------------------------------------------------------------------------


def test_a_classifier_is_a_filter(trained: Any, command: Any, tmp_path: Path) -> None:
    """The oracle: the probabilities that `gptpl classify` prints."""
    texts = ["oxx yz", "uzz", "o, o", "xyz u"]
    (tmp_path / "many.txt").write_text("\n".join(texts))
    found = command(
        *("classify", "checkpoint=run", f"file={tmp_path / 'many.txt'}", "--json", "device=cpu"),
        cwd=trained.folder,
    )
    good = [json.loads(line)["probabilities"]["good"] for line in found.out.splitlines()]
    between = sum(sorted(good)[1:3]) / 2
    for checkpoint in (trained.run.path, gptpl.load(trained.run.path, device="cpu")):
        rule = gptpl.ClassifierRule(checkpoint=checkpoint, labels=["good"], threshold=between)
        verdicts = [rule.verdict(text) for text in texts]
        assert [bool(verdict.findings) for verdict in verdicts] == [each >= between for each in good]
        assert [verdict.text for verdict in verdicts] == [
            "[withheld: good]" if each >= between else text for each, text in zip(good, texts, strict=True)
        ]
        stream = rule.stream()
        assert [stream.feed(each) for each in texts[0]] == [""] * len(texts[0])
        assert stream.finish() == verdicts[0].text
        assert rule.verdict("").findings == ()


def test_a_filter_reads_a_long_text_to_its_end(trained: Any) -> None:
    """The oracle: the most probable of all pieces that the classifier reads alone, wherever they begin."""
    model = gptpl.load(trained.run.path, device="cpu")
    L, draw = model.max_length, random.Random(0)

    def probable(text: str) -> float:
        [prediction] = model.predictions([text])
        return dict(zip(prediction.labels, prediction.probabilities, strict=True))["good"]

    texts = ["".join(draw.choices("ouxyz ,", k=L)) for _ in range(40)]  # a byte or character is a token
    assert all(len(model.tokenizer.encode(text)) == L for text in texts)
    mild, strong = min(texts, key=probable), max(texts, key=probable)
    step = L // 2
    for text in (mild + mild[:step] + strong, mild * 3 + strong[: L - 1], mild, mild * 2 + "o"):
        starts = [at for at in range(0, len(text), step) if at == 0 or at + L - step < len(text)]
        worst = max(probable(text[at : at + L]) for at in starts)
        for threshold, found in ((worst - 1e-4, True), (worst + 1e-4, False)):
            rule = gptpl.ClassifierRule(checkpoint=model, labels=["good"], threshold=threshold)
            assert bool(rule.verdict(text).findings) is found
    rule = gptpl.ClassifierRule(checkpoint=model, labels=["good"], threshold=probable(strong) - 1e-4)
    assert rule.verdict(mild * 4 + strong).findings
    assert not rule.verdict(mild * 4 + mild).findings


def test_a_classifier_filters_what_another_model_writes(
    trained: Any, quick: Any, command: Any, tmp_path: Path
) -> None:
    by_label = ("filter=classifier", f"filter.checkpoint={trained.run.path}", "filter.labels=[good,bad]")
    generate = ("generate", f"checkpoint={quick.run.path}", "max_new_tokens=5", "seed=1", "device=cpu")
    written = command(*generate, "prompt=A", cwd=tmp_path).out
    outcome = command(*generate, "prompt=A", *by_label, "filter.action=report", cwd=tmp_path)
    assert outcome.out == written
    label = outcome.err.splitlines()[-1].removeprefix("filter: 1 of 1 text: ").removesuffix(" 1")
    assert label in ("good", "bad")
    withheld = command(*generate, "prompt=A", *by_label, cwd=tmp_path)
    assert withheld.out == f"A[withheld: {label}]\n"


def test_unsuitable_classifiers_are_refused(trained: Any, quick: Any, refused: Any) -> None:
    def refusal(*given: str) -> Any:
        return refused("generate", f"checkpoint={quick.run.path}", "filter=classifier", *given)

    own = f"filter.checkpoint={trained.run.path}"
    assert "is a language model, not a classifier" in refusal(
        f"filter.checkpoint={quick.run.path}", "filter.labels=[good]"
    )
    assert "has no 'goood': did you mean good?; it has bad, good" in refusal(own, "filter.labels=[goood]")
    assert "give one or more of [bad, good]" in refusal(own)
    for threshold in ("0", "1", "-0.5"):
        line = refusal(own, "filter.labels=[good]", f"filter.threshold={threshold}")
        assert "filter.threshold must be above 0 and below 1" in line
    assert "must be 'withhold' or 'report'" in refusal(own, "filter.labels=[good]", "filter.action=mark")
    assert "nothing does not exist" in refusal("filter.checkpoint=nothing", "filter.labels=[good]")
    with pytest.raises(gptpl.InputError, match="threshold must be above 0"):
        gptpl.ClassifierRule(checkpoint=trained.run.path, labels=["good"], threshold=1.0)
    with pytest.raises(gptpl.InputError, match="judges whole texts"):
        gptpl.ClassifierRule(checkpoint=trained.run.path, labels=["good"], action="mark")  # type: ignore[arg-type]


# --- using it -------------------------------------------------------------------------------------------


def test_one_text_gets_the_probabilities_of_all_classes(trained: Any, command: Any) -> None:
    outcome = command("classify", "checkpoint=run", "text=oxx yz", "device=cpu", cwd=trained.folder)
    assert outcome.status == 0, outcome.err
    chances = {label: float(chance) for label, chance in map(str.split, outcome.out.splitlines())}
    assert list(chances) == ["good", "bad"]
    assert sum(chances.values()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("name", ["many.csv", "many.jsonl", "many.txt"])
def test_a_file_is_answered_in_its_order(trained: Any, gptpl: Any, tmp_path: Path, name: str) -> None:
    texts = [("o" if i % 3 else "u") * (1 + i % 40) for i in range(70)]
    lines = {
        "many.csv": ["id,body", *(f"{i},{text}" for i, text in enumerate(texts))],
        "many.jsonl": [json.dumps({"body": text}) for text in texts],
        "many.txt": texts,
    }
    (tmp_path / name).write_text("\n".join(lines[name]))
    run = f"checkpoint={trained.run.path}"
    outcome = gptpl(
        "classify", run, f"file={name}", "text_column=body", "--json", "batch_size=3", "device=cpu"
    )
    assert outcome.status == 0, outcome.err
    found = [json.loads(line) for line in outcome.out.splitlines()]
    assert [each["text"] for each in found] == texts
    assert [each["lost_tokens"] for each in found] == [max(0, len(text) - 32) for text in texts]
    assert "8 texts are longer than the 32 tokens" in outcome.err
    again = gptpl("classify", run, f"file={name}", "text_column=body", "output=a.csv", "device=cpu")
    assert (again.status, again.out) == (0, "a.csv\n"), again.err
    rows = rows_of(tmp_path / "a.csv")
    assert [(row["label"], row["text"]) for row in rows] == [(each["label"], each["text"]) for each in found]
    for row, each in zip(rows, found, strict=True):
        assert float(row["probability_bad"]) == pytest.approx(each["probabilities"]["bad"], abs=1e-6)


def test_a_broken_line_leaves_no_output(trained: Any, refused: Any, tmp_path: Path) -> None:
    (tmp_path / "many.jsonl").write_text('{"text": "o"}\n' * 300 + "{\n")
    run = f"checkpoint={trained.run.path}"
    assert "line 301 is not valid JSON" in refused(
        "classify", run, "file=many.jsonl", "output=a.csv", "device=cpu"
    )


def test_transformers_opens_the_export_with_the_same_logits(run: Path, gptpl: Any, tmp_path: Path) -> None:
    outcome = gptpl("weights", "convert", "checkpoint=run", "format=hf", "output=hf")
    assert (outcome.status, outcome.out) == (0, "hf\n"), outcome.err
    assert "verified: the logits of 3 padded texts differ by" in outcome.err
    theirs = GPT2ForSequenceClassification.from_pretrained(tmp_path / "hf").eval()
    texts = ["oxx", "u", "xyzo, zz"]
    rows = [list(text.encode()) for text in texts]
    tokens = torch.tensor([row + [256] * (8 - len(row)) for row in rows])
    with torch.no_grad():
        logits = theirs(tokens).logits
    (tmp_path / "t.txt").write_text("\n".join(texts))
    for checkpoint in ("run", "hf"):
        ours = gptpl("classify", f"checkpoint={checkpoint}", "file=t.txt", "--json", "device=cpu")
        found = [json.loads(line)["probabilities"] for line in ours.out.splitlines()]
        chances = torch.tensor([[each["bad"], each["good"]] for each in found])
        torch.testing.assert_close(chances, logits.softmax(1), atol=1e-5, rtol=0)
    assert "text-classification" in (tmp_path / "hf/README.md").read_text()


# --- what is refused ------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_task_is_refused_both_ways(
    trained: Any, quick: Any, refused: Callable[..., str]
) -> None:
    classifier, model = trained.run.path, quick.run.path
    for command in ("generate", "inspect"):
        said = refused(
            command, f"checkpoint={classifier}", "device=cpu", *(["text=a"] * (command == "inspect"))
        )
        assert "is a classifier, which writes no text: use gptpl classify" in said
    said = refused("classify", f"checkpoint={model}", "text=a")
    assert "is a language model, not a classifier: train one with gptpl train task=classify" in said
    said = refused("train", *TINY, "init=run", f"init.checkpoint={classifier}")
    assert "is a classifier, which writes no text: give the run that it began with" in said
    said = refused("train", "experiment=quick", "task=classify", "data=tale")
    assert "task=classify cannot train on these data (TextDataModule): choose data=" in said


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["evaluate", "split=all"], "split must be one of train, val, test, got all"),
        (["evaluate", "data=text_file", "split=val"], "is a classifier, but these data have no labels"),
        (["evaluate", "data=labelled", "data.path=texts.csv"], "a given file is not split, give split=all"),
        (
            ["evaluate", "data=labelled", "data.path=other.csv", "split=all"],
            "line 3 has the label 'fine', which the classifier does not know (it has bad, good)",
        ),
        (
            ["evaluate", "data=labelled", "data.path=texts.csv", "split=all", "data.max_length=3"],
            "data.max_length=3 cannot change, a classifier reads texts as in training",
        ),
        (["classify"], "text is not set: give text='...', or file=FILE"),
        (["classify", "text= "], "text is empty"),
        (["classify", "text=a", "file=texts.csv"], "text= and file= are both set"),
        (
            ["classify", "file=texts.csv", "text_column=body"],
            "has no 'body' (it has 'label', 'text')",
        ),
        (["classify", "file=texts.csv", "output=texts.csv"], "output=texts.csv is there already"),
        (["classify", "file=texts.csv", "output=a.xlsx"], "output must be a .csv or .jsonl file, got a.xlsx"),
        (["classify", "file=texts.csv", "output=a.csv", "--json"], "--json and output=a.csv are both set"),
        (
            ["weights", "convert", "format=adapter", "output=b"],
            "checkpoints/best.ckpt was trained with tune=all",
        ),
        (["weights", "convert", "format=book", "output=b"], "format=book holds no classifiers"),
        (
            ["weights", "convert", "format=hf", "output=b", "dtype=bfloat16"],
            "a classifier is written in float32",
        ),
    ],
)
def test_one_line_for_each_mistake(
    run: Path, refused: Callable[..., str], tmp_path: Path, arguments: list[str], said: str
) -> None:
    (tmp_path / "other.csv").write_text("label,text\ngood,a\nfine,b\n")
    assert said in refused(*arguments, f"checkpoint={run}")


@pytest.mark.parametrize(
    "content, settings, said",
    [
        ("label,text\n", [], "has no rows below its header"),
        ("label,text\na,x\na,y\n", [], "all 2 examples have the label 'a'"),
        ("label,text\na,x\nb,y\n", [], "no example is left for validation"),
        ("label,body\na,x\n", [], "has no 'text' (it has 'label', 'body')"),
        ("label,text\na,x\nb,\n", [], "line 3: 'text' is empty"),
        (None, ["data.padding=all"], "data.padding=all: must be "),
        (None, ["data.too_long=refuse", "data.max_length=5"], "texts are longer than 5 tokens"),
        (None, ["task.pooling=last_position"], "set data.padding=longest"),
        (
            None,
            ["task.pooling=first"],
            "task.pooling=first: must be 'last_token' or 'last_position'",
        ),
        (None, ["callbacks=[classify,sample_text]"], "callbacks.sample_text needs a model that writes text"),
        (None, ["data.balans=none"], "data.balans"),
        (
            None,
            ["callbacks.early_stopping.monitor=val/perplexity"],
            "monitor=val/perplexity is not a metric that the task or a callback declares",
        ),
        (None, ["data.max_length=64"], "data.max_length=64 is longer than model.context_length=32"),
    ],
)
def test_one_line_for_each_mistake_in_training(
    refused: Callable[..., str], tmp_path: Path, content: str | None, settings: list[str], said: str
) -> None:
    if content is None:
        write_texts(tmp_path / "texts.csv")
    else:
        (tmp_path / "texts.csv").write_text(content)
    assert said in refused(*CLASSIFY, "run_dir=run", *settings)


def test_embeddings_are_not_counted_in_labelled_texts(trained, gptpl, tmp_path):
    shutil.copy(trained.folder / "texts.csv", tmp_path)
    for command in ("train", "plan"):
        outcome = gptpl(command, *CLASSIFY[1:], "init=cooccurrence")
        assert outcome.status == 2
        assert "CooccurrenceWeights reads plain text, which LabelledDataModule does not have" in outcome.err
