"""What gptpl needs of the insides of Lightning and torch: each test says what breaks where it fails."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader

from gptpl.checkpoints.resume_state import Position, loops_at
from gptpl.training import lightning_internals
from gptpl.training.lightning_internals import ShapesAlone
from gptpl.training.loggers import RunTensorBoardLogger


class Line(L.LightningModule):
    """A model of one number; `evaluated` are the steps after which it was evaluated."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.evaluated: list[int] = []

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        return self.layer(batch).sum()

    def validation_step(self, batch: torch.Tensor) -> None:
        self.evaluated.append(self.trainer.global_step)

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return DataLoader(torch.ones(8, 1))  # type: ignore[arg-type]

    def val_dataloader(self) -> Any:
        return DataLoader(torch.ones(1, 1))  # type: ignore[arg-type]


class Finished(Logger):
    """Keeps the metric `finished`."""

    name, version = "finished", ""

    def __init__(self) -> None:
        super().__init__()
        self.finished: list[float] = []

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.finished.append(metrics["finished"])


def trainer(folder: Path, **settings: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "check_val_every_n_epoch": None,
        "default_root_dir": folder,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "logger": False,
        "max_steps": 8,
        "num_sanity_val_steps": 0,
        "val_check_interval": 8,
    }
    return L.Trainer(**(defaults | settings))


def test_evaluations_are_scheduled_step_by_step(tmp_path):
    """Or `eval_every_n_steps` counts batches, or evaluates never."""

    class Scheduled(Line):
        def on_train_batch_end(self, *of_batch: Any) -> None:
            due = self.trainer.global_step in (2, 3, 7)
            lightning_internals.evaluate_after_this_batch(self.trainer, due)

    trainer(tmp_path).fit(model := Scheduled())
    assert model.evaluated == [2, 3, 7]


def test_the_counter_of_logged_steps_is_the_one_that_lightning_reads(tmp_path):
    """Or a resumed run with `log_every_n_steps` above 1 logs other steps than an uninterrupted one."""

    class Shifted(Line):
        def on_train_start(self) -> None:
            self.trainer.fit_loop.epoch_loop._batches_that_stepped = 1  # as an evaluation made up for

        def on_train_batch_start(self, *of_batch: Any) -> None:
            lightning_internals.count_logged_steps(self.trainer)

        def on_train_batch_end(self, *of_batch: Any) -> None:
            self.log("finished", float(self.trainer.global_step))

    made = trainer(tmp_path, logger=(logger := Finished()), log_every_n_steps=2)
    made.fit(Shifted())
    assert logger.finished == [2, 4, 6, 8]


def test_the_module_can_end_the_training(tmp_path):
    """Or a resumed run ends before its `total_steps`."""

    class Ending(Line):
        def on_train_batch_end(self, *of_batch: Any) -> None:
            self.trainer.should_stop = self.trainer.global_step == 20

    made = trainer(tmp_path, max_steps=3, max_epochs=1)
    lightning_internals.let_module_end(made)
    made.fit(Ending())
    assert made.global_step == 20


@pytest.mark.parametrize("fused", [True, False])
def test_a_scaler_knows_which_optimizers_unscale_by_themselves(fused):
    """Or fp16 training clips gradients that are still scaled, or unscales them twice."""
    layer = nn.Linear(2, 1)
    optimizer = AdamW(layer.parameters(), fused=fused)
    assert lightning_internals.unscales_in_step(optimizer) == fused


def test_tensors_have_shapes_alone():
    """Or `gptpl plan` and `data.batch_size=auto` take the memory that they estimate."""
    with ShapesAlone():
        huge = torch.zeros(1_000_000, 1_000_000)
        assert (huge @ huge.T).shape == huge.shape
        assert huge.untyped_storage() is huge.view(-1).untyped_storage()  # by which `step_memory` counts
        assert huge.untyped_storage().nbytes() == 4 * 10**12


def test_tensorboard_leaves_tensorflow_alone(monkeypatch):
    """Or the first logged number waits for an installed TensorFlow. See also test_loggers.py."""
    monkeypatch.delitem(sys.modules, "tensorboard.compat.notf", raising=False)
    monkeypatch.setitem(sys.modules, "tensorflow", SimpleNamespace())
    lightning_internals.leave_tensorflow_alone()
    from tensorboard.compat import notf

    assert notf is not None


def test_the_loop_counters_of_a_checkpoint_are_those_that_lightning_writes(tmp_path):
    """Or no run resumes: `gptpl.checkpoints.resume_state` writes them anew."""

    def keys(value: Any, prefix: str = "") -> set[str]:
        if not isinstance(value, dict):
            return {prefix}
        return {prefix, *(key for name in value for key in keys(value[name], f"{prefix}/{name}"))}

    made = trainer(tmp_path, max_steps=3)
    made.fit(Line())
    loops = {"fit_loop": made.fit_loop.state_dict()}
    position = Position(step=3, epoch=0, batch=3, tokens_seen=0)
    assert keys(loops_at(loops, position, evaluate=True)) == keys(loops)


def test_everything_that_a_summary_writer_adds_goes_into_our_event_file(tmp_path):
    """Or TensorBoard shows points twice, or none of a resumed run: torch has chosen a file of its own."""
    writer = RunTensorBoardLogger(save_dir=str(tmp_path)).experiment
    from gptpl.training.event_file import EventFile  # now, without TensorFlow

    writer.add_scalar("a", 1.0, 1)
    writer.add_text("b", "text", 1)
    assert isinstance(writer.file_writer.event_writer, EventFile)
    size = writer.file_writer.event_writer.size
    writer.close()
    [path] = (tmp_path / "tensorboard").iterdir()
    assert path.stat().st_size == size > 100


@pytest.mark.filterwarnings("ignore:.*is deprecated. Please use:FutureWarning")  # names since torch 2.13
def test_processes_that_do_not_exist_send_nothing_and_are_counted():
    """Or `gptpl plan plan.dry_run=true` fails, or counts something else than torch sends."""
    distributed, counter = torch.distributed, lightning_internals.CollectiveCounter()
    with lightning_internals.fake_processes(4), ShapesAlone(), counter:
        assert (distributed.get_rank(), distributed.get_world_size()) == (0, 4)
        part, whole = torch.zeros(10), torch.zeros(40)
        distributed.all_gather_into_tensor(whole, part)
        distributed.reduce_scatter_tensor(part, whole)
        distributed.all_reduce(part)
        distributed.all_reduce(part)
    assert not distributed.is_initialized()
    assert counter.calls == {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2}
    assert counter.bytes == {"all_gather": 160, "reduce_scatter": 160, "all_reduce": 80}
