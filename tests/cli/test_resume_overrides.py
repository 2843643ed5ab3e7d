"""What overrides make of the settings of a run that is resumed; the run's checkpoint is an empty one."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from gptpl.config.compose import compose, plain
from gptpl.errors import InputError
from gptpl.runs.resume import Resumption, resume_plan

Plan = Callable[..., Resumption]
QUICK = ("experiment=quick", "trainer=cpu", "trainer.max_steps=20", "seed=7")


def write_run(folder: Path, *overrides: str, **header: Any) -> None:
    """A run of 8 steps that was started with the overrides."""
    cfg = compose(*overrides)
    cfg.run_dir, cfg.name = str(folder), "quick"
    config: Any = plain(cfg)
    config["model"]["vocab_size"] = config["model"]["vocab_size"] or 100
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    known: dict[str, Any] = {
        "format_version": 2, "model": {}, "tokenizer": {}, "config": config, "tokens_seen": 8 * 512,
        "data_sha256": "ab" * 32, "global_batch": 8, "world_size": 1, "total_steps": 20, "lr_ceiling": None,
    }  # fmt: skip
    checkpoint = {
        "gptpl": known | header,
        "gptpl_resume": {"step": 8, "epoch": 0, "batch": 8, "random": [], "loggers": {}},
        "state_dict": {},
        "optimizer_states": [],
        "global_step": 8,
    }
    torch.save(checkpoint, folder / "checkpoints/step-00000008.ckpt")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def plan(folder: Path) -> Plan:
    """What the overrides make of the run in the folder; `experiment=quick` started it if nothing else did."""

    def make(*overrides: str) -> Resumption:
        if not folder.exists():
            write_run(folder, *QUICK)
        return resume_plan(folder, overrides)

    return make


def config(resumption: Resumption) -> Any:
    return OmegaConf.to_container(resumption.config)


def stored(folder: Path) -> Any:
    return OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))


def refusal(plan: Plan, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        plan(*overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_overrides_it_goes_on_as_it_was(plan, folder):
    resumption = plan()
    assert config(resumption) == stored(folder)
    assert (resumption.step, resumption.run_dir, resumption.finished) == (8, folder, False)
    assert (resumption.changes, resumption.lr_asked) == ([], False)
    assert resumption.checkpoint == folder / "checkpoints/step-00000008.ckpt"
    assert resumption.state["epoch"] == 0


def test_a_run_of_an_earlier_gptpl_gets_the_defaults_of_what_it_had_no_setting_for(plan, folder):
    write_run(folder, *QUICK)
    whole = stored(folder)
    newer = (("trainer", "attention"), ("trainer", "recompute_activations"), ("data", "global_batch_size"))
    older = {**whole, "trainer": dict(whole["trainer"]), "data": dict(whole["data"])}
    for group, key in newer:
        del older[group][key]
    OmegaConf.save(OmegaConf.create(older), folder / "config.yaml")
    path = folder / "checkpoints/step-00000008.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["gptpl"]["config"] = older
    torch.save(checkpoint, path)
    resumption = plan()
    assert config(resumption) == {**whole, "data": older["data"]}  # as its class has it
    assert resumption.changes == []
    assert [change.key for change in plan("trainer.attention=sdpa").changes] == ["trainer.attention"]
    assert "data.global_batch_size cannot change" in refusal(plan, "data.global_batch_size=16")


@pytest.mark.parametrize(
    "overrides",
    [
        [
            *("model=tiny", "data=tale", "tokenizer=bytes", "task=pretrain", "trainer=cpu"),
            *("scheduler=cosine", "callbacks=default", "logger=default"),
        ],
        [
            *("model.n_layers=2", "model.vocab_size=null", "data.batch_size=8", "seed=7"),
            *("optimizer.lr=3e-3", "optimizer.betas=[0.9,0.999]", "scheduler.warmup_steps=auto"),
            *("trainer.max_steps=20", "run_dir=null", "name=null"),
        ],
        [
            *("trainer=auto", "trainer.accelerator=cpu", "optimizer=adamw", "optimizer.lr=0.003"),
            *("data.max_length=null", "data.stride=64"),
        ],
    ],
)
def test_asking_for_what_is_there_changes_nothing(overrides, plan, folder):
    resumption = plan(*overrides)
    assert config(resumption) == stored(folder)
    assert resumption.changes == []


def test_its_own_folder_however_it_is_written_is_no_change(plan, folder):
    assert plan(f"run_dir={folder.parent}/../{folder.parent.name}/run").changes == []


@pytest.mark.parametrize(
    ("overrides", "key", "old", "new"),
    [
        (["model=gpt2_medium"], "model.context_length", "64", "1024"),
        (["model.n_layers=3"], "model.n_layers", "2", "3"),
        (["tokenizer=words"], "tokenizer._target_", "BytesTokenizer", "WordsTokenizer"),
        (["data=python_stdlib"], "data.corpus._target_", "Tale", "PythonStdlib"),
        (["data.max_length=32"], "data.max_length", "64", "32"),
        (["data.stride=1"], "data.stride", "64", "1"),
        (["data.train_ratio=0.5"], "data.train_ratio", "0.9", "0.5"),
        (["seed=8"], "seed", "7", "8"),
        (["optimizer=muon"], "optimizer._target_", "adamw", "muon"),
        (["optimizer.decay=all"], "optimizer.decay", "matrices", "all"),
        (["trainer.accumulate_grad_batches=2"], "trainer.accumulate_grad_batches", "1", "2"),
        (["run_dir=/elsewhere"], "run_dir", "run", "/elsewhere"),
    ],
)
def test_what_makes_another_run_is_refused(overrides, key, old, new, plan, folder):
    text = refusal(plan, *overrides)
    assert text.startswith(f"{key} cannot change when a run is resumed: it was ")
    before, after = text.partition("it was ")[2].split("; ")[0].split(", asked for is ")
    assert before.endswith(old)
    assert after.endswith(new)
    assert f"leave {overrides[0]} out, or start a new run" in text


def test_an_experiment_is_refused(plan):
    text = refusal(plan, "experiment=quick")
    assert text.startswith("experiment=quick cannot be compared")
    assert "leave it out" in text


@pytest.mark.parametrize(
    "asked",
    [
        {
            "optimizer.lr=1e-3": ("optimizer.lr", 1e-3),
            "optimizer.betas=[0.8,0.9]": ("optimizer.betas", [0.8, 0.9]),
            "scheduler.min_lr=0": ("scheduler.min_lr", 0.0),
            "trainer.max_epochs=9": ("trainer.max_epochs", 9),
            "trainer.gradient_clip_val=null": ("trainer.gradient_clip_val", None),
            "model.drop_rate=0.2": ("model.drop_rate", 0.2),
            "eval_val_batches=null": ("eval_val_batches", None),
            "skip_steps=[9,10]": ("skip_steps", [9, 10]),
            "on_nonfinite=rollback": ("on_nonfinite", "rollback"),
            "callbacks.sample_text.max_new_tokens=5": ("callbacks.sample_text.max_new_tokens", 5),
            "trainer.precision=64-true": ("trainer.precision", "64-true"),
            "data.num_workers=2": ("data.num_workers", 2),
            "name=other": ("name", "other"),
        },
        {"callbacks.sample_text=null": ("callbacks.sample_text", None)},
    ],
)
def test_what_may_change_is_all_that_changes(asked, plan, folder):
    resumption = plan(*asked)
    changes = [(change.key, change.new) for change in resumption.changes]
    assert sorted(changes, key=str) == sorted(asked.values(), key=str)
    wanted = OmegaConf.create(stored(folder))
    for key, value in asked.values():
        OmegaConf.update(wanted, key, value, merge=False)
    assert config(resumption) == OmegaConf.to_container(wanted)


def test_a_group_asks_for_what_its_file_says(plan):
    changes = {change.key: change.new for change in plan("trainer=auto", "optimizer=adamw").changes}
    assert changes == {"trainer.accelerator": "auto", "optimizer.lr": 4e-4}


def test_another_schedule_comes_whole(plan):
    after = config(plan("scheduler=constant"))["scheduler"]
    assert after == {"_target_": "gptpl.training.schedules.ConstantSchedule", "warmup_steps": 0}
    mixed = config(plan("scheduler.min_lr=1e-5", "scheduler=linear"))["scheduler"]
    assert (mixed["_target_"][-14:], mixed["min_lr"]) == ("LinearSchedule", 1e-5)


def test_new_callbacks_take_the_settings_of_the_run(plan, folder):
    after = config(plan("callbacks=[default,early_stopping]", "callbacks.early_stopping.patience=9"))
    assert after["callbacks"]["sample_text"]["seed"] == 7
    assert after["callbacks"]["loss_curve"]["path"] == str(folder / "loss.png")
    assert after["callbacks"]["early_stopping"]["patience"] == 9


def test_callbacks_come_and_go(plan):
    gone = plan("~callbacks.sample_text", "~logger.csv", "~callbacks.loss_curve")
    assert {change.key for change in gone.changes} == {
        "callbacks.sample_text",
        "callbacks.loss_curve",
        "logger.csv",
    }
    node = {"_target_": "lightning.pytorch.callbacks.Timer"}
    mine = plan(f"+callbacks.mine={{_target_: {node['_target_']}}}")
    assert [(change.key, change.new) for change in mine.changes] == [("callbacks.mine", node)]
    json.dumps([change.new for change in (*gone.changes, *mine.changes)])  # for the run's record


def test_settings_of_the_runs_own_kind_need_no_group(plan, folder):
    write_run(folder, *QUICK, "optimizer=muon", "scheduler=constant", "callbacks=[default,early_stopping]")
    resumption = plan("optimizer.muon_lr=1e-3", "callbacks.early_stopping.patience=2")
    assert {change.key: change.new for change in resumption.changes} == {
        "optimizer.muon_lr": 1e-3,
        "callbacks.early_stopping.patience": 2,
    }
    assert "scheduler.min_lr is a setting of scheduler=cosine or scheduler=linear" in refusal(
        plan, "scheduler.min_lr=1e-5"
    )


def test_data_that_resume_refuses_are_not_advised(plan):
    line = refusal(plan, "data.pattern=*.md")
    assert "data.pattern is a setting of data=" in line
    assert line.endswith(", not of the run resumed: leave it out")


def test_a_path_changes_wherever_it_is_used(plan, folder):
    write_run(folder, *QUICK, "data=text_file", "data.path=old.txt")
    resumption = plan("data.path=new.txt")
    data = config(resumption)["data"]
    assert (data["path"], data["corpus"]["path"]) == ("new.txt", "new.txt")
    assert [change.kind for change in resumption.changes] == ["free", "free"]
    assert "data.pattern cannot change" in refusal(plan, "data.pattern=*.md")


def test_a_vocabulary_made_from_the_text_is_kept(plan, folder):
    write_run(folder, *QUICK, "tokenizer=words")
    assert plan("tokenizer=words", "model=tiny", "model.vocab_size=null").changes == []


def test_a_setting_that_the_run_has_no_place_for_is_refused(plan, folder):
    write_run(folder, *QUICK, "~callbacks.sample_text")
    text = refusal(plan, "callbacks.sample_text.max_new_tokens=5")
    assert text.startswith("callbacks.sample_text.max_new_tokens is not a key of the run in ")


def test_a_moved_run_has_no_changes(plan, folder):
    plan()
    moved = folder.rename(folder.with_name("moved"))
    resumption = resume_plan(moved)
    assert resumption.changes == []
    assert resumption.config.callbacks.loss_curve.path == str(moved / "loss.png")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("emb_dim: 64", "emb_dim: 32", "model.emb_dim=64"),
        ("qkv_bias: false", "qkv_bias: true", "model.qkv_bias=false"),
        ("seed: 7", "seed: 8", "seed=7"),
    ],
)
def test_a_config_edited_by_hand_is_held_to_the_same_rules(old, new, words, plan, folder):
    plan()
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace(old, new))
    text = refusal(plan)
    assert text.startswith(words)
    assert str(path) in text


def test_what_was_asked_for_before_the_checkpoint_still_counts(plan, folder):
    # The run was resumed with another rate, and stopped before it had saved anything.
    plan()
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace("lr: 0.003", "lr: 0.001"))
    resumption = plan()
    assert [(change.key, change.old, change.new) for change in resumption.changes] == [
        ("optimizer.lr", 3e-3, 1e-3)
    ]
    assert resumption.lr_asked


@pytest.mark.parametrize(
    ("overrides", "asked"),
    [
        (["optimizer.lr=3e-3"], True),  # the rate that the run has: asked for all the same
        (["scheduler.min_lr=1e-6"], True),
        (["scheduler=cosine"], True),
        (["optimizer=adamw", "optimizer.lr=3e-3"], True),
        (["optimizer.eps=1e-9", "trainer.max_steps=99", "trainer=cpu"], False),
    ],
)
def test_whether_a_rate_is_asked_for(overrides, asked, plan):
    """Where one is, the ceiling goes: test_resume_schedule trains such runs."""
    assert plan(*overrides).lr_asked is asked


@pytest.mark.parametrize(
    ("member", "words"),
    [
        ("{temperatur: 1}", r"has no setting .*strategies\[0\]\.temperatur\b.* did you mean temperature\?"),
        ("{temperature: hot}", r"strategies\[0\]\.temperature=hot: must be a valid number"),
    ],
)
def test_members_of_a_list_are_checked(plan, member, words):
    assert re.search(words, refusal(plan, f"callbacks.sample_text.strategies=[{member}]"))


def text(sha256: str) -> Any:
    """Data that say only whether they are those of a hash."""
    return SimpleNamespace(difference=lambda wanted, rows: "" if sha256 == wanted else f"SHA-256 {sha256}")


def test_the_text_must_be_the_same(plan, folder):
    write_run(folder, *QUICK, "data=text_file", "data.path=old.txt")
    resumption = plan("data.path=new.txt")
    resumption.check_text(text("ab" * 32))
    with pytest.raises(InputError, match=r"^data\.path=new\.txt holds another text .*: restore the text, or"):
        resumption.check_text(text("cd" * 32))


def test_of_another_corpus_the_error_names_the_class(plan):
    with pytest.raises(InputError, match=r"^data\.corpus=gptpl\.data\.sources\.Tale holds another text"):
        plan().check_text(text("cd" * 32))


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (None, {1: (8, 1), 2: (4, 1), 8: (1, 1)}),
        (8, {1: (8, 1)}),
        (4, {1: (4, 2), 2: (4, 1)}),  # as many sequences at a time as were asked for
        (2, {2: (2, 2)}),
    ],
)
def test_other_processes_share_the_sequences_of_a_batch(given, found, plan):
    resumption = plan(*([] if given is None else [f"data.batch_size={given}"]))
    assert [change.kind for change in resumption.changes] == ["inexact"] * (given not in (None, 8))
    assert {world_size: resumption.batch_of(world_size) for world_size in found} == found


def test_fewer_processes_take_no_more_sequences_at_a_time_than_before(plan):
    resumption = plan()
    resumption.header["global_batch"] = 24  # of three processes
    assert resumption.batch_of(3) == (8, 1)
    assert resumption.batch_of(2) == (6, 2)
    assert resumption.batch_of(1) == (8, 3)


@pytest.mark.parametrize(
    ("given", "world_size", "words"),
    [
        (None, 3, "8 sequences a batch, which cannot change on resume, and 3 devices cannot share them"),
        (16, 2, "data.batch_size=16: the run in .* has 8 sequences .* 4 of them on each of 2 devices"),
        (3, 1, "data.batch_size=3: .* give a divisor of 8"),
    ],
)
def test_a_batch_that_cannot_be_shared_is_refused(given, world_size, words, plan):
    resumption = plan(*([] if given is None else [f"data.batch_size={given}"]))
    with pytest.raises(InputError, match=words):
        resumption.batch_of(world_size)


def test_a_run_cannot_end_before_it_went_on(plan):
    plan("trainer.max_steps=8").check_horizon(8)
    with pytest.raises(InputError, match=r"^trainer\.max_steps=5 .* after 5 .* reached step 8: give more"):
        plan("trainer.max_steps=5").check_horizon(5)
    with pytest.raises(InputError, match=r"^trainer\.max_epochs=1 .* after 6 .* reached step 8: give more"):
        plan("trainer.max_epochs=1").check_horizon(6)


def test_a_finished_run_is_known_by_its_record(plan, folder):
    plan()
    (folder / "run.json").write_text('{"finished": "2026-01-31T12:00:00+00:00"}')
    assert plan().finished
    (folder / "run.json").write_text('{"steps": 8}')
    assert not plan().finished


def test_a_checkpoint_that_cannot_be_resumed_is_refused(plan, folder):
    write_run(folder, *QUICK, format_version=1)
    text = refusal(plan)
    assert "step-00000008.ckpt" in text
    assert "new run" in text


def test_a_run_without_checkpoints_is_refused(plan, folder):
    plan()
    (folder / "checkpoints/step-00000008.ckpt").unlink()
    text = refusal(plan)
    assert text.startswith(f"resume={folder} has no checkpoint")
    assert "start a new run" in text


def test_a_damaged_checkpoint_is_named_with_what_is_used_instead(plan, folder, caplog):
    write_run(folder, *QUICK)
    newer = folder / "checkpoints/step-00000016.ckpt"
    newer.write_bytes(b"")
    resumption = plan()
    assert [damaged.path for damaged in resumption.damaged] == [newer]
    assert resumption.step == 8
    [warning] = [r.getMessage() for r in caplog.records if str(newer) in r.getMessage()]
    assert resumption.damaged[0].reason in warning
    assert "from step 8 instead" in warning
    assert newer.exists()  # it is set aside only when training starts


def test_the_report(plan, caplog):
    resumption = plan("optimizer.lr=0.001", "trainer.max_steps=40", "trainer.compile=off")
    resumption = dataclasses.replace(resumption, header=resumption.header | {"world_size": 2})
    with caplog.at_level("INFO", logger="gptpl.runs.resume"):
        module: Any = SimpleNamespace(lr_factor=lambda step: 1.0, lr_ceiling=0.1, total_steps=40)
        resumption.report(1, module)
    inexact = ", from step 9 (no longer bit-identical with the uninterrupted run)"
    assert [record.getMessage() for record in caplog.records if record.levelname == "INFO"] == [
        f"resuming at step 8 from {resumption.checkpoint}",
        "  optimizer.lr: 0.003 -> 0.001, from step 9",
        "  trainer.max_steps: 20 -> 40, from step 9",
        f"  trainer.compile: auto -> off{inexact}",
        f"  processes: 2 -> 1{inexact}",
        "learning rate: held at or below 0.0001 (the schedule for the new horizon would raise it to 0.001;"
        " give optimizer.lr=... to let it)",
    ]
