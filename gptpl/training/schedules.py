"""Learning-rate schedules as pure functions of the optimizer step, and torch's schedulers beside them.

A schedule needs no state in a checkpoint: a resumed run asks for the same step and gets the same rate. A
class of `torch.optim.lr_scheduler`, or any that is handed the optimizer as its first argument, is stepped
after every optimizer step instead, and keeps its own state in checkpoints.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from gptpl.errors import InputError
from gptpl.training.optimizers import made_by


def warmup_factor(step: int, *, warmup_steps: int) -> float:
    """Linear warm-up: (step + 1) / warmup_steps up to 1, so that the very first step already learns."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps > 0 else 1.0


def cosine_factor(step: int, *, warmup_steps: int, total_steps: int, min_factor: float) -> float:
    """Linear warm-up to 1, then half a cosine down to `min_factor` (Loshchilov & Hutter 2017).

    `step` counts finished optimizer steps: the factor belongs to the update that comes next. The last update,
    step total_steps - 1, is made at `min_factor`, and so is every step beyond.
    """
    if step < warmup_steps:
        return warmup_factor(step, warmup_steps=warmup_steps)
    progress = _progress(step, warmup_steps, total_steps)
    return min_factor + (1.0 - min_factor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def linear_factor(step: int, *, warmup_steps: int, total_steps: int, min_factor: float) -> float:
    """Linear warm-up to 1, then a straight line down to `min_factor`, as `cosine_factor`."""
    if step < warmup_steps:
        return warmup_factor(step, warmup_steps=warmup_steps)
    return min_factor + (1.0 - min_factor) * (1.0 - _progress(step, warmup_steps, total_steps))


def _progress(step: int, warmup_steps: int, total_steps: int) -> float:
    """How far the decay has come: 0 when warm-up ends, 1 at the last step and beyond."""
    span = total_steps - 1 - warmup_steps
    return min(1.0, (step - warmup_steps) / span) if span > 0 else 1.0


class Schedule(Protocol):
    """What a run asks of a schedule, which holds what a user chooses."""

    def factor(self, step: int, *, total_steps: int, peak_lr: float) -> float:
        """The multiple of `peak_lr` for the update after `step` finished ones, of `total_steps` planned."""
        ...


@dataclass(frozen=True, kw_only=True)
class _WarmUp:
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise InputError(f"scheduler.warmup_steps={self.warmup_steps} is negative: give 0 or more steps")

    def factor(self, step: int, *, total_steps: int, peak_lr: float) -> float:
        """See `Schedule`. Raises InputError where a setting does not fit the run."""
        if self.warmup_steps >= total_steps:
            raise InputError(
                f"scheduler.warmup_steps={self.warmup_steps} leaves nothing of the run's {total_steps}"
                f" optimizer steps: set scheduler.warmup_steps below {total_steps} or train longer"
            )
        return warmup_factor(step, warmup_steps=self.warmup_steps)


@dataclass(frozen=True, kw_only=True)
class ConstantSchedule(_WarmUp):
    """Linear warm-up, then the peak rate to the end."""


@dataclass(frozen=True, kw_only=True)
class CosineSchedule(_WarmUp):
    """`cosine_factor` down to `min_lr`."""

    warmup_steps: int = 10
    min_lr: float = 1e-6
    _curve: ClassVar[Callable[..., float]] = staticmethod(cosine_factor)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_lr < 0:
            raise InputError(f"scheduler.min_lr={self.min_lr} is negative: give 0 or more")

    def factor(self, step: int, *, total_steps: int, peak_lr: float) -> float:
        """See `Schedule`."""
        if self.min_lr > peak_lr:
            raise InputError(f"scheduler.min_lr={self.min_lr} is above optimizer.lr={peak_lr}: give less")
        super().factor(step, total_steps=total_steps, peak_lr=peak_lr)
        return self._curve(
            step,
            warmup_steps=self.warmup_steps,
            total_steps=total_steps,
            min_factor=self.min_lr / peak_lr if peak_lr > 0 else 0.0,
        )


@dataclass(frozen=True, kw_only=True)
class LinearSchedule(CosineSchedule):
    """`linear_factor` down to `min_lr`."""

    _curve = staticmethod(linear_factor)


# --- torch's schedulers ---------------------------------------------------------------------------------


def takes_optimizer(target: Callable[..., Any]) -> bool:
    """Whether a class or function makes a scheduler such as torch's: its first parameter is `optimizer`."""
    return next(iter(inspect.signature(target).parameters), None) == "optimizer"


def scheduler_of(
    factory: Callable[..., LRScheduler], optimizer: Optimizer, *, total_steps: int | None = None
) -> LRScheduler:
    """The scheduler that a class or function like torch's makes, its settings bound.

    A `total_steps` that is left out (OneCycleLR has it) is the run's. ReduceLROnPlateau follows `val/loss`,
    one step an evaluation. Raises InputError for settings that it refuses.
    """
    horizon = inspect.signature(factory).parameters.get("total_steps")
    left_out = horizon is not None and horizon.default in (None, inspect.Parameter.empty)
    settings = {"total_steps": total_steps} if left_out and total_steps else {}
    scheduler = made_by("scheduler", factory, optimizer, LRScheduler, **settings)
    if isinstance(scheduler, ReduceLROnPlateau) and scheduler.mode != "min":
        raise InputError("scheduler: ReduceLROnPlateau follows val/loss, which is better low: leave mode=min")
    return scheduler


def as_configured(optimizer: Optimizer, scheduler: LRScheduler) -> dict[str, Any]:
    """The settings of an optimizer and a scheduler before the first step, as plain data for checkpoints."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    state = {k: v for k, v in scheduler.state_dict().items() if _is_plain(v)}
    return {"groups": groups, "scheduler": state}


def apply_changes(
    optimizer: Optimizer, scheduler: LRScheduler, *, before: Mapping[str, Any], now: Mapping[str, Any]
) -> None:
    """Gives a restored optimizer and scheduler the settings that are others now than when the run began.

    Both are as restored, `before` and `now` from `as_configured`. Whatever the scheduler has made of the
    learning rate is kept: a peak of twice the old one doubles the present rate.
    """
    for group, old, new in zip(optimizer.param_groups, before["groups"], now["groups"], strict=True):
        changed = {name: value for name, value in new.items() if name != "lr" and old.get(name) != value}
        peak = "initial_lr" if "initial_lr" in new else "lr"
        if old[peak] != new[peak]:
            changed["lr"] = group["lr"] * new[peak] / old[peak] if old[peak] else new["lr"]
        group.update(changed)
    counts = ("last_epoch", "_step_count", "_last_lr")
    changed = {
        name: value
        for name, value in now["scheduler"].items()
        if name not in counts and before["scheduler"].get(name) != value
    }
    if changed:
        scheduler.load_state_dict(scheduler.state_dict() | changed)


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
