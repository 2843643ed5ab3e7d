"""`gptpl train`: what a run leaves behind, and that its records are true."""

import importlib.metadata
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gptpl.tokenizers import BytesTokenizer

RUN_FILES = {
    "checkpoints/best.ckpt",
    "checkpoints/best.ckpt.sha256",
    "checkpoints/last.ckpt",
    "checkpoints/step-*.ckpt",
    "checkpoints/step-*.ckpt.sha256",
    "config.yaml",
    "loss.png",
    "metrics.csv",
    "evaluations.jsonl",
    "run.json",
    "samples.jsonl",
    "tensorboard/hparams.yaml",
    "train.log",
}


def test_a_run_leaves_its_files_and_nothing_else(quick):
    assert quick.run.files == RUN_FILES | {"events"}
    assert {path.name for path in quick.folder.iterdir()} == {"runs"}
    assert quick.out == ""


def test_the_folder_is_named_for_experiment_and_time(quick):
    name, time = quick.run.path.parts[-2:]
    assert name == "quick"
    assert datetime.strptime(time, "%Y-%m-%d_%H-%M-%S")


def test_metrics_hold_every_step_and_the_evaluation_before_the_first(quick):
    rows = quick.run.rows
    assert [int(row["step"]) for row in rows] == list(range(9))
    assert [int(row["step"]) for row in rows if row["val/loss"]] == [0, 4, 8]
    assert all(row["train/loss"] and row["lr"] and row["train/grad_norm"] for row in rows[1:])
    assert [float(row["train/tokens_seen"]) for row in rows[1:]] == [512 * step for step in range(1, 9)]
    assert float(rows[0]["val/loss"]) == pytest.approx(math.log(257), abs=0.05)  # knows nothing yet
    assert float(rows[8]["val/loss"]) < float(rows[0]["val/loss"]) - 0.5


