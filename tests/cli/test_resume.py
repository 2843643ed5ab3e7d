"""`gptpl train resume=RUN_DIR`: the run goes on, once, with its own config."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptpl.runs.build import Run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def run_dir(quick, tmp_path) -> Path:
    """The run of 8 steps, moved to another folder since."""
    return Path(shutil.copytree(quick.run.path, tmp_path / "moved"))


@pytest.fixture(scope="module")
def resumed(quick, command, tmp_path_factory):
    """The run of 8 steps, moved, and taken on to 16."""
    folder = tmp_path_factory.mktemp("resumed")
    shutil.copytree(quick.run.path, folder / "moved")
    outcome = command("train", "resume=moved", "trainer.max_steps=16", cwd=folder)
    assert outcome.status == 0, outcome.err
    return outcome


def test_a_resumed_run_continues_at_its_last_step(resumed):
    assert "resuming at step 8 from " in resumed.err
    assert "  trainer.max_steps: 8 -> 16, from step 9\n" in resumed.err
    assert resumed.run.steps == list(range(17))
    assert resumed.run.checkpoint("last")["global_step"] == 16
    assert (resumed.run.record["steps"], resumed.run.record["tokens_seen"]) == (16, 16 * 512)


def test_it_writes_where_the_folder_is_now(resumed, quick):
    assert str(quick.folder) not in (resumed.run.path / "config.yaml").read_text()
    assert quick.run.steps == list(range(9))
    assert (resumed.run.path / "loss.png").read_bytes() != (quick.run.path / "loss.png").read_bytes()
    assert {path.name for path in resumed.folder.iterdir()} == {"moved"}


def test_it_keeps_its_records_and_adds_how_it_was_resumed(resumed, quick):
    record, before = resumed.run.record, quick.run.record
    for name in ("command", "started", "versions", "data", "tokenizer", "parameters"):
        assert record[name] == before[name]
    [resumption] = record["resumed"]
    assert resumption["step"] == 8
    assert resumption["versions"] == before["versions"]
    assert resumed.run.config["trainer"]["max_steps"] == 16
    log = (resumed.run.path / "train.log").read_text(encoding="utf-8")
    assert log.count("run folder: ") == 2  # the log goes on, too


def test_samples_are_those_of_a_run_that_was_never_stopped(resumed, quick):
    assert [sample["step"] for sample in quick.run.samples] == [8, 8]  # after the last step
    assert [sample["step"] for sample in resumed.run.samples] == [16, 16]


def test_the_best_checkpoint_stays_the_best(run_dir, gptpl):
    best, last = run_dir / "checkpoints/best.ckpt", run_dir / "checkpoints/step-00000008.ckpt"
    before = best.read_bytes()
    checkpoint = torch.load(last, weights_only=True)
    [key] = [name for name in checkpoint["callbacks"] if name.startswith("BestCheckpoint")]
    checkpoint["callbacks"][key]["best_model_score"] = torch.tensor(0.5)  # better than these steps can be
    torch.save(checkpoint, last)
    last.with_name(f"{last.name}.sha256").unlink()
    outcome = gptpl("train", "resume=moved", "trainer.max_steps=9", "callbacks.sample_text=null")
    assert outcome.status == 0, outcome.err
    assert outcome.run.record["metrics"]["best_val/loss"] == 0.5
    assert best.read_bytes() == before


def test_a_run_is_resumed_again_and_remembers_the_first_time(resumed, command, tmp_path):
    shutil.copytree(resumed.run.path, tmp_path / "again")
    outcome = command("train", "resume=again", "trainer.max_steps=18", cwd=tmp_path)
    assert outcome.status == 0, outcome.err
    assert outcome.run.steps == list(range(19))
    assert [entry["step"] for entry in outcome.run.record["resumed"]] == [8, 16]


def test_a_run_that_stopped_within_an_epoch_makes_all_its_steps(gptpl, tmp_path):
    # 900 bytes to train on: 56 windows of 16, 7 batches of 8. 10 steps end in the second of three epochs.
    (tmp_path / "text.txt").write_text("0123456789" * 100)
    size = ("model.context_length=16", "data.batch_size=8", "trainer.max_epochs=3", "trainer.max_steps=10")
    data = ("data=text_file", "data.path=text.txt", "run_dir=run", "callbacks=checkpoint_last", "logger=csv")
    started = gptpl("train", "experiment=quick", "trainer=cpu", "scheduler=constant", *data, *size)
    assert started.status == 0, started.err
    resumed = gptpl("train", "resume=run", "trainer.max_steps=null")
    assert resumed.status == 0, resumed.err
    assert resumed.run.steps == list(range(22))


def test_a_finished_run_is_left_as_it_is(run_dir, gptpl):
    before = contents(run_dir)
    outcome = gptpl("train", "resume=moved")
    assert outcome.status == 0
    assert "nothing left to do" in outcome.err
    assert "step 8 of 8" in outcome.err
    assert contents(run_dir) == before


def test_a_finished_run_takes_tags_and_notes(run_dir, gptpl):
    outcome = gptpl("train", "resume=moved", "tags=[good]", "notes=best so far")
    assert outcome.status == 0
    assert "nothing left to do" in outcome.err
    record = json.loads((run_dir / "run.json").read_text())
    assert (record["tags"], record["notes"]) == (["good"], "best so far")
    assert record["metrics"]


@pytest.mark.parametrize("override", ["model=gpt_124m", "run_dir=elsewhere"])  # all: test_resume_overrides.py
def test_an_override_that_makes_another_run_is_refused(override, run_dir, refused):
    line = refused("train", "resume=moved", override)
    assert line.startswith(override.partition("=")[0])
    assert " cannot change when a run is resumed: it was " in line
    assert f"leave {override} out" in line


def test_an_experiment_is_refused(run_dir, refused):
    assert refused("train", "resume=moved", "experiment=quick").startswith(
        "experiment=quick cannot be compared"
    )


def test_another_number_of_windows_in_a_batch_is_refused(run_dir, refused):
    line = refused("train", "resume=moved", "data.batch_size=3")
    assert line.startswith("data.batch_size=3: the run in ")
    assert "has 8 sequences a batch, which cannot change on resume, 8 of them on each of 1 device" in line
    assert line.endswith("give a divisor of 8")


def test_an_end_before_the_step_reached_is_refused(run_dir, refused):
    line = refused("train", "resume=moved", "trainer.max_steps=5")
    assert line.startswith("trainer.max_steps=5 ends the run after 5 ")
    assert "has reached step 8" in line


def test_another_text_is_refused_even_where_it_is_too_short(words, tmp_path, refused):
    shutil.copytree(words.folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "my text, 1.txt").write_text("The old pilot sang.")
    line = refused("train", "resume=run", "trainer.max_steps=9", "data.path=my text, 1.txt")
    assert line.startswith("data.path=my text, 1.txt holds another text ")
    assert "restore the text, or start a new run" in line


def test_the_same_text_may_lie_elsewhere(words, tmp_path, gptpl):
    shutil.copytree(words.folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "my text, 1.txt").rename(tmp_path / "moved.txt")
    outcome = gptpl("train", "resume=run", "trainer.max_steps=4", "data.path=moved.txt")
    assert outcome.status == 0, outcome.err
    before = words.folder / "my text, 1.txt"
    assert f"  data.path: {before} -> moved.txt (from now on)\n" in outcome.err
    assert outcome.run.config["data"]["corpus"]["path"] == str(tmp_path / "moved.txt")


@pytest.fixture
def resumed_settings(run_dir, gptpl, monkeypatch) -> Callable[..., dict[str, Any]]:
    """What a run resumed with some overrides would be trained with."""
    seen: list[dict[str, Any]] = []

    def fit(run: Run) -> dict[str, float]:
        seen.append(run.config)
        return {}

    monkeypatch.setattr("gptpl.runs.fit._fit", fit)

    def settings(*overrides: str) -> dict[str, Any]:
        outcome = gptpl("train", "resume=moved", "trainer.max_steps=16", *overrides)
        assert outcome.status == 0, outcome.err
        return seen[-1]

    return settings


def test_only_what_is_given_changes(resumed_settings, run_dir, quick):
    before = quick.run.config
    given = ("eval_every_n_steps=2", "callbacks.sample_text.max_new_tokens=5", "trainer.gradient_clip_val=2")
    after = resumed_settings(*given)
    before["eval_every_n_steps"] = 2
    before["callbacks"]["sample_text"]["max_new_tokens"] = 5
    before["trainer"] |= {"gradient_clip_val": 2.0, "max_steps": 16}
    moved = json.loads(json.dumps(before).replace(str(quick.run.path), str(run_dir)))
    assert after == moved


def test_callbacks_may_leave_and_come(resumed_settings, run_dir):
    after = resumed_settings("~callbacks.sample_text", "~logger.csv")
    assert "sample_text" not in after["callbacks"]
    assert set(after["logger"]) == {"tensorboard"}
    after = resumed_settings("callbacks=[default,early_stopping]", "callbacks.early_stopping.patience=9")
    assert after["callbacks"]["early_stopping"]["patience"] == 9
    assert after["callbacks"]["loss_curve"]["path"] == str(run_dir / "loss.png")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.max_steps=many", ["trainer.max_steps=many", "integer"]),
        ("trainer.max_step=9", ["trainer.max_step: ", "did you mean trainer.max_steps?"]),
        ("trainer.max_steps=0", ["trainer.max_steps must be positive, got 0"]),
        ("+callbacks.sample_text.sed=1", ["sed"]),
        ("~callbacks.loss", ["callbacks.loss"]),
    ],
)
def test_a_wrong_override_is_refused(override, words, run_dir, refused):
    line = refused("train", "resume=moved", override)
    assert all(word in line for word in words)


def test_what_cannot_be_resumed_is_refused(run_dir, refused, tmp_path):
    assert "resume=" in refused("train", "resume=missing")
    (tmp_path / "empty").mkdir()
    assert "config.yaml" in refused("train", "resume=empty")
    newest = run_dir / "checkpoints/step-00000008.ckpt"
    newest.write_bytes(newest.read_bytes()[:-50_000])
    assert str(newest) in refused("train", "resume=moved", "trainer.max_steps=16")
    for path in newest.parent.iterdir():
        path.unlink()
    assert "has no checkpoint to resume from" in refused("train", "resume=moved")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("Bytes", "Words", "tokenizer._target_=gptpl.tokenizers.BytesTokenizer"),
        ("name: quick", "[not: yaml", "config.yaml"),
    ],
)
def test_a_config_that_does_not_fit_the_checkpoint_is_refused(old, new, words, run_dir, refused):
    text = (run_dir / "config.yaml").read_text()
    assert old in text
    text = text.replace(old, new)
    (run_dir / "config.yaml").write_text(text)
    assert words in refused("train", "resume=moved", "trainer.max_steps=16")


def test_a_sweep_does_not_resume(run_dir, refused):
    assert "-m" in refused("train", "-m", "resume=moved", "trainer.max_steps=16,18")
