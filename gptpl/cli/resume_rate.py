"""What keeps the learning rate of a resumed run from going up again unasked."""

from collections.abc import Callable

Factor = Callable[[int], float]
"""The multiple of the peak learning rate for the update after so many finished ones."""


def lr_ceiling(
    old_factor: Factor, *, step: int, old_total_steps: int, total_steps: int, ceiling: float | None
) -> float | None:
    """The multiple of the peak learning rate that a resumed run stays at or below; None: there is no limit.

    Args:
        old_factor: the schedule for the old horizon.
        step: finished optimizer steps.
        old_total_steps: the old horizon.
        total_steps: the new one. As long as it is the old one, the schedule goes on as it was.
        ceiling: what the run was held at before.
    """
    if total_steps == old_total_steps:
        return ceiling
    # The highest that was still to come; of a plan without a step left, its last one.
    left = range(step, old_total_steps) or (old_total_steps - 1,)
    highest = max(old_factor(later) for later in left)
    return highest if ceiling is None else min(highest, ceiling)


def words_if_held(
    factor: Factor, ceiling: float | None, *, step: int, total_steps: int, peak_lr: float
) -> str | None:
    """What to say where a ceiling cuts off some of the updates after `step`; `peak_lr` is `optimizer.lr`."""
    highest = max((factor(later) for later in range(step, total_steps)), default=0.0)
    if ceiling is None or highest <= ceiling:
        return None
    return (
        f"learning rate: held at or below {ceiling * peak_lr:.2g} (the schedule for the new horizon would"
        f" raise it to {highest * peak_lr:.2g}; give optimizer.lr=... to let it)"
    )
