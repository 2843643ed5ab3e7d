"""Best checkpoint and early stopping by metrics that are better high, low, or unknown."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping as LightningEarlyStopping

from gptpl.callbacks.checkpoints import BestCheckpoint
from gptpl.callbacks.stopping import EarlyStopping
from gptpl.errors import InputError
from gptpl.training.classification import ClassificationModule
from gptpl.training.instruction_tuning import InstructionModule
from gptpl.training.language_model import LanguageModelingModule
from gptpl.training.task import known_metrics

SCORES = [0.0, 3.0, 9.0, 4.0, 1.0]
"""Of the evaluations before the first step, and after 2, 4, 6 and 8."""


@pytest.fixture
def scored(training: Any) -> Callable[..., L.Trainer]:
    """Trains eight steps of a module that declares and logs `val/score`."""

    def run(*callbacks: L.Callback, declared: str | None, **options: Any) -> L.Trainer:
        module, scores = training.module(), iter(SCORES)
        if declared is not None:
            module.metrics = {"val/score": declared}
        module.on_validation_epoch_end = lambda: module.log("val/score", next(scores))
        trainer: L.Trainer = training.fit(
            *callbacks, module=module, **({"enable_checkpointing": True} | options)
        )
        return trainer

    return run


@pytest.mark.parametrize(
    ("declared", "mode", "best"),
    [("max", None, 4), ("min", None, 8), ("max", "min", 8), (None, "max", 4)],
)
def test_the_best_is_kept(scored: Any, tmp_path: Path, declared: str | None, mode: Any, best: int) -> None:
    scored(BestCheckpoint(dirpath=tmp_path, monitor="val/score", mode=mode), declared=declared)
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["global_step"] == best


@pytest.mark.parametrize(
    ("declared", "mode", "steps"),
    [("max", None, 8), ("min", None, 6), (None, "max", 8), ("max", "min", 6)],
)
def test_it_stops_when_nothing_is_gained(scored: Any, declared: str | None, mode: Any, steps: int) -> None:
    """Patience 2: the third evaluation since the best would be after step 10, or 4 for the lowest."""
    stopping = EarlyStopping(monitor="val/score", patience=2, mode=mode, verbose=False)
    trainer = scored(stopping, declared=declared, enable_checkpointing=False)
    assert trainer.global_step == steps
    assert stopping.stopped_epoch is not None


@pytest.mark.parametrize("mode", ["min", "max"])
def test_it_is_lightnings_with_the_mode_given(mode: Any, training: Any) -> None:
    """Also its signed `min_delta`, and its key in checkpoints."""
    theirs = LightningEarlyStopping(monitor="val/score", mode=mode, min_delta=0.5, patience=5, verbose=True)
    for ours in (
        EarlyStopping(monitor="val/score", mode=mode, min_delta=0.5),
        EarlyStopping(monitor="val/score", min_delta=0.5),
    ):
        module = training.module()
        module.metrics = {"val/score": mode}
        ours.setup(training.trainer(ours), module, "fit")
        assert ours.state_key == theirs.state_key
        assert ours.state_dict() == theirs.state_dict()
        assert (ours.min_delta, ours.monitor_op) == (theirs.min_delta, theirs.monitor_op)


@pytest.mark.parametrize("kind", [EarlyStopping, BestCheckpoint])
def test_an_unknown_metric_is_refused_before_training(scored: Any, tmp_path: Path, kind: Any) -> None:
    where = {"dirpath": tmp_path} if kind is BestCheckpoint else {}
    with pytest.raises(InputError, match=r"monitor=val/scor .*did you mean val/score\?"):
        scored(kind(monitor="val/scor", **where), declared="max")
    with pytest.raises(InputError, match=r"monitor=val/loss .*declares: set mode for a metric of your own$"):
        scored(kind(**where), declared=None)


def test_a_callback_may_declare_metrics(scored: Any, tmp_path: Path) -> None:
    class Declaring(L.Callback):
        metrics = {"val/score": "max"}  # noqa: RUF012

    scored(BestCheckpoint(dirpath=tmp_path, monitor="val/score"), Declaring(), declared=None)
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["global_step"] == 4


def test_what_the_tasks_declare() -> None:
    losses = {"val/loss": "min", "eval/train_loss": "min"}
    text = losses | {"val/perplexity": "min"}
    assert known_metrics(LanguageModelingModule) == text | {"val/bits_per_byte": "min"}
    assert known_metrics(InstructionModule) == text | {"val/token_accuracy": "max"}
    classifier = known_metrics(ClassificationModule)
    assert {name for name, mode in classifier.items() if mode == "max"} == {
        "val/accuracy",
        "val/f1",
        "eval/train_accuracy",
    }
    assert {name for name, mode in classifier.items() if mode == "min"} == {*losses, "val/calibration_error"}
