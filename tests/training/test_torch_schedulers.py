"""torch's learning-rate schedulers in a run: against the scheduler alone, resumed, overridden, refused."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from gptpl.callbacks.checkpoints import LastCheckpoint
from gptpl.callbacks.metrics import LearningRate
from gptpl.callbacks.stopping import RunStopped, StopAtBoundary
from gptpl.errors import InputError
from gptpl.training.optimizers import optimizer_of
from gptpl.training.schedules import CosineSchedule, scheduler_of, takes_optimizer

LR = 0.02
STEPS = 9


class Halving(lr_scheduler.LRScheduler):
    """A user's own."""

    def get_lr(self) -> list[Any]:
        return [rate * 0.5**self.last_epoch for rate in self.base_lrs]


def warm_up_then_decay(optimizer: torch.optim.Optimizer, *, gamma: float) -> lr_scheduler.LRScheduler:
    parts = [
        lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3),
        lr_scheduler.ExponentialLR(optimizer, gamma),
    ]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[3])


def sgd(lr: float = LR) -> Callable[[Any], torch.optim.Optimizer]:
    return partial(optimizer_of, partial(torch.optim.SGD, lr=lr, momentum=0.9))


def trained(
    pretraining: Any,
    scheduler: Any,
    *,
    lr: float = LR,
    stop: int | None = None,
    resume: Path | None = None,
    steps: int = STEPS,
) -> dict[int, float]:
    """Trains and gives the learning rate of each step."""
    module = pretraining.module(total_steps=steps, make_optimizer=sgd(lr), make_scheduler=scheduler)
    callbacks = [
        LastCheckpoint(dirpath=pretraining.folder / "checkpoints", keep=99),
        StopAtBoundary(stop_at_step=stop),
        LearningRate(),
    ]
    try:
        pretraining.fit(*callbacks, module=module, resume=resume)
    except RunStopped:
        assert stop
    rates: dict[int, float] = pretraining.column("lr")
    return rates


def alone(make: Any, *, lr: float = LR, losses: dict[int, float] | None = None) -> list[float]:
    """The rates that the scheduler gives by itself."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr, momentum=0.9)
    scheduler = make(optimizer)
    rates = []
    for step in range(1, STEPS + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if losses is None:
            scheduler.step()
        elif step in losses:
            scheduler.step(losses[step])
    return rates


@pytest.mark.parametrize(
    "make",
    [
        partial(lr_scheduler.StepLR, step_size=2, gamma=0.5),
        partial(lr_scheduler.CosineAnnealingLR, T_max=STEPS),
        partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=3),
        partial(lr_scheduler.OneCycleLR, max_lr=0.05, total_steps=STEPS),
        partial(lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.05, step_size_up=2),
        partial(lr_scheduler.MultiStepLR, milestones=[2, 5]),
        partial(warm_up_then_decay, gamma=0.8),
        Halving,
    ],
)
@pytest.mark.filterwarnings("ignore:.*epoch parameter in:UserWarning:torch")  # SequentialLR's own call
def test_the_rates_are_the_schedulers_own_also_when_resumed(pretraining: Any, make: Any) -> None:
    assert takes_optimizer(make)
    expected = alone(make)
    trained(pretraining, make, stop=4)
    last = (pretraining.folder / "checkpoints/last.ckpt").resolve()
    assert list(trained(pretraining, make, resume=last).values()) == pytest.approx(expected, rel=1e-6)


def test_a_plateau_is_of_evaluations(pretraining: Any) -> None:
    make = partial(lr_scheduler.ReduceLROnPlateau, patience=0, factor=0.5, threshold=0.5)
    rates = trained(pretraining, make)
    losses = pretraining.column("val/loss")
    assert list(losses) == [0, 3, 6, 9]
    expected = alone(make, losses=losses)
    assert list(rates.values()) == pytest.approx(expected, rel=1e-6)
    assert len(set(expected)) == 2  # it was reduced after the second


def test_a_horizon_that_is_left_out_is_the_runs(pretraining: Any) -> None:
    rates = trained(pretraining, partial(lr_scheduler.OneCycleLR, max_lr=0.05))
    expected = alone(partial(lr_scheduler.OneCycleLR, max_lr=0.05, total_steps=STEPS))
    assert list(rates.values()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        partial(lr_scheduler.StepLR, step_size=2, gamma=0.5),
        partial(lr_scheduler.CosineAnnealingLR, T_max=STEPS),
        partial(warm_up_then_decay, gamma=0.8),
        partial(lr_scheduler.ReduceLROnPlateau, patience=0, factor=0.5, threshold=0.5),
    ],
)
@pytest.mark.filterwarnings("ignore:.*epoch parameter in:UserWarning:torch")
def test_another_rate_counts_from_the_next_step_on(pretraining: Any, make: Any) -> None:
    trained(pretraining, make, stop=7)
    last = (pretraining.folder / "checkpoints/last.ckpt").resolve()
    rates = trained(pretraining, make, resume=last, lr=3 * LR)
    losses = pretraining.column("val/loss") if make.func is lr_scheduler.ReduceLROnPlateau else None
    assert len(set(alone(make, losses=losses)[:7])) > 1
    expected = alone(make, losses=losses)[:7] + [3 * rate for rate in alone(make, losses=losses)[7:]]
    assert list(rates.values()) == pytest.approx(expected, rel=1e-6)


def test_other_settings_of_the_scheduler_count_from_the_next_step_on(pretraining: Any) -> None:
    trained(pretraining, partial(lr_scheduler.ExponentialLR, gamma=0.5), stop=3)
    last = (pretraining.folder / "checkpoints/last.ckpt").resolve()
    rates = trained(pretraining, partial(lr_scheduler.ExponentialLR, gamma=0.9), resume=last)
    expected = [LR, LR / 2, LR / 4, LR / 8, *(LR / 8 * 0.9**k for k in range(1, 6))]
    assert list(rates.values()) == pytest.approx(expected, rel=1e-6)


def test_another_scheduler_is_refused_and_so_is_a_run_beyond_its_end(pretraining: Any) -> None:
    one_cycle = partial(lr_scheduler.OneCycleLR, max_lr=0.05)
    trained(pretraining, one_cycle)
    last = (pretraining.folder / "checkpoints/last.ckpt").resolve()
    for other, name in ((None, "a schedule of gptpl"), (Halving, "Halving")):
        with pytest.raises(InputError, match=f"scheduler is OneCycleLR, this run has {name}: only gptpl's"):
            trained(pretraining, other, resume=last)
    fixed = partial(lr_scheduler.OneCycleLR, max_lr=0.05, total_steps=STEPS)
    with pytest.raises(InputError, match="OneCycleLR has no step left"):
        trained(pretraining, fixed, resume=last, steps=STEPS + 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lr_scheduler.StepLR, "StepLR refuses its settings: .*'step_size'"),
        (partial(lr_scheduler.ReduceLROnPlateau, factor=2.0), "Factor should be < 1.0"),
        (
            partial(lr_scheduler.ReduceLROnPlateau, mode="max"),
            "scheduler.mode must be min: ReduceLROnPlateau",
        ),
        (lambda optimizer: 3, "<lambda> returned int, not a torch LRScheduler"),
    ],
)
def test_what_a_class_refuses_is_one_line(make: Any, message: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(InputError, match=message) as caught:
        scheduler_of(make, optimizer)
    assert "\n" not in str(caught.value)


def test_schedules_of_gptpl_take_no_optimizer() -> None:
    assert not takes_optimizer(CosineSchedule)
