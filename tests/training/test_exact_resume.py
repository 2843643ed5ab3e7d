"""A run that is stopped after any of its steps and resumed ends with the same bits as one never stopped."""

import json
import random
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gptpl.callbacks.after_step import AfterStep
from gptpl.callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from gptpl.callbacks.metrics import LearningRate, LossCurve
from gptpl.callbacks.records import RecordEvaluations, StepTrace
from gptpl.callbacks.samples import SampleText
from gptpl.callbacks.stopping import EarlyStopping, RunStopped, StopAtBoundary
from gptpl.checkpoints.format import read_checkpoint
from gptpl.checkpoints.resume_state import state_digest
from gptpl.data.pretraining.datamodule import TextDataModule
from gptpl.training.loggers import MetricsCSVLogger, RunTensorBoardLogger
from gptpl.training.optimizers import muon, optimizer_of

STEPS = 12
"""One and a half epochs of 15 batches, two of them a step, the eighth step with one batch only."""

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


class OtherDraws(L.Callback):
    """A user's callback that draws from all global random numbers, at every batch and every evaluation."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pl_module.log("draws/numpy", float(np.random.rand()), logger=True)  # noqa: NPY002
        pl_module.log("draws/python", random.random(), logger=True)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002


MUON = partial(
    muon,
    lr=1e-2,
    muon_lr=1e-2,
    momentum=0.9,
    weight_decay=0.1,
    betas=(0.9, 0.999),
    eps=1e-8,
    decay="matrices",
)


ONE_CYCLE = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=1e-2)  # moves AdamW's betas, too
PLATEAU = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, factor=0.5, patience=0, threshold=1.0)
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1)


class Crash(L.Callback):
    """Fails in one place of the work between two steps or within one."""

    def __init__(self, hook: str, step: int) -> None:
        self.step = step
        setattr(self, hook, self.fail)

    def fail(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step and not trainer.sanity_checking:
            raise ZeroDivisionError


class Teardown(L.Callback):
    """Ends the workers of a stopped run; the garbage collector would wait for them 20 seconds."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.fit_loop = trainer.fit_loop


class DrawsAgain(AfterStep):
    """Draws after every step, and for the step that a resumed run starts from as the run before did."""

    repeats_on_resume = True

    def after_step(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        torch.rand(())


class Study:
    """Runs with dropout, accumulation, evaluations and samples in mid-epoch, each in a folder of its own."""

    def __init__(
        self,
        pretraining: Any,
        folder: Path,
        found: dict[str, Any],
        *,
        workers: int = 0,
        optimizer: Any = None,
        scheduler: Any = None,
    ) -> None:
        self.pretraining = pretraining
        self.folder = folder
        self.found = found
        self.workers = workers
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.resumed = 0

    @property
    def unbroken(self) -> dict[str, Any]:
        """What the run left that nothing interrupted."""
        if not self.found:
            self.found |= outcome(self.run("unbroken"))
        return self.found

    def run(
        self,
        name: str,
        *,
        stop: int | None = None,
        resume: bool = False,
        crash: L.Callback | None = None,
        total_steps: int = STEPS,
        **options: Any,
    ) -> Path:
        """One process's part of a run: to its end, to the step to stop at, or to a crash."""
        run = self.folder / name
        # Another process would not have the random state of this one.
        self.resumed += 1
        module = self.pretraining.module(
            self.pretraining.net(drop_rate=0.2),
            total_steps=total_steps,
            make_optimizer=self.optimizer,
            make_scheduler=self.scheduler,
        )
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(1 if not resume else 1000 + self.resumed)
        callbacks = [
            RecordEvaluations(),
            LastCheckpoint(dirpath=str(run / "checkpoints"), keep=99),
            StopAtBoundary(stop_at_step=stop),
            OtherDraws(),
            LearningRate(),
            EarlyStopping(monitor="val/loss", patience=4, min_delta=10.0),
            SampleText(prompts=["ab"], path=run / "samples.jsonl", max_new_tokens=3, every_n_steps=4),
            DrawsAgain(),
            StepTrace(path=run / "steps.jsonl"),
            LossCurve(path=run / "loss.png"),
            *([crash] if crash else []),
            BestCheckpoint(dirpath=str(run / "checkpoints")),
        ]
        teardown = Teardown()
        loggers = [RunTensorBoardLogger(save_dir=str(run)), MetricsCSVLogger(save_dir=str(run))]
        try:
            self.pretraining.fit(
                *callbacks,
                teardown,
                module=module,
                data=self.pretraining.data(num_workers=self.workers),
                resume=(run / "checkpoints/last.ckpt").resolve() if resume else None,
                accumulate_grad_batches=2,
                logger=loggers,
                default_root_dir=run,
                **options,
            )
        except (RunStopped, ZeroDivisionError):
            assert stop or crash
        teardown.fit_loop.teardown()
        return run


def outcome(run: Path) -> dict[str, Any]:
    """All that a run left, in a form that can be compared with `==`."""
    checkpoint = read_checkpoint((run / "checkpoints/last.ckpt").resolve())
    best = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
    return {
        "state": state_digest(checkpoint),
        "best": (best["global_step"], {name: w.tolist() for name, w in best["state_dict"].items()}),
        "points": next(s for name, s in checkpoint["callbacks"].items() if "LossCurve" in name),
        "steps": [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()],
        "samples": (run / "samples.jsonl").read_text(),
        "evaluations": (run / "evaluations.jsonl").read_text(),
        "csv": (run / "metrics.csv").read_text(),
        "tensorboard": tensorboard(run / "tensorboard"),
    }


def tensorboard(folder: Path) -> dict[str, Any]:
    """Steps and values of every scalar and text, as TensorBoard's own reader finds them."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    texts = {tag: [(e.step, e.tensor_proto.string_val[0]) for e in events.Tensors(tag)]
             for tag in events.Tags()["tensors"] if tag.startswith("sample/")}  # fmt: skip
    return scalars | texts


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The parts in which two outcomes differ, the hashes named one by one."""
    states = [f"state: {name}" for name, digest in one["state"].items() if other["state"][name] != digest]
    return states + [name for name in one if name != "state" and one[name] != other[name]]


VARIANTS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "muon": {"optimizer": MUON},
    "two workers": {"workers": 2},
    "torch's SGD, one cycle": {"optimizer": partial(optimizer_of, SGD), "scheduler": ONE_CYCLE},
    "plateau": {"scheduler": PLATEAU},
}


