"""Learning-rate schedules as pure functions of the optimizer step.

A schedule is a frozen dataclass that holds what a user chooses; `factor` turns a step into the number the
peak learning rate is multiplied with. Being pure, a schedule needs no state in a checkpoint: a resumed run
asks for the same step and gets the same rate.
"""

import math
from dataclasses import dataclass
from typing import Protocol

from gptpl.errors import InputError


def warmup_factor(step: int, *, warmup_steps: int) -> float:
    """Linear warm-up: (step + 1) / warmup_steps up to 1, so that the very first step already learns."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps > 0 else 1.0


def decay_progress(step: int, *, warmup_steps: int, total_steps: int) -> float:
    """How far the decay has come: 0 when warm-up ends, 1 at the last of `total_steps` steps and beyond."""
    span = total_steps - 1 - warmup_steps
    if step < warmup_steps:
        return 0.0
    return min(1.0, (step - warmup_steps) / span) if span > 0 else 1.0


def cosine_factor(step: int, *, warmup_steps: int, total_steps: int, min_factor: float) -> float:
    """Linear warm-up to 1, then half a cosine down to `min_factor` (Loshchilov & Hutter 2017).

    `step` counts finished optimizer steps: the factor belongs to the update that comes next. The last update,
    step total_steps - 1, is made at `min_factor`, and so is every step beyond.
    """
    if step < warmup_steps:
        return warmup_factor(step, warmup_steps=warmup_steps)
    progress = decay_progress(step, warmup_steps=warmup_steps, total_steps=total_steps)
    return min_factor + (1.0 - min_factor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def linear_factor(step: int, *, warmup_steps: int, total_steps: int, min_factor: float) -> float:
    """Linear warm-up to 1, then a straight line down to `min_factor` at the last update."""
    if step < warmup_steps:
        return warmup_factor(step, warmup_steps=warmup_steps)
    progress = decay_progress(step, warmup_steps=warmup_steps, total_steps=total_steps)
    return min_factor + (1.0 - min_factor) * (1.0 - progress)


class Schedule(Protocol):
    """What the training modules ask of a schedule."""

    def factor(self, step: int, *, total_steps: int, peak_lr: float) -> float:
        """The multiple of `peak_lr` for the update after `step` finished ones, of `total_steps` planned."""
        ...


@dataclass(frozen=True, kw_only=True)
class _Decay:
    """Warm-up and a floor, shared by the decaying schedules."""

    warmup_steps: int
    min_lr: float

    def __post_init__(self) -> None:
        _check_warmup(self.warmup_steps)
        if self.min_lr < 0:
            raise InputError(f"scheduler.min_lr={self.min_lr} is negative: give 0 or more")

    def _min_factor(self, total_steps: int, peak_lr: float) -> float:
        if self.min_lr > peak_lr:
            raise InputError(f"scheduler.min_lr={self.min_lr} is above optimizer.lr={peak_lr}: give less")
        _check_warmup_fits(self.warmup_steps, total_steps)
        return self.min_lr / peak_lr if peak_lr > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class CosineSchedule(_Decay):
    """`cosine_factor` down to `min_lr`."""

    def factor(self, step: int, *, total_steps: int, peak_lr: float) -> float:
        """See `Schedule.factor`. Raises InputError where warm-up or `min_lr` does not fit the run."""
        floor = self._min_factor(total_steps, peak_lr)
        return cosine_factor(step, warmup_steps=self.warmup_steps, total_steps=total_steps, min_factor=floor)


@dataclass(frozen=True, kw_only=True)
class LinearSchedule(_Decay):
    """`linear_factor` down to `min_lr`."""

    def factor(self, step: int, *, total_steps: int, peak_lr: float) -> float:
        """See `Schedule.factor`. Raises InputError where warm-up or `min_lr` does not fit the run."""
        floor = self._min_factor(total_steps, peak_lr)
        return linear_factor(step, warmup_steps=self.warmup_steps, total_steps=total_steps, min_factor=floor)


@dataclass(frozen=True, kw_only=True)
class ConstantSchedule:
    """Linear warm-up, then the peak rate to the end."""

    warmup_steps: int

    def __post_init__(self) -> None:
        _check_warmup(self.warmup_steps)

    def factor(self, step: int, *, total_steps: int, peak_lr: float) -> float:
        """See `Schedule.factor`. Raises InputError where warm-up does not fit the run."""
        _check_warmup_fits(self.warmup_steps, total_steps)
        return warmup_factor(step, warmup_steps=self.warmup_steps)


def _check_warmup(warmup_steps: int) -> None:
    if warmup_steps < 0:
        raise InputError(f"scheduler.warmup_steps={warmup_steps} is negative: give 0 or more steps")


def _check_warmup_fits(warmup_steps: int, total_steps: int) -> None:
    if warmup_steps >= total_steps:
        raise InputError(
            f"scheduler.warmup_steps={warmup_steps} leaves nothing of the run's {total_steps} optimizer"
            f" steps: set scheduler.warmup_steps below {total_steps} or train longer"
        )
