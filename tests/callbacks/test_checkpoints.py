"""When `last.ckpt` and `best.ckpt` are written, and what is in them."""

import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

from gptpl.callbacks import checkpoints
from gptpl.callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from gptpl.callbacks.metrics import Hyperparameters
from gptpl.checkpoints.loading import load_model
from gptpl.errors import InputError


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


@pytest.fixture
def saved_steps(monkeypatch):
    """The steps at which checkpoints are written."""
    steps: list[int] = []
    save = L.Trainer.save_checkpoint

    def noting(trainer: L.Trainer, *args: Any, **options: Any) -> None:
        steps.append(trainer.global_step)
        save(trainer, *args, **options)

    monkeypatch.setattr(L.Trainer, "save_checkpoint", noting)
    return steps


@pytest.fixture(autouse=True)
def interrupts() -> Iterator[None]:
    """Lightning leaves Ctrl-C switched off when it was pressed once."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def names(folder: Path) -> list[str]:
    """Of the checkpoints, whose recorded hashes lie beside them."""
    files = sorted(file.name for file in folder.iterdir())
    whole = [name for name in files if name.endswith(".ckpt")]
    recorded = [name.removesuffix(".sha256") for name in files if name.endswith(".sha256")]
    assert recorded == [name for name in whole if name != "last.ckpt"]
    assert len(files) == len(whole) + len(recorded)
    return whole


def content(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded


class BreakOff(L.Callback):
    """Raises at the start of the batch after so many steps, or (None) just before training starts."""

    def __init__(self, error: BaseException, *, step: int | None) -> None:
        self.error = error
        self.step = step

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.step is None:
            raise self.error

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            raise self.error


# --- last.ckpt ------------------------------------------------------------------------------------------


def test_last_is_saved_when_training_ends(pretraining, folder, saved_steps):
    module = pretraining.module(total_steps=5)
    pretraining.fit(LastCheckpoint(dirpath=str(folder)), module=module)
    assert saved_steps == [5]
    assert names(folder) == ["last.ckpt", "step-00000005.ckpt"]
    checkpoint = content(folder / "last.ckpt")
    assert checkpoint["global_step"] == 5
    assert checkpoint["gptpl"]["tokens_seen"] == 5 * 64
    moments = checkpoint["optimizer_states"][0]["state"]
    assert len(moments) == len(list(module.net.parameters()))
    assert checkpoint["lr_schedulers"]


def test_last_is_saved_every_so_many_steps(pretraining, folder, saved_steps):
    callback = LastCheckpoint(dirpath=str(folder), every_n_steps=3)
    pretraining.fit(callback, module=pretraining.module(total_steps=8))
    assert saved_steps == [3, 6, 8]


def test_steps_are_optimizer_steps(pretraining, folder, saved_steps):
    """With accumulation too: one save, at the batch that completes the step."""
    callback = LastCheckpoint(dirpath=str(folder), every_n_steps=2)
    module = pretraining.module(total_steps=5)
    pretraining.fit(callback, module=module, accumulate_grad_batches=2)
    assert saved_steps == [2, 4, 5]


def test_last_is_saved_every_so_many_minutes(pretraining, folder, saved_steps, monkeypatch):
    """By a clock on which every look takes one minute."""
    minutes = iter(range(10_000))
    clock = SimpleNamespace(monotonic=lambda: 60.0 * next(minutes))
    monkeypatch.setattr(checkpoints, "time", clock)
    callback = LastCheckpoint(dirpath=str(folder), every_n_minutes=3)
    pretraining.fit(callback, module=pretraining.module(total_steps=8))
    assert saved_steps == [3, 6, 8]


def test_a_step_is_saved_before_its_evaluation(pretraining, folder):
    """So that an evaluation that fails loses nothing; the resumed run makes up for it."""
    saved: list[list[str]] = []

    class Look(L.Callback):
        def on_validation_batch_start(self, trainer: L.Trainer, *arguments: Any, **options: Any) -> None:
            if trainer.global_step == 6 and not saved:
                saved.append(names(folder))

    pretraining.fit(
        LastCheckpoint(dirpath=str(folder)),
        Hyperparameters(),
        Look(),
        module=pretraining.module(total_steps=6),
    )
    assert saved == [["last.ckpt", "step-00000006.ckpt"]]
    lowest = content(folder / "last.ckpt")["callbacks"]["Hyperparameters"]["best"]["best_val/loss"]
    evaluated = pretraining.column("val/loss")
    assert lowest == pytest.approx(min(evaluated[0], evaluated[3]), rel=1e-6)


def test_a_run_that_has_nothing_to_do_leaves_the_file_alone(pretraining, folder, saved_steps):
    callback = LastCheckpoint(dirpath=str(folder))
    pretraining.fit(callback, module=pretraining.module(total_steps=5))
    stamp = (folder / "last.ckpt").stat().st_mtime_ns
    pretraining.fit(
        LastCheckpoint(dirpath=str(folder)),
        module=pretraining.module(total_steps=5),
        resume=folder / "last.ckpt",
    )
    assert (folder / "last.ckpt").stat().st_mtime_ns == stamp
    assert saved_steps == [5]


@pytest.mark.parametrize(
    ("error", "raised"), [(RuntimeError("out of memory"), RuntimeError), (KeyboardInterrupt(), SystemExit)]
)
def test_last_is_saved_when_training_is_broken_off(pretraining, folder, logged, error, raised):
    """Lightning turns Ctrl-C into SystemExit."""
    module = pretraining.module()
    with pytest.raises(raised):
        pretraining.fit(LastCheckpoint(dirpath=str(folder)), BreakOff(error, step=4), module=module)
    assert content(folder / "last.ckpt")["global_step"] == 4
    loaded = load_model(folder / "last.ckpt")
    assert all(a.equal(b) for a, b in zip(loaded.net.parameters(), module.net.parameters(), strict=True))
    assert f"saved step 4: {folder / 'step-00000004.ckpt'}" in logged()


@pytest.mark.parametrize("step", [None, 0])
def test_a_run_broken_off_before_its_first_step_saves_nothing(pretraining, folder, step):
    with pytest.raises(RuntimeError, match="no data"):
        pretraining.fit(BreakOff(RuntimeError("no data"), step=step), LastCheckpoint(dirpath=str(folder)))
    assert not folder.exists()


@pytest.mark.parametrize("step", [None, 5])
def test_a_resumed_run_broken_off_at_once_keeps_the_file_it_came_from(pretraining, folder, saved_steps, step):
    pretraining.fit(LastCheckpoint(dirpath=str(folder)), module=pretraining.module(total_steps=5))
    before = (folder / "last.ckpt").read_bytes()
    with pytest.raises(RuntimeError, match="too early"):
        pretraining.fit(
            BreakOff(RuntimeError("too early"), step=step),
            LastCheckpoint(dirpath=str(folder)),
            module=pretraining.module(total_steps=9),
            resume=folder / "last.ckpt",
        )
    assert (folder / "last.ckpt").read_bytes() == before
    assert saved_steps == [5]


@pytest.mark.parametrize(
    ("world_size", "updating", "saved"), [(1, False, [4]), (2, False, []), (1, True, [])]
)
def test_broken_off_it_saves_only_what_is_whole(world_size, updating, saved, monkeypatch):
    """Saving takes all processes, of which some may be gone; a step may have changed half the weights."""
    saves: list[Any] = []
    callback = LastCheckpoint(dirpath="unused")
    monkeypatch.setattr(callback, "folder", SimpleNamespace(path=lambda step: step, settle=lambda step: None))
    trainer: Any = SimpleNamespace(
        world_size=world_size,
        is_global_zero=True,
        global_step=0,
        fast_dev_run=False,
        strategy=SimpleNamespace(checkpoint_io=None),
        save_checkpoint=lambda path, weights_only: saves.append(path),
    )
    module: Any = SimpleNamespace(updating=updating, position=SimpleNamespace(step=4))
    callback.on_train_start(trainer, module)
    callback.on_exception(trainer, module, RuntimeError())
    assert saves == saved


def test_a_save_that_fails_on_the_way_out_does_not_hide_the_first_error(
    pretraining, folder, logged, monkeypatch
):
    def full(self: Any, *arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device", str(folder / "step-00000004.ckpt"))

    monkeypatch.setattr(L.Trainer, "save_checkpoint", full)
    with pytest.raises(RuntimeError, match="out of memory"):
        pretraining.fit(LastCheckpoint(dirpath=str(folder)), BreakOff(RuntimeError("out of memory"), step=4))
    assert any(line.startswith("step 4 could not be saved: ") for line in logged())


def test_a_disk_that_is_full_ends_the_run_with_the_checkpoint_before(pretraining, folder, monkeypatch):
    save = L.Trainer.save_checkpoint

    def full_at_6(self: L.Trainer, *arguments: Any, **options: Any) -> None:
        if self.global_step >= 6:
            raise OSError(28, "No space left on device", str(folder / "step-00000006.ckpt"))
        save(self, *arguments, **options)

    monkeypatch.setattr(L.Trainer, "save_checkpoint", full_at_6)
    with pytest.raises(OSError, match=r"No space left on device: '.*step-00000006\.ckpt'"):
        pretraining.fit(LastCheckpoint(dirpath=str(folder), every_n_steps=3))
    assert names(folder) == ["last.ckpt", "step-00000003.ckpt"]


@pytest.mark.parametrize("name", ["every_n_minutes", "every_n_steps"])
@pytest.mark.parametrize("value", [0, -1])
def test_saving_every_no_steps_is_refused(name, value):
    with pytest.raises(
        InputError, match=rf"^callbacks\.checkpoint_last\.{name} must be positive or null, got {value}"
    ):
        LastCheckpoint(dirpath="unused", **{name: value})


# --- best.ckpt ------------------------------------------------------------------------------------------


def with_losses(module: L.LightningModule, losses: dict[int, float]) -> L.LightningModule:
    """The module with made-up validation losses at its steps."""

    def on_validation_epoch_end() -> None:
        module.log("val/loss", losses[module.trainer.global_step])

    module.on_validation_epoch_end = on_validation_epoch_end  # type: ignore[method-assign]
    return module


def test_best_is_written_at_every_improvement_and_at_no_other_evaluation(pretraining, folder, saved_steps):
    losses = {0: 1.0, 3: 5.0, 6: 4.0, 9: 4.5, 12: 3.0, 15: float("nan"), 18: 6.0, 20: 3.5}
    module = with_losses(pretraining.module(), losses)
    pretraining.fit(best := BestCheckpoint(dirpath=str(folder)), module=module)
    assert saved_steps == [3, 6, 12]
    assert names(folder) == ["best.ckpt"]
    assert content(folder / "best.ckpt")["global_step"] == 12
    assert best.best_model_score is not None
    assert best.best_model_score.item() == 3.0


def test_best_holds_the_weights_and_no_optimizer_state(pretraining, folder):
    pretraining.fit(
        BestCheckpoint(dirpath=str(folder)),
        LastCheckpoint(dirpath=str(folder)),
        module=pretraining.module(total_steps=6),
    )
    best, last = content(folder / "best.ckpt"), content(folder / "last.ckpt")
    assert "optimizer_states" not in best
    assert "lr_schedulers" not in best
    assert best["state_dict"].keys() == last["state_dict"].keys()
    assert best["gptpl"] == last["gptpl"]
    assert (folder / "best.ckpt").stat().st_size < (folder / "last.ckpt").stat().st_size / 2


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_run_knows_the_best_so_far(pretraining, folder, saved_steps):
    def fit(total_steps: int, losses: dict[int, float], **options: Any) -> None:
        module = with_losses(pretraining.module(total_steps=total_steps), losses)
        callbacks = [BestCheckpoint(dirpath=str(folder)), LastCheckpoint(dirpath=str(folder))]
        pretraining.fit(*callbacks, module=module, **options)

    fit(6, {0: 9.0, 3: 5.0, 6: 6.0})
    fit(12, {6: 6.0, 9: 5.5, 12: 4.0}, resume=folder / "last.ckpt")
    assert content(folder / "best.ckpt")["global_step"] == 12
    assert saved_steps == [3, 6, 12, 12]  # best, last, last, best


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_there_is_one_best_file_and_no_second_version(pretraining, folder):
    for total_steps in (4, 6):
        module = pretraining.module(total_steps=total_steps)
        pretraining.fit(BestCheckpoint(dirpath=str(folder)), module=module)
    assert names(folder) == ["best.ckpt"]
    assert content(folder / "best.ckpt")["global_step"] == 6