OTHERS = ("muon", "two workers", "torch's SGD, one cycle")


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """`places(name)`: the folder of a variant, and what its unbroken run left, once there is one."""
    return cache(lambda name: (tmp_path_factory.mktemp("study"), {}))


@pytest.fixture
def studies(places, pretraining) -> Callable[[str], Study]:
    """`studies(name)`: the study of a variant, whose unbroken run all tests share."""

    def named(name: str) -> Study:
        folder, unbroken = places(name)
        pretraining.cache = folder / "cache"
        return Study(pretraining, folder, unbroken, **VARIANTS[name])

    return named


@pytest.fixture
def study(studies) -> Study:
    """For what depends on neither optimizer nor workers."""
    return studies("adamw")


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_unbroken_run_has_all_that_an_interruption_could_spoil(studies, variant):
    study = studies(variant)
    unbroken = study.unbroken
    steps = unbroken["tensorboard"]
    assert [step for step, _ in steps["train/loss"]] == list(range(1, STEPS + 1))
    assert [step for step, _ in steps["val/loss"]] == [0, 3, 6, 9, 12]
    assert [len(record["batches"]) for record in unbroken["steps"]] == [2] * 7 + [1] + [2] * 4
    assert [json.loads(line)["step"] for line in unbroken["samples"].splitlines()] == [4, 8, 12]
    evaluations = [json.loads(line) for line in unbroken["evaluations"].splitlines()]
    assert [record["metrics"]["val/loss"] for record in evaluations] == pytest.approx(
        [loss for _, loss in steps["val/loss"]], rel=1e-6
    )
    assert [record["tokens_seen"] for record in evaluations] == [0, 384, 768, 1088, 1472]
    assert unbroken["best"][0] in (3, 6, 9, 12)
    # The early stopping counts evaluations, and one too many or too few would show.
    checkpoint = read_checkpoint((study.folder / "unbroken/checkpoints/last.ckpt").resolve())
    [state] = [s for name, s in checkpoint["callbacks"].items() if name.startswith("EarlyStopping")]
    assert state["wait_count"] == 2


