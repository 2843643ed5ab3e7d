"""Learning-rate schedules as pure functions of the optimizer step, and torch's own schedulers.

A schedule needs no state in a checkpoint: a resumed run asks for the same step and gets the same learning
rate. A class of `torch.optim.lr_scheduler`, or any class or function whose first parameter is `optimizer`,
is stepped after every optimizer step instead, and keeps its own state in checkpoints.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from gptpl.errors import InputError
from gptpl.settings import NOT_NEGATIVE, check_limits
from gptpl.training.optimizers import made_by

WarmUp = int | Literal["auto"]


@runtime_checkable  # the class of a node `scheduler` may be any that has `factor`
class Schedule(Protocol):
    """What a run asks of a schedule, which holds the user's settings."""

    def factor(self, step: int, *, total_steps: int, peak_lr: float) -> float:
        """The multiple of `peak_lr` for the update after `step` finished ones, of `total_steps` planned."""
        ...


@dataclass(frozen=True, kw_only=True)
class ConstantSchedule:
    """Linear warm-up, then the peak learning rate to the end.

    Warm-up is (step + 1) / warmup_steps, so that the very first step already learns. "auto" is 10 steps, in a
    run of less than 40 a quarter of them.
    """

    warmup_steps: Annotated[WarmUp, NOT_NEGATIVE] = 0

    def __post_init__(self) -> None:
        check_limits(type(self), "scheduler.", **vars(self))

    def factor(self, step: int, *, total_steps: int, peak_lr: float) -> float:
        """See `Schedule`. Raises InputError for a setting that does not fit the run."""
        warmup_steps = min(10, total_steps // 4) if self.warmup_steps == "auto" else self.warmup_steps
        if warmup_steps >= total_steps:
            raise InputError(
                f"scheduler.warmup_steps={warmup_steps} must be below the run's {total_steps} optimizer"
                " steps: lower it or train longer"
            )
        floor = self._floor(peak_lr)
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        span = total_steps - 1 - warmup_steps
        progress = min(1.0, (step - warmup_steps) / span) if span > 0 else 1.0
        return floor + (1.0 - floor) * self._decay(progress)

    def _floor(self, peak_lr: float) -> float:
        """The multiple of `peak_lr` at the end."""
        return 1.0

    def _decay(self, progress: float) -> float:
        """From 1 when warm-up ends, at `progress` 0, to 0 at the last step, at `progress` 1."""
        return 1.0 - progress


@dataclass(frozen=True, kw_only=True)
class LinearSchedule(ConstantSchedule):
    """Linear warm-up, then a straight line down to `min_lr`.

    The last update is made at `min_lr`, and so is every one beyond.
    """

    warmup_steps: Annotated[WarmUp, NOT_NEGATIVE] = "auto"
    min_lr: Annotated[float, NOT_NEGATIVE] = 1e-6

    def _floor(self, peak_lr: float) -> float:
        if self.min_lr > peak_lr:
            raise InputError(f"scheduler.min_lr={self.min_lr} must not be above optimizer.lr={peak_lr}")
        return self.min_lr / peak_lr if peak_lr > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class CosineSchedule(LinearSchedule):
    """Linear warm-up, then half a cosine down to `min_lr` (Loshchilov & Hutter 2017)."""

    def _decay(self, progress: float) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * progress))


# --- torch's schedulers ---------------------------------------------------------------------------------


def takes_optimizer(target: Callable[..., Any]) -> bool:
    """Whether a class or function makes a scheduler such as torch's, by its first parameter."""
    return next(iter(inspect.signature(target).parameters), None) == "optimizer"


def scheduler_of(
    factory: Callable[..., LRScheduler], optimizer: Optimizer, *, total_steps: int | None = None
) -> LRScheduler:
    """The scheduler that a class or function like torch's makes, its settings bound.

    A `total_steps` that is left out, such as OneCycleLR's, is the run's. ReduceLROnPlateau follows
    `val/loss`, with one step for each evaluation. Raises InputError for settings that it refuses.
    """
    horizon = inspect.signature(factory).parameters.get("total_steps")
    left_out = horizon is not None and horizon.default in (None, inspect.Parameter.empty)
    settings = {"total_steps": total_steps} if left_out and total_steps else {}
    scheduler = made_by("scheduler", factory, optimizer, LRScheduler, **settings)
    if isinstance(scheduler, ReduceLROnPlateau) and scheduler.mode != "min":
        raise InputError("scheduler.mode must be min: ReduceLROnPlateau follows val/loss")
    return scheduler


def as_configured(optimizer: Optimizer, scheduler: LRScheduler) -> dict[str, Any]:
    """The settings of an optimizer and a scheduler before the first step, as plain data for checkpoints."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    state = {k: v for k, v in scheduler.state_dict().items() if _is_plain(v)}
    return {"groups": groups, "scheduler": state}


def apply_changes(
    optimizer: Optimizer, scheduler: LRScheduler, *, before: Mapping[str, Any], now: Mapping[str, Any]
) -> None:
    """Apply the settings that have changed since the run began to a restored optimizer and scheduler.

    `before` and `now` are from `as_configured`. The scheduler's effect on the learning rate is kept: twice
    the peak doubles the present learning rate.
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
