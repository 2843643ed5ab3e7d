"""A loss or gradient that is no number: found before it reaches the weights, reported, skipped if asked."""

import copy
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from gptpl.callbacks.checkpoints import LastCheckpoint
from gptpl.checkpoints.format import read_checkpoint
from gptpl.training.module import NonFiniteError

WEIGHT = "blocks.1.ff.down_proj.weight"


class Poison(L.Callback):
    """Makes the logits of one step's batches NaN, or its gradient infinite."""

    def __init__(self, step: int, what: str) -> None:
        self.step = step
        self.what = what

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: torch.Tensor) -> None:
        if trainer.global_step + 1 != self.step:
            return
        weight = dict(pl_module.net.named_parameters())[WEIGHT]
        if self.what == "loss":
            loss.register_hook(lambda grad: grad * float("nan"))
        else:
            handle: Any = weight.register_hook(lambda grad: self.once(handle, grad))

    @staticmethod
    def once(handle: Any, grad: torch.Tensor) -> torch.Tensor:
        handle.remove()
        return torch.full_like(grad, float("inf"))


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "checkpoints"


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = read_checkpoint(folder / f"step-{step:08d}.ckpt")["state_dict"]
    return state


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_the_run_stops_with_the_step_before_saved(pretraining, folder, what):
    last = LastCheckpoint(dirpath=str(folder))
    with pytest.raises(NonFiniteError, match=r"of step 7 is not finite") as found:
        pretraining.fit(last, Poison(7, what), accumulate_grad_batches=2)
    assert found.value.step == 7
    assert (folder / "last.ckpt").resolve() == folder / "step-00000006.ckpt"
    assert all(weight.isfinite().all() for weight in weights(folder, 6).values())
    assert list(pretraining.column("train/loss")) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "step, epoch, batches, precision",
    [(3, 0, [5, 6], "32-true"), (3, 0, [5, 6], "64-true"), (9, 1, [1, 2], "32-true")],  # 15 in an epoch
)
def test_the_report_shows_the_texts_of_the_step_and_where_the_gradient_broke(
    pretraining, step, epoch, batches, precision
):
    data = pretraining.data()
    with pytest.raises(NonFiniteError) as found:
        pretraining.fit(Poison(step, "gradient"), data=data, accumulate_grad_batches=2, precision=precision)
    report = "\n".join(found.value.report)
    assert report.startswith(f"step {step}: epoch {epoch}, batch {batches[0]} on; gradient norm ")
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    first, second = (list(loader)[number - 1] for number in batches)
    assert all(f"\nbatch {number} of the epoch: loss " in report for number in batches)
    for row in torch.cat([first[0], second[0]]).tolist():
        assert f"  {bytes(row).decode()!r}" in report
    assert report.count("loss ") == 2
    broken = [line for line in found.value.report if line.endswith((", inf", ", nan"))]
    assert [line.split(":")[0].strip() for line in broken] == [WEIGHT]


def test_with_a_loss_scale_a_gradient_is_skipped_and_a_loss_that_is_no_number_is_not(pretraining):
    """The scaler lowers its scale for the one; the other is the same with any scale, step after step."""

    def precision() -> MixedPrecision:
        return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))

    assert pretraining.fit(Poison(7, "gradient"), plugins=[precision()]).global_step == 20
    module = pretraining.module()
    original = module.batch_loss

    def batch_loss(batch: Any) -> torch.Tensor:
        loss: torch.Tensor = original(batch)
        return loss * float("nan") if module.trainer.global_step == 6 else loss

    module.batch_loss = batch_loss
    with pytest.raises(NonFiniteError, match=r"of step 7 is not finite"):
        pretraining.fit(module=module, plugins=[precision()], logger=False)


def test_what_an_error_left_of_a_step_is_not_in_the_next_fit(pretraining):
    broken = pretraining.module()
    with pytest.raises(NonFiniteError):
        pretraining.fit(Poison(3, "loss"), module=broken, accumulate_grad_batches=2)
    losses = []
    for module in (pretraining.module(copy.deepcopy(broken.net)), broken):
        torch.manual_seed(0)
        trainer = pretraining.fit(module=module, accumulate_grad_batches=2, max_steps=1, logger=False)
        losses.append(trainer.callback_metrics["train/loss"].item())
    assert losses[0] == losses[1]


def test_a_skipped_step_leaves_the_weights_and_the_rest_of_the_run_goes_on(pretraining, folder):
    module = pretraining.module(skip_steps=[7], total_steps=9)
    last = LastCheckpoint(dirpath=str(folder), every_n_steps=1, keep=99)
    pretraining.fit(last, Poison(7, "loss"), module=module)
    before, skipped, after = (weights(folder, step) for step in (6, 7, 8))
    assert all(torch.equal(before[name], skipped[name]) for name in before)
    assert not any(torch.equal(before[name], after[name]) for name in before if "norm" not in name)
    losses = pretraining.column("train/loss")
    assert list(losses) == list(range(1, 10))
    assert [step for step, loss in losses.items() if math.isnan(loss)] == [7]


def test_a_skipped_step_is_no_update_with_a_gradient_of_zero(pretraining, folder):
    """Which weight decay and momentum would turn into a change: the moments, too, stay as they are."""
    module = pretraining.module(skip_steps=[7], total_steps=9)
    last = LastCheckpoint(dirpath=str(folder), every_n_steps=1, keep=99)
    pretraining.fit(last, module=module)
    state = [read_checkpoint(folder / f"step-{s:08d}.ckpt")["optimizer_states"][0]["state"] for s in (6, 7)]
    for key, of_parameter in state[0].items():
        assert all(torch.equal(value, state[1][key][name]) for name, value in of_parameter.items())
