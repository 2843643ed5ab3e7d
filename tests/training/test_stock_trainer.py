"""Module and data under a stock `lightning.Trainer`, and under each of its arguments that concerns them."""

import contextlib
import pickle
import random
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from gptpl.callbacks.checkpoints import LastCheckpoint
from gptpl.callbacks.metrics import LossCurve
from gptpl.callbacks.progress import ProgressBar
from gptpl.callbacks.stopping import RunStopped, StopAtBoundary
from gptpl.checkpoints.format import HEADER_KEY
from gptpl.checkpoints.loading import load_model
from gptpl.data.pretraining.datamodule import TextDataModule
from gptpl.data.sources import TextFiles
from gptpl.data.training_data import planned_batches
from gptpl.errors import InputError
from gptpl.model import GPTConfig, GPTModel
from gptpl.tokenizers import BytesTokenizer
from gptpl.training.language_model import LanguageModelingModule
from gptpl.training.module import planned_steps

BATCHES = 15
"""In an epoch of `pretraining`'s text."""


class Counted(L.Callback):
    """What the Trainer did: optimizer steps before each evaluation, batches of it, norms of the gradient."""

    def __init__(self) -> None:
        self.evaluated: list[int] = []
        self.batches = 0
        self.inputs: list[Any] = []
        self.largest = 0.0

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.evaluated.append(trainer.global_step)

    def on_validation_batch_end(self, trainer: L.Trainer, *args: Any, **options: Any) -> None:
        self.batches += not trainer.sanity_checking

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.inputs.append(batch[0].tolist())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        gradients = [p.grad.abs().max().item() for p in pl_module.parameters() if p.grad is not None]
        self.largest = max([self.largest, *gradients])


@pytest.fixture
def fit(pretraining: Any, tmp_path: Path) -> Any:
    """`fit(**arguments of the Trainer)`: the Trainer when it has fitted, and what was counted."""

    def run(**arguments: Any) -> tuple[L.Trainer, Counted]:
        data, counted = pretraining.data(), Counted()
        module = LanguageModelingModule(pretraining.net(), tokenizer=data.tokenizer)
        quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        own = {"accelerator": "cpu", "default_root_dir": tmp_path, "enable_model_summary": False}
        trainer = L.Trainer(**(quiet | own | arguments), callbacks=[counted])
        trainer.fit(module, datamodule=data)
        return trainer, counted

    return run


def test_lightnings_own_checkpoints_hold_the_tokens_of_their_step(pretraining: Any, tmp_path: Path) -> None:
    data = pretraining.data()
    module = LanguageModelingModule(pretraining.net(), tokenizer=data.tokenizer)
    own = ModelCheckpoint(dirpath=tmp_path / "own", every_n_train_steps=2, save_top_k=-1)
    trainer = L.Trainer(max_steps=4, callbacks=[own], accelerator="cpu", logger=False)
    trainer.fit(module, datamodule=data)
    saved = [torch.load(path, weights_only=True) for path in (tmp_path / "own").iterdir()]
    assert {each["global_step"]: each[HEADER_KEY]["tokens_seen"] for each in saved} == {
        step: step * data.batch_size * data.max_length for step in (2, 4)
    }


