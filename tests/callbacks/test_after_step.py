"""What happens after a step: once, in order, agreed on in one reduction, without touching the disk."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

from gptpl.callbacks.after_step import AfterStep
from gptpl.callbacks.checkpoints import LastCheckpoint
from gptpl.callbacks.stopping import RunStopped, StopAtBoundary
from gptpl.training import loggers
from gptpl.training.lightning_internals import leave_tensorflow_alone

forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")


class Wishes(AfterStep):
    """Acts after some steps."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps
        self.acted: list[int] = []

    def due(self, trainer: L.Trainer, pl_module: L.LightningModule) -> bool:
        return trainer.global_step in self.steps

    def after_step(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.acted.append(trainer.global_step)


def train(rank: int, *callbacks: Any, steps: int = 10) -> dict[str, int]:
    """Calls the hooks as a Trainer of two processes does; the collectives that they called."""
    calls: dict[str, int] = {}

    def counted(name: str) -> None:
        function = getattr(torch.distributed, name)

        def call(*arguments: Any, **options: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            return function(*arguments, **options)

        setattr(torch.distributed, name, call)  # in a process of its own

    for name in ("all_reduce", "barrier", "broadcast_object_list", "broadcast", "all_gather_object"):
        counted(name)
    trainer: Any = SimpleNamespace(
        callbacks=list(callbacks),
        world_size=2,
        global_rank=rank,
        is_global_zero=rank == 0,
        global_step=0,
        fast_dev_run=False,
        strategy=SimpleNamespace(root_device=torch.device("cpu"), checkpoint_io=None),
        save_checkpoint=lambda path, weights_only: None,
    )
    module: Any = SimpleNamespace(total_steps=10**6, position=SimpleNamespace(step=0))
    for callback in callbacks:
        callback.on_train_start(trainer, module)
    for step in range(1, steps + 1):
        trainer.global_step = module.position.step = step
        for callback in callbacks:
            callback.on_train_batch_start(trainer, module, None, 0)
    return calls


class Folder(SimpleNamespace):
    """In place of the folder that `LastCheckpoint` writes to."""

    def path(self, step: int) -> int:
        return step

    def settle(self, step: int) -> None:
        pass


@forks
def test_two_ranks_need_one_reduction_a_step(two_ranks):
    def rank_of(rank: int) -> dict[str, int]:
        last: Any = LastCheckpoint(dirpath="unused", every_n_minutes=10)
        last.folder = Folder()
        return train(rank, last, StopAtBoundary(), Wishes(3))

    assert two_ranks(rank_of) == [{"all_reduce": 10}] * 2


@forks
def test_what_one_rank_wants_all_do(two_ranks):
    """Of the second rank: a save because its clock is ahead, a signal, and an act of its own."""

    def rank_of(rank: int) -> Any:
        last: Any = LastCheckpoint(dirpath="unused", every_n_minutes=10)
        last.folder, wishes, stopping = Folder(), Wishes(4, *([2] if rank else [])), StopAtBoundary()
        saves: list[int] = []
        last.save = lambda trainer, module, wait=True: saves.append(trainer.global_step)

        class Now(AfterStep):
            def after_step(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
                if rank == 1 and trainer.global_step == 5:
                    last._saved_seconds -= 700
                if rank == 1 and trainer.global_step == 7:
                    stopping.stop()

        try:
            train(rank, last, stopping, wishes, Now())
        except RunStopped as stop:
            return str(stop), saves[0], wishes.acted
        return None

    assert two_ranks(rank_of) == [("stopped by stop() after step 8", 6, [2, 4])] * 2


def test_all_act_at_the_hook_of_the_first(training):
    acted: list[str] = []

    class Named(AfterStep):
        def __init__(self, name: str) -> None:
            self.name = name

        @property
        def state_key(self) -> str:
            return self.name

        def after_step(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            acted.append(f"{self.name}{trainer.global_step}")

    class Between(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *arguments: Any) -> None:
            acted.append("-")

    training.fit(Named("a"), Between(), Named("b"), max_steps=3, val_check_interval=4)
    assert acted == ["-", "a1", "b1", "-", "a2", "b2", "-", "a3", "b3"]


def test_a_step_neither_walks_the_loggers_folder_nor_flushes(pretraining, tmp_path, monkeypatch):
    calls = {"rglob": 0, "flush": 0}

    def counted(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            calls[name] += 1
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    counted(Path, "rglob")
    leave_tensorflow_alone()
    from gptpl.training.event_file import EventFile  # imports TensorBoard

    counted(EventFile, "flush")
    monkeypatch.setattr(loggers, "FLUSH_SECONDS", 1000)

    def of(steps: int) -> dict[str, int]:
        logger = loggers.RunTensorBoardLogger(save_dir=str(tmp_path / str(steps)))
        module = pretraining.module(total_steps=steps, eval_every_n_steps=1000)
        last = LastCheckpoint(dirpath=str(tmp_path / f"{steps} checkpoints"))
        before = dict(calls)
        pretraining.fit(last, module=module, logger=[logger])
        assert logger.position()["files"]
        return {name: calls[name] - before[name] for name in calls}

    assert of(14) == of(4)
