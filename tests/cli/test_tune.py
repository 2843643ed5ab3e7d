"""`tune=` through the commands: a base, runs of LoRA and of its last block, resumed, exported, used."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import gptpl
from gptpl.checkpoints.adapter import export_adapter
from gptpl.checkpoints.format import net_weights, read_checkpoint
from gptpl.checkpoints.loading import load_model
from gptpl.checkpoints.resume_state import state_digest

SETTINGS = (
    *("train", "trainer=cpu", "trainer.precision=32-true", "experiment=quick", "scheduler.warmup_steps=1"),
    *("eval_every_n_steps=2", "logger=csv", "callbacks.sample_text=null", "callbacks.loss_curve=null"),
    *("model.n_layers=2", "model.emb_dim=16", "model.n_heads=2", "model.context_length=32"),
)
MODEL = ("model.tie_weights=true", "model.init=gpt2")
LORA = ("tune=lora", "tune.dropout=0.2", "tune.rank=4", *MODEL)


@pytest.fixture(scope="module")
def folder(command, tmp_path_factory) -> Path:
    """With `base`, a run of 2 steps, and `lora`, 6 steps from there."""
    folder: Path = tmp_path_factory.mktemp("tune")
    base = command(*SETTINGS, *MODEL, "run_dir=base", "trainer.max_steps=2", cwd=folder)
    assert base.status == 0, base.err
    run = command(
        *(*SETTINGS, *LORA, "init=run", "init.checkpoint=base", "run_dir=lora", "trainer.max_steps=6"),
        cwd=folder,
    )
    assert run.status == 0, run.err
    (folder / "said").write_text(run.err)
    return folder


def header(run: Path) -> Any:
    return read_checkpoint(run / "checkpoints/last.ckpt")["gptpl"]


def logits(path: Path, name: str = "checkpoints/best.ckpt") -> torch.Tensor:
    return load_model(path / name).net(torch.arange(32)[None])


def test_a_run_of_lora_says_what_trains_and_keeps_the_base_to_the_bit(folder, run_folder):
    said = (folder / "said").read_text()
    trained = 2 * 4 * (16 + 48 + 16 + 16 + 16 + 64 + 64 + 16)  # blocks x rank x (inputs + outputs)
    line = re.search(r"tune: lora \(matrices of rank 4 next to qkv, .*\), ([\d,]+) of [\d,]+ param", said)
    assert line is not None, said
    assert int(line[1].replace(",", "")) == trained
    base = read_checkpoint(folder / "base/checkpoints/last.ckpt")["state_dict"]
    tuned = read_checkpoint(folder / "lora/checkpoints/last.ckpt")
    for name, tensor in base.items():
        assert torch.equal(tuned["state_dict"][name], tensor), name
    assert {name.rpartition(".")[2] for name in tuned["state_dict"].keys() - base.keys()} == {
        "lora_A",
        "lora_B",
    }
    assert tuned["gptpl"]["tune"] == {
        "name": "lora", "rank": 4, "alpha": 16.0, "dropout": 0.2,
        "targets": ["qkv", "out_proj", "up_proj", "down_proj"],
    }  # fmt: skip
    # Two averages a matrix, and nothing of what is frozen.
    assert len(tuned["optimizer_states"][0]["state"]) == 2 * 2 * 4
    rows = run_folder(folder / "lora").rows
    assert "train/mfu" not in rows[0]
    assert float(rows[-1]["val/loss"]) < float(rows[0]["val/loss"])


@pytest.mark.slow
def test_interrupted_is_uninterrupted_to_the_bit(folder, command):
    run = ("init=run", "init.checkpoint=base", "run_dir=again", "trainer.max_steps=6")
    assert command(*SETTINGS, *LORA, *run, "trainer.stop_at_step=3", cwd=folder).status == 0
    assert header(folder / "again")["tokens_seen"] < header(folder / "lora")["tokens_seen"]
    assert command("train", "resume=again", cwd=folder).status == 0
    ours, theirs = (
        state_digest(read_checkpoint((folder / name / "checkpoints/last.ckpt").resolve()))
        for name in ("again", "lora")
    )
    assert {k: v for k, v in ours.items() if k != "callbacks"} == {
        k: v for k, v in theirs.items() if k != "callbacks"
    }


@pytest.mark.slow
def test_dropout_may_change_on_resume_and_the_rank_may_not(folder, command):
    shutil.copytree(folder / "lora", folder / "other", symlinks=True)
    refused = command("train", "resume=other", "tune.rank=2", "trainer.max_steps=8", cwd=folder)
    assert refused.status == 2
    assert "tune.rank cannot change when a run is resumed: it was 4, asked for is 2" in refused.err
    again = command("train", "resume=other", "tune.dropout=0", "trainer.max_steps=8", cwd=folder)
    assert again.status == 0, again.err
    assert "tune.dropout: 0.2 -> 0.0, from step 7" in again.err
    assert header(folder / "other")["tune"]["dropout"] == 0


@pytest.mark.slow
def test_the_run_leaves_an_adapter_that_the_commands_use_with_its_base(folder, command):
    adapter = folder / "lora/adapter"
    assert {path.name for path in adapter.iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json", "gptpl.json"
    }  # fmt: skip
    assert (adapter / "adapter_model.safetensors").stat().st_mode & 0o444 == 0o444
    texts = [
        command("generate", f"checkpoint={path}", "seed=1", "max_new_tokens=8", *more, cwd=folder)
        for path, more in (
            ("lora/checkpoints/best.ckpt", ()),
            ("lora/adapter", ()),
            ("lora/adapter", ("init=run", "init.checkpoint=base")),
        )
    ]
    assert [text.status for text in texts] == [0, 0, 0], texts
    assert texts[0].out == texts[1].out == texts[2].out
    plain = command("generate", "checkpoint=base", "seed=1", "max_new_tokens=8", cwd=folder)
    assert plain.out != texts[0].out
    for arguments in (("evaluate",), ("inspect", "text=a dog and a man", "output=page.html")):
        outcome = command(*arguments, "checkpoint=lora/adapter", cwd=folder)
        assert outcome.status == 0, outcome.err


@pytest.mark.slow
def test_weights_are_exported_merged_or_as_an_adapter(folder, command):
    for form in ("hf", "gptpl", "adapter"):
        path = "lora/checkpoints/best.ckpt"
        outcome = command(
            "weights", "convert", f"checkpoint={path}", f"format={form}", f"output=as-{form}", cwd=folder
        )
        assert outcome.status == 0, outcome.err
        assert "verified: " in outcome.err
    assert torch.equal(logits(folder / "as-gptpl", "model.ckpt"), logits(folder / "lora"))
    written, left = (folder / name / "adapter_model.safetensors" for name in ("as-adapter", "lora/adapter"))
    assert written.read_bytes() == left.read_bytes()
    card = (folder / "as-adapter/README.md").read_text()
    assert "gptpl generate checkpoint=as-adapter" in card
    assert "rank 4, alpha 16, qkv, out_proj, up_proj, down_proj" in card
    # And back: an adapter with its base into any format, the same as the run itself.
    outcome = command("weights", "convert", "checkpoint=as-adapter", "format=hf", "output=back", cwd=folder)
    assert outcome.status == 0, outcome.err
    one, other = (folder / name / "model.safetensors" for name in ("as-hf", "back"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.slow
def test_a_run_begins_with_a_merged_one(folder, command):
    outcome = command(
        *(*SETTINGS, *MODEL, "init=run", "init.checkpoint=lora", "run_dir=next", "trainer.max_steps=2"),
        *("optimizer.lr=1e-30", "scheduler=constant", "tune=last_block", "callbacks=checkpoint_last"),
        cwd=folder,
    )
    assert outcome.status == 0, outcome.err
    assert "not the head, which is tied to the token embedding" in outcome.err
    assert not (folder / "next/adapter").exists()
    ours = net_weights(read_checkpoint(folder / "next/checkpoints/last.ckpt"))
    theirs = net_weights(read_checkpoint(folder / "lora/checkpoints/last.ckpt"))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-7, rtol=0)


def test_what_is_refused(folder, command):
    def refusal(*arguments: str) -> str:
        outcome = command(*arguments, cwd=folder)
        assert outcome.status == 2, outcome
        return str(outcome.err.splitlines()[-1])

    convert = ("weights", "convert", "output=new")
    for arguments, said in (
        (
            (*convert, "format=adapter", "checkpoint=base"),
            "was trained with tune=all, which leaves no adapter",
        ),
        (
            (*convert, "format=adapter", "checkpoint=lora", "dtype=float16"),
            "format=adapter keeps what the run",
        ),
        ((*convert, "format=adapter", "checkpoint=lora/adapter"), "lora/adapter is not a run of gptpl"),
        ((*SETTINGS, *MODEL, "tune=head", "run_dir=new"), "tune=head would train the token embedding"),
        ((*SETTINGS, *LORA, "tune.alfa=1", "run_dir=new"), "tune.alfa"),
        (
            (*SETTINGS, *MODEL, "init=run", "init.checkpoint=lora/adapter", "run_dir=new"),
            "init.checkpoint=lora/adapter is an adapter: add it to its base first",
        ),
    ):
        assert said in refusal(*arguments)
        assert not (folder / "new").exists()


@pytest.mark.slow
def test_lora_on_random_weights_leaves_no_adapter(folder, command):
    outcome = command(
        *SETTINGS, *LORA, "run_dir=random", "trainer.max_steps=2", "callbacks=checkpoint_last", cwd=folder
    )
    assert outcome.status == 0, outcome.err
    assert "no adapter: the run started from random weights" in outcome.err
    assert not (folder / "random/adapter").exists()


def test_the_last_weights_are_the_adapters_where_the_best_are_damaged(folder, monkeypatch, caplog):
    def export(path: Path, output: Path) -> None:
        if path.name == "best.ckpt":
            raise gptpl.InputError(f"checkpoint={path} is damaged")
        export_adapter(path, output)

    caplog.set_level("INFO")
    monkeypatch.setattr("gptpl.runs.fit.export_adapter", export)
    start = ("init=run", f"init.checkpoint={folder / 'base'}", f"run_dir={folder / 'damaged'}")
    gptpl.build(*SETTINGS[1:], *LORA, *start, "trainer.max_steps=2").fit()
    assert "no adapter of best.ckpt: checkpoint=" in caplog.text
    assert (folder / "damaged/adapter/adapter_model.safetensors").is_file()


def test_the_files_are_gptpls_own(folder, command):
    outcome = command("runs", "show", "lora", cwd=folder)
    assert outcome.status == 0, outcome.err
    record = json.loads((folder / "lora/adapter/gptpl.json").read_text())
    assert record["lineage"]["start"]["init"] == "run"
    assert record["base"].keys() == {"sha256", "dtype"}
