"""Training on `data=mixture` and with `data.packing=best_fit`, stopped, resumed and evaluated."""

import json
import re
import shutil
import socket
from pathlib import Path

import pytest

TEXTS = [f"Story {n}: the keeper counted {n * n} gulls and {n + 7} boats. " * (n % 5 + 1) for n in range(120)]
SOURCES = "data.sources={news: {path: news, weight: 3}, tales: {path: tales.jsonl, weight: 1}}"
OF = ("data=mixture", SOURCES, "data.val_tokens=500", "tokenizer=bytes", "model=tiny", "data.max_length=32")
TRAIN = (
    *("train", "trainer=cpu", "trainer.precision=32-true", "scheduler.warmup_steps=1", *OF, "run_dir=run"),
    *("trainer.max_steps=6", "callbacks=checkpoint_last"),
)


def write_texts(folder: Path) -> None:
    (folder / "news").mkdir()
    for n in range(60):
        (folder / "news" / f"{n}.txt").write_text(TEXTS[n])
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[60:])
    (folder / "tales.jsonl").write_text(lines)


@pytest.fixture(autouse=True)
def _texts(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTPL_CACHE", str(tmp_path / "cache"))
    write_texts(tmp_path)


@pytest.fixture(scope="module")
def stopped(command, tmp_path_factory) -> Path:
    """A run on packed documents that was stopped after 3 of its 6 steps, in a folder with its texts."""
    folder = tmp_path_factory.mktemp("stopped")
    write_texts(folder)
    outcome = command(*TRAIN, "data.packing=best_fit", "trainer.stop_at_step=3", cwd=folder)
    assert outcome.status == 0, outcome.err
    return folder


@pytest.fixture
def run(stopped, tmp_path) -> Path:
    """A copy of it in the test's folder, with the texts there."""
    return Path(shutil.copytree(stopped / "run", tmp_path / "run", symlinks=True))


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_a_resumed_run_ends_as_an_uninterrupted_one(gptpl, tmp_path, run_folder, packing):
    steps = (*TRAIN, f"data.packing={packing}")
    outcome = gptpl(*steps, "callbacks=[checkpoint_last,progress_bar]", "run_dir=whole")
    assert outcome.status == 0, outcome.err
    shares = {line.split()[0]: line.split()[-2] for line in outcome.err.splitlines() if "%" in line}
    assert shares["news"].startswith(("74", "75"))
    told = r"step 6: train loss .* bits per byte; news \d\.\d\d; tales \d\.\d\d\n"
    assert re.search(told, outcome.err), outcome.err
    assert gptpl(*steps, "trainer.stop_at_step=3").status == 0
    outcome = gptpl("train", "resume=run")
    assert outcome.status == 0, outcome.err
    whole, parted = (run_folder(tmp_path / name).checkpoint("last") for name in ("whole", "run"))
    assert all(whole["state_dict"][name].equal(value) for name, value in parted["state_dict"].items())
    [row] = [row for row in run_folder(tmp_path / "run").rows if row["val/loss"] and row["step"] == "6"]
    of_sources = [float(row[f"val/loss/{name}"]) for name in ("news", "tales")]
    assert min(of_sources) < float(row["val/loss"]) < max(of_sources)
    outcome = gptpl("evaluate", "checkpoint=run")
    assert outcome.status == 0, outcome.err
    assert "bits/byte" in outcome.out


def test_two_processes_see_what_one_sees(gptpl, tmp_path, run_folder, copies):
    """Each of the two is told its place, as by a launcher."""
    steps = (*TRAIN[1:], "model.drop_rate=0", "data.packing=best_fit")
    assert gptpl("train", *steps, "data.batch_size=4", "run_dir=whole").status == 0
    two = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "data.batch_size=2")
    kept = [each for each in steps if each != "trainer=cpu"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1], "WORLD_SIZE": 2}
    place |= {"LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "none"}  # as torchrun has them
    pair = [
        copies(
            *("train", *kept, *two), cwd=tmp_path, output=tmp_path / f"said_{rank}", RANK=rank,
            LOCAL_RANK=rank, **place,
        )
        for rank in range(2)
    ]  # fmt: skip
    assert [each.wait(120) for each in pair] == [0, 0], pair[0].said + pair[1].said
    whole, parted = (run_folder(tmp_path / name).rows for name in ("whole", "run"))
    losses = [[float(row["train/loss"]) for row in rows if row["train/loss"]] for rows in (whole, parted)]
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    for name in ("val/loss", "val/loss/news", "val/loss/tales"):
        found = [[float(row[name]) for row in rows if row[name]] for rows in (whole, parted)]
        assert len(found[0]) == 2
        assert found[1] == pytest.approx(found[0], abs=1e-4)
    tokens = [
        [float(row["train/tokens_seen"]) for row in rows if row["train/tokens_seen"]]
        for rows in (whole, parted)
    ]
    assert tokens[0] == tokens[1]


def test_other_shares_are_not_resumed(gptpl, run):
    outcome = gptpl("train", "resume=run", SOURCES.replace("weight: 3", "weight: 2"))
    assert outcome.status == 2
    assert "data.sources" in outcome.err.splitlines()[-1]


def test_a_source_that_has_moved_or_changed(gptpl, run, tmp_path):
    (tmp_path / "news").rename(tmp_path / "moved")
    outcome = gptpl("train", "resume=run", "data.sources.news.path=moved", "trainer.stop_at_step=4")
    assert outcome.status == 0, outcome.err
    (tmp_path / "moved/3.txt").write_text("Another story. " * 20)
    outcome = gptpl("train", "resume=run")
    assert outcome.status == 2
    assert "data=mixture of news, tales holds another text than the run" in outcome.err


def test_evaluated_on_another_mixture(gptpl, run):
    other = "data.sources={tales: {path: tales.jsonl, epochs: 1}}"
    outcome = gptpl("evaluate", "checkpoint=run", "data=mixture", other, "data.val_tokens=500")
    assert outcome.status == 0, outcome.err
    assert "mixture of tales, split val" in outcome.out


def test_a_source_may_name_a_class(gptpl):
    named = "corpus: {_target_: gptpl.data.sources.TextFiles, path: news, pattern: null}, weight: 1"
    of = [each for each in TRAIN if not each.startswith("data.sources")]
    assert gptpl(*of, f"data.sources={{news: {{{named}}}}}").status == 0
    outcome = gptpl("evaluate", "checkpoint=run")
    assert outcome.status == 0, outcome.err
    assert "mixture of news, split val" in outcome.out
    outcome = gptpl("tokenizer", "train", "data=mixture", f"data.sources={{news: {{{named}}}}}")
    assert outcome.status == 0, outcome.err


def test_two_fields_of_one_file_can_be_looked_at(gptpl, tmp_path):
    lines = [json.dumps({"en": f"the tide {n}", "de": f"die Flut war sehr hoch {n}"}) for n in range(50)]
    (tmp_path / "both.jsonl").write_text("\n".join(lines))
    german = "de: {path: both.jsonl, field: de, epochs: 1}"
    both = f"data.sources={{en: {{path: both.jsonl, field: en, epochs: 1}}, {german}}}"
    outcome = gptpl("data", "show", "data=mixture", both, "tokenizer=bytes", "output=null")
    assert outcome.status == 0, outcome.err
    characters = sum(len(text) for line in lines for text in json.loads(line).values())
    assert re.search(rf"characters +{characters:,}\n", outcome.out)
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and nothing else")
    torn = (
        "data.sources={torn: {path: torn.parquet, epochs: 1}, de: {path: both.jsonl, field: de, epochs: 1}}"
    )
    outcome = gptpl("data", "show", "data=mixture", torn, "tokenizer=bytes", "output=null")
    assert outcome.status == 0, outcome.err
    assert "torn.parquet is not a whole Parquet file" in outcome.out


def test_a_plan_and_encoding_ahead(gptpl):
    assert "mixture of news, tales" in gptpl("data", "encode", *OF).out
    outcome = gptpl("plan", *OF, "trainer=cpu", "data.packing=best_fit", "plan.timed_steps=1")
    assert outcome.status == 0, outcome.err


def test_packed_documents_of_a_book(gptpl):
    book = ("data=tale", "tokenizer=bytes", "model=tiny", "data.packing=best_fit", "trainer=cpu")
    outcome = gptpl("train", *book, "trainer.max_steps=2", "scheduler.warmup_steps=1", "run_dir=book")
    assert outcome.status == 0, outcome.err
    assert "training sequences are" in outcome.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.sources={a: {path: none, weight: 1}}"], "data.sources.a: data.path=none does not exist"),
        (["data.sources={news: {weight: 0}, tales: {weight: 0}}"], "data.sources: every share is 0"),
        (["data.sources={a: {path: news}}"], "data.sources.a has no share"),
        (["data.packing=all"], "data.packing"),
        (["data.packing=best_fit", "data.stride=7"], "data.stride=7 has no meaning"),
    ],
)
def test_bad_settings_are_refused(gptpl, changes, message):
    outcome = gptpl(*TRAIN, *changes)
    assert (outcome.status, outcome.out) == (2, "")
    assert message in outcome.err.splitlines()[-1]


def test_its_texts_can_be_looked_at(gptpl):
    outcome = gptpl("data", "show", *OF, "data.packing=best_fit", "sequences=2", "output=null")
    assert outcome.status == 0, outcome.err
    assert outcome.out.startswith("mixture of news, tales: 61 files")
    assert re.search(r"documents +120\n", outcome.out)
    assert "2: " in outcome.out