def test_ten_lines_train(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(random.Random(0).choice("ab ") for _ in range(4000)))

    corpus, tokenizer = TextFiles(path), BytesTokenizer()
    data = TextDataModule(corpus=corpus, tokenizer=tokenizer, max_length=16, cache_dir=tmp_path)
    config = GPTConfig(vocab_size=257, context_length=16, emb_dim=16, n_heads=2, n_layers=1, qkv_bias=False)
    module = LanguageModelingModule(GPTModel(config), tokenizer=data.tokenizer)
    trainer = L.Trainer(max_steps=100, accelerator="cpu", default_root_dir=tmp_path, log_every_n_steps=10)
    trainer.fit(module, datamodule=data)

    assert trainer.global_step == module.total_steps == 100
    assert trainer.validate(module, datamodule=data)[0]["val/loss"] < 5.0 < module.guessing_loss
    [checkpoint] = tmp_path.rglob("*.ckpt")
    loaded = load_model(checkpoint)
    assert (loaded.step, loaded.run_config) == (100, {})
    for ours, theirs in zip(loaded.net.parameters(), module.net.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("arguments", "steps", "evaluated"),
    [
        ({"max_epochs": 2}, 30, [15, 30]),
        ({"max_epochs": 2, "accumulate_grad_batches": 4}, 8, [4, 8]),
        ({"max_epochs": 2, "max_steps": 20}, 20, [15]),
        ({"max_steps": 12, "val_check_interval": 5, "check_val_every_n_epoch": None}, 12, [5, 10]),
        ({"max_epochs": 2, "limit_train_batches": 4}, 8, [4, 8]),
        ({"max_epochs": 2, "limit_train_batches": 0.5, "accumulate_grad_batches": 2}, 8, [4, 8]),
        ({"max_epochs": 1, "limit_train_batches": 99}, 15, [15]),
        ({"max_epochs": 1, "limit_val_batches": 0}, 15, []),
        ({"max_epochs": 1, "val_check_interval": 0.5}, 15, [7, 14]),
        ({"fast_dev_run": True, "max_epochs": 9}, 1, [1]),
        ({"fast_dev_run": 3, "max_steps": 9}, 3, [3]),
        ({"max_epochs": 1, "num_sanity_val_steps": 0}, 15, [15]),
        ({"max_steps": 2, "detect_anomaly": True, "profiler": "simple", "deterministic": True}, 2, []),
        ({"max_epochs": 1, "enable_model_summary": True, "inference_mode": False}, 15, [15]),
        ({"max_epochs": 2, "reload_dataloaders_every_n_epochs": 1, "min_epochs": 2}, 30, [15, 30]),
    ],
)
def test_arguments_of_the_trainer(
    fit: Any, arguments: dict[str, Any], steps: int, evaluated: list[int]
) -> None:
    trainer, counted = fit(**arguments)
    assert (
        trainer.global_step
        == trainer.lightning_module.total_steps
        == planned_steps(trainer, planned_batches(trainer, BATCHES))
        == steps
    )
    assert counted.evaluated == evaluated


@pytest.mark.parametrize("accumulate", [1, 2])
def test_overfit_batches_are_the_same_in_every_epoch(fit: Any, accumulate: int) -> None:
    trainer, counted = fit(overfit_batches=2, max_epochs=3, accumulate_grad_batches=accumulate)
    assert trainer.global_step == planned_steps(trainer, planned_batches(trainer, BATCHES)) == 6 // accumulate
    assert counted.inputs[:2] == counted.inputs[2:4] == counted.inputs[4:]


def test_with_exact_resume_the_trainer_may_decide_on_length_and_evaluations(pretraining: Any) -> None:
    """Weights and losses are those of a run that was never stopped; 15 steps are an epoch."""

    def run(name: str, *callbacks: L.Callback, resume: Path | None = None) -> Any:
        pretraining.folder = pretraining.folder.parent / name
        data, net = pretraining.data(), pretraining.net(drop_rate=0.2)
        keeping = LastCheckpoint(dirpath=pretraining.folder / "checkpoints")
        with contextlib.suppress(RunStopped):
            pretraining.fit(
                keeping, *callbacks, LossCurve(path=pretraining.folder / "loss.png"), ProgressBar(),
                module=LanguageModelingModule(net, tokenizer=data.tokenizer), data=data, resume=resume,
                enable_progress_bar=True, max_steps=20, val_check_interval=4, num_sanity_val_steps=2,
            )  # fmt: skip
        return net.state_dict(), pretraining.column("train/loss")

    whole, losses = run("whole")
    assert len(losses) == 20
    for stop in (7, 15, 18):
        run(f"stopped at {stop}", StopAtBoundary(stop_at_step=stop))
        last = (pretraining.folder / "checkpoints/last.ckpt").resolve()
        weights, resumed = run(f"stopped at {stop}", resume=last)
        assert resumed == losses
        for name, tensor in weights.items():
            assert torch.equal(tensor, whole[name]), name