def test_the_picture_is_a_whole_png(quick):
    data = (quick.run.path / "loss.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert data.endswith(b"IEND\xaeB`\x82")


def test_samples_continue_the_prompt_by_every_strategy(quick):
    samples = quick.run.samples
    assert {sample["strategy"]["temperature"] for sample in samples} == {0.0, 0.8}
    assert {(sample["prompt"], sample["step"]) for sample in samples} == {("Every effort moves you", 8)}


def test_tensorboard_has_scalars_text_picture_and_hparams(quick):
    events = EventAccumulator(str(quick.run.path / "tensorboard")).Reload()
    tags = events.Tags()
    assert {"train/loss", "val/loss", "val/perplexity", "lr", "best_val/loss"} <= set(tags["scalars"])
    assert "loss" in tags["images"]
    assert any(tag.startswith("sample/") for tag in tags["tensors"])
    assert "_hparams_/session_start_info" in events.summary_metadata


def test_the_log_holds_what_the_terminal_showed(quick):
    log = (quick.run.path / "train.log").read_text(encoding="utf-8")
    # From the first line on, although the folder was made later.
    for line in quick.err.splitlines():
        assert line in log
    for said in ("model: 120,256 parameters", "0.5 MB in fp32", "8 optimizer steps", "precision 32-true"):
        assert said in log


def test_run_json_records_what_the_run_depends_on(quick):
    record = quick.run.record
    assert record["versions"]["python"] == platform.python_version()
    for package in ("gptpl", "torch", "lightning", "hydra-core", "numpy", "tiktoken"):
        assert record["versions"][package] == importlib.metadata.version(package)
    assert record["hardware"]["platform"] == platform.platform()
    assert len(record["hardware"]["gpus"]) == torch.cuda.device_count()
    assert record["command"].startswith("gptpl train ")
    assert " experiment=quick trainer.max_steps=8 " in record["command"]
    assert record["started"] <= record["finished"]
    tokenizer = BytesTokenizer()
    assert record["tokenizer"] == {"name": "bytes", "vocab_size": 257, "sha256": tokenizer.sha256}
    assert record["data"]["name"] == "tale"
    assert len(bytes.fromhex(record["data"]["sha256"])) == 32
    assert (record["steps"], record["tokens_seen"], record["parameters"]) == (8, 8 * 512, 120_256)
    assert 100e6 < record["peak_memory_bytes"] < 100e9  # torch alone takes more


def test_run_json_holds_the_final_metrics(quick):
    metrics = quick.run.record["metrics"]
    last = quick.run.rows[-1]
    for name in ("val/loss", "val/perplexity", "eval/train_loss", "train/loss", "train/grad_norm", "lr"):
        assert metrics[name] == pytest.approx(float(last[name]), rel=1e-6)
    losses = [float(row["val/loss"]) for row in quick.run.rows if row["val/loss"]]
    assert metrics["best_val/loss"] == pytest.approx(min(losses), rel=1e-6)


def test_run_json_names_the_commit_of_a_checkout(quick):
    commit = quick.run.record["git_commit"]
    here = Path(__file__).parent
    head = subprocess.run(["git", "rev-parse", "--verify", "HEAD"], cwd=here, capture_output=True, text=True)
    if head.returncode:
        assert commit is None
    else:
        assert commit.removesuffix("-dirty") == head.stdout.strip()


def test_the_stored_config_is_what_the_overrides_compose_to(quick, gptpl):
    stored = quick.run.config
    given = ("experiment=quick", "trainer=cpu", "trainer.precision=32-true", "trainer.max_steps=8")
    outcome = gptpl(
        *("train", *given, "scheduler.warmup_steps=1", "eval_every_n_steps=4"),
        *("name=quick", f"run_dir={quick.run.path}", "--cfg", "job", "--resolve"),
    )
    assert OmegaConf.to_container(OmegaConf.create(outcome.out)) == stored
    assert "${" not in (quick.run.path / "config.yaml").read_text()


@pytest.mark.parametrize("begun", [True, False])
def test_the_config_of_a_run_that_begins_or_continues_can_be_shown(quick, gptpl, begun):
    run_dir = quick.run.path if begun else quick.folder / "new"
    outcome = gptpl("train", "experiment=quick", "resume=auto", f"run_dir={run_dir}", "--cfg", "job")
    assert outcome.status == 0, outcome.err
    shown = OmegaConf.create(outcome.out)
    assert shown.run_dir == str(run_dir)
    assert shown.trainer.max_steps == (8 if begun else None)  # the recorded one, or that of the experiment


def test_checkpoints_hold_plain_data_and_the_resolved_config(quick):
    stored = quick.run.config
    for name, has_optimizer in (("last", True), ("best", False)):
        checkpoint = quick.run.checkpoint(name)
        assert checkpoint["gptpl"]["config"] == stored
        assert checkpoint["gptpl"]["tokenizer"]["name"] == "bytes"
        assert checkpoint["global_step"] == 8
        assert ("optimizer_states" in checkpoint) == has_optimizer


def test_a_run_in_a_given_folder_with_words_of_the_users_own(words):
    assert words.run.path == words.folder / "run"
    assert words.run.files == RUN_FILES | {"events"}
    vocabulary = words.run.checkpoint("last")["gptpl"]["tokenizer"]["vocabulary"]
    assert {"pilot", "sang", ",", "<|unk|>", "<|endoftext|>"} <= set(vocabulary)
    config = words.run.config
    assert config["model"]["vocab_size"] == len(vocabulary)
    text = str(words.folder / "my text, 1.txt")  # from whatever folder the run is resumed
    assert (config["data"]["path"], config["data"]["corpus"]["path"], config["name"]) == (
        text,
        text,
        "text_file",
    )


def test_a_folder_with_a_run_in_it_is_refused(quick, refused, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(quick.run.path, run_dir)
    line = refused("train", "model=tiny", "tokenizer=bytes", "run_dir=run")
    assert f"run_dir={run_dir} holds a run already" in line
    assert f"resume={run_dir}" in line


@pytest.mark.slow
def test_the_module_runs_as_the_command_does(tmp_path, run_folder):
    arguments = ["train", "experiment=quick", "scheduler=constant", "trainer.max_steps=1", "run_dir=a b"]
    finished = subprocess.run(
        [sys.executable, "-m", "gptpl", *arguments],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert (finished.returncode, finished.stdout) == (0, ""), finished.stderr
    run = run_folder(tmp_path / "a b")
    assert run.files == RUN_FILES | {"events"}
    assert run.record["command"] == shlex.join(["gptpl", *arguments])
    assert list(tmp_path.iterdir()) == [run.path]
    for line in finished.stderr.splitlines():
        assert not line.startswith(("warning", "/")), line


def test_the_modules_exit_status_is_that_of_the_command(tmp_path):
    command = [sys.executable, "-m", "gptpl", "tran"]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr.startswith("gptpl: error: gptpl has no command 'tran': choose one of train, ")


@pytest.mark.parametrize(
    ("init", "tied", "warned"), [("torch", True, True), ("torch", False, False), ("gpt2", True, False)]
)
def test_a_tied_head_with_torchs_embeddings_is_warned_of(gptpl, init, tied, warned):
    outcome = gptpl(
        *("train", "experiment=quick", "trainer=cpu", "scheduler=constant", "trainer.max_steps=1"),
        *("callbacks=none", "logger=csv", "eval_train_batches=1", "eval_val_batches=2"),
        *(f"model.init={init}", f"model.tie_weights={tied}"),
    )
    assert outcome.status == 0
    assert ("model.init=gpt2 suits a tied head" in outcome.err) == warned
    # The warning is true: guessing costs ln(257) = 5.5.
    assert (float(outcome.run.rows[0]["val/loss"]) > 8) == warned


def test_embeddings_begin_where_the_text_puts_them(gptpl, run_folder):
    """A resumed run has its weights, and what they began with, from its checkpoint."""
    given = ("experiment=quick", "callbacks=checkpoint_last", "trainer.max_steps=3", "run_dir=run")
    outcome = gptpl("train", *given, "init=cooccurrence")
    assert outcome.status == 0
    assert "init=cooccurrence: embeddings of" in outcome.err
    start = {"init": "cooccurrence", "std": 0.1, "window": 4, "counted_tokens": 20_000_000}
    run = run_folder(outcome.folder / "run")
    assert run.record["start"] == start
    resumed = gptpl("train", "resume=run", "trainer.max_steps=5")
    assert resumed.status == 0
    assert "init=cooccurrence: embeddings of" not in resumed.err
    assert run.record["start"] == start
    assert run.steps[-1] == 5
    assert gptpl("weights", "convert", "checkpoint=run", "format=gptpl", "output=exported").status == 0
    card = (outcome.folder / "exported/README.md").read_text(encoding="utf-8")
    assert "First weights: random, token embeddings from co-occurrence counts of the training text." in card