@pytest.mark.parametrize(
    ("variant", "stops"),
    [("adamw", (1, 3, 7, 8, 10, 12)), *((name, (3, 8)) for name in OTHERS)],
)
def test_stopped_after_many_steps_it_ends_with_the_same_bits(studies, variant, stops):
    """After the first step, at an evaluation, before, at and after the end of an epoch, at the end."""
    study = studies(variant)
    for number, stop in enumerate(stops):
        study.run("again", stop=stop, resume=number > 0)
    run = study.run("again", resume=True)
    assert differences(study.unbroken, outcome(run)) == []


@pytest.mark.parametrize(
    ("limit", "first", "second"), [({"limit_train_batches": 5}, 3, 5), ({"overfit_batches": 4}, 2, 3)]
)
def test_epochs_that_the_trainer_cuts_short_resume_too(study, limit, first, second):
    """Three steps of 5 batches, or two of 4; stopped at the end of an epoch and in the next one."""
    whole = outcome(study.run(f"whole, {limit}", total_steps=7, **limit))
    name = f"{limit}, stopped"
    study.run(name, stop=first, total_steps=7, **limit)
    study.run(name, stop=second, resume=True, total_steps=7, **limit)
    assert differences(whole, outcome(study.run(name, resume=True, total_steps=7, **limit))) == []


CRASHES = [
    ("on_validation_start", 6),  # the evaluation of step 6
    ("on_validation_batch_end", 6),
    ("on_validation_end", 6),  # when the early stopping has counted it
    ("on_train_batch_start", 6),  # the step after it
    ("on_before_optimizer_step", 6),
    ("on_before_backward", 4),  # the step after one with a sample
    ("on_train_epoch_end", 8),  # with a sample
    ("on_train_batch_start", 8),  # the next epoch
    ("on_validation_end", 12),  # the last evaluation
    ("on_train_end", 12),
]


@pytest.mark.parametrize(
    ("variant", "hook", "step"),
    [
        *(("adamw", *crash) for crash in CRASHES),
        # Before and after the scheduler's step, which an evaluation makes.
        *(("plateau", hook, 6) for hook in ("on_validation_start", "on_train_batch_start")),
    ],
)
def test_after_an_error_anywhere_it_ends_with_the_same_bits(studies, variant, hook, step):
    study = studies(variant)
    name = f"crashed in {hook} at {step}"
    run = study.run(name, crash=Crash(hook, step))
    assert (run / "checkpoints/last.ckpt").resolve().name == f"step-{step:08d}.ckpt"
    study.run(name, resume=True)
    assert differences(study.unbroken, outcome(run)) == []


def test_an_error_in_the_update_saves_no_half_changed_weights(study):
    name = "crashed in the update"
    study.run(name, stop=5)

    class InUpdate(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            optimizer = trainer.optimizers[0]
            step = optimizer.step

            def failing(closure: Any = None) -> Any:
                step(closure)
                if trainer.global_step == 7:
                    raise ZeroDivisionError

            optimizer.step = failing

    run = study.run(name, resume=True, crash=InUpdate())
    assert (run / "checkpoints/last.ckpt").resolve().name == "step-00000005.ckpt"


# --- negative controls: the comparison finds what is missing --------------------------------------------


def dropped_random_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptpl.callbacks.checkpoints.set_random_state", lambda state: None)


def dropped_position(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TextDataModule, "start_at", lambda self, *, epoch, batch: None)


@pytest.mark.parametrize(
    ("control", "found"),
    [
        (dropped_random_state, {"state: weights", "state: optimizer", "state: random states", "csv"}),
        (dropped_position, {"state: weights", "state: optimizer", "steps", "csv"}),
    ],
)
def test_what_is_not_restored_is_found(study, monkeypatch, control, found):
    unbroken = study.unbroken  # before anything is dropped
    name = control.__name__
    study.run(name, stop=5)
    control(monkeypatch)
    run = study.run(name, resume=True)
    assert found <= set(differences(unbroken, outcome(run)))


def test_evaluations_counted_twice_would_be_found(study, monkeypatch):
    unbroken, name = study.unbroken, "states of callbacks as they are when the evaluation is over"
    monkeypatch.setattr("gptpl.callbacks.checkpoints._callback_states", lambda trainer: None)
    study.run(name, crash=Crash("on_train_batch_start", 6))
    run = study.run(name, resume=True)
    assert "state: callbacks" in differences(unbroken, outcome(run))