def test_other_data_cannot_resume_exactly(pretraining: Any) -> None:
    class Plain(L.LightningDataModule):
        def train_dataloader(self) -> Any:
            return pretraining.data().train_dataloader()

        def val_dataloader(self) -> Any:
            return pretraining.data().val_dataloader()

    callback = LastCheckpoint(dirpath=pretraining.folder)
    pretraining.fit(callback, module=pretraining.module(total_steps=4), data=Plain())
    last = (pretraining.folder / "last.ckpt").resolve()
    with pytest.raises(InputError, match=r"Plain\) cannot start within an epoch.* start_at"):
        pretraining.fit(module=pretraining.module(), data=Plain(), resume=last)


def test_limit_val_batches_holds_for_each_split(fit: Any) -> None:
    assert fit(max_epochs=1, limit_val_batches=1)[1].batches == 2


def test_gradients_are_clipped_by_value_too(fit: Any) -> None:
    assert fit(max_steps=2)[1].largest > 1e-4
    clipped = fit(max_steps=2, gradient_clip_val=1e-4, gradient_clip_algorithm="value")[1]
    assert clipped.largest == pytest.approx(1e-4)


def test_a_part_of_an_evaluation_before_the_first_step_is_not_logged(pretraining: Any) -> None:
    for sanity, logged in ((-1, {0, 3, 6}), (1, {3, 6})):
        folder = pretraining.folder / str(sanity)
        pretraining.folder = folder
        pretraining.fit(module=pretraining.module(total_steps=6), num_sanity_val_steps=sanity)
        assert set(pretraining.column("val/loss")) == logged


def test_a_development_run_leaves_no_checkpoint(pretraining: Any, tmp_path: Path) -> None:
    callback = LastCheckpoint(dirpath=tmp_path / "checkpoints")
    trainer = pretraining.fit(callback, module=pretraining.module(total_steps=4), fast_dev_run=4)
    assert trainer.global_step == 4
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_module_can_be_pickled(pretraining: Any) -> None:
    """As a strategy that spawns processes does."""
    module = LanguageModelingModule(pretraining.net(), tokenizer=BytesTokenizer())
    again = pickle.loads(pickle.dumps(module))  # noqa: S301
    assert again.lr_factor(5) == 1.0


def test_a_limit_that_leaves_nothing_is_refused() -> None:
    trainer = L.Trainer(limit_train_batches=0.01, accelerator="cpu", logger=False)
    assert planned_batches(trainer, 100) == 1
    with pytest.raises(InputError, match=r"limit_train_batches=0\.01 leaves none of an epoch's 99 batches"):
        planned_batches(trainer, 99)


def test_without_an_end_it_is_far_away() -> None:
    trainer = L.Trainer(max_epochs=-1, accelerator="cpu", logger=False)
    assert planned_steps(trainer, 10) > 10**15


def test_one_validation_loader_is_of_validation_examples(pretraining: Any, tmp_path: Path) -> None:
    """Ours has two; somebody else's own LightningDataModule rarely."""
    data = pretraining.data()
    loaders = data.train_dataloader(), data.val_dataloader()[1]
    module = LanguageModelingModule(pretraining.net(), tokenizer=BytesTokenizer())
    trainer = L.Trainer(
        accelerator="cpu", max_steps=2, default_root_dir=tmp_path, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, val_check_interval=2,
    )  # fmt: skip
    trainer.fit(module, *loaders)
    assert "val/loss" in trainer.callback_metrics
    assert "eval/train_loss" not in trainer.callback_metrics
