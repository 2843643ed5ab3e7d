"""The learning-rate range test (Smith 2017, "Cyclical learning rates"), as functions of the losses."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

SMOOTHED_SHARE = 0.1
"""Of all steps: as many are averaged, before and after each one together."""
LOST = 0.1
"""A loss that is this share of the first one above the lowest has diverged, and so has one that has lost all
that was gained, if that is more."""
_ONLINE_DECAY = 0.7


@dataclass(frozen=True, kw_only=True)
class RangeResult:
    """What a ramp of the rate shows.

    Attributes:
        smoothed: losses averaged over neighbouring steps, as many as were given.
        suggested: the rate at which the smoothed loss falls fastest, by the rate's logarithm; None: it
            never falls.
        diverges: the first rate at which training has diverged; None: it has not.
    """

    smoothed: list[float]
    suggested: float | None
    diverges: float | None


def ramp_rate(step: int, *, min_lr: float, max_lr: float, steps: int) -> float:
    """The rate of step 0, 1, ... of so many, from `min_lr` to `max_lr` by equal factors."""
    return float(min_lr * (max_lr / min_lr) ** (step / (steps - 1)))


class Divergence:
    """Whether the losses so far have diverged; told one after the other."""

    def __init__(self) -> None:
        self._average = self._weight = 0.0
        self._first = self._lowest = math.nan

    def after(self, loss: float) -> bool:
        """Takes the next loss; whether it is no number, or its running average far above its lowest."""
        if not math.isfinite(loss):
            return True
        self._average = _ONLINE_DECAY * self._average + (1 - _ONLINE_DECAY) * loss
        self._weight = _ONLINE_DECAY * self._weight + (1 - _ONLINE_DECAY)
        average = self._average / self._weight
        if math.isnan(self._first):
            self._first = self._lowest = average
        self._lowest = min(self._lowest, average)
        return average > self._lowest + max(self._first - self._lowest, LOST * abs(self._first))


def range_result(rates: Sequence[float], losses: Sequence[float], *, steps: int) -> RangeResult:
    """Reads a ramp that was planned for so many steps and may have ended before.

    Args:
        rates: of the steps that were made, ascending.
        losses: the loss of each, before its update; the last may be no number.
        steps: of the whole ramp.
    """
    divergence = Divergence()
    diverges = next((rate for rate, loss in zip(rates, losses, strict=True) if divergence.after(loss)), None)
    finite = [loss for loss in losses if math.isfinite(loss)]
    smoothed = _centred_mean(np.array(finite, dtype=np.float64), width=max(3, round(SMOOTHED_SHARE * steps)))
    suggested = None
    if len(finite) >= 3:
        slope = np.gradient(smoothed, np.log(rates[: len(finite)]))
        # What follows the lowest loss can only be noise, or the way back down from a divergence.
        falling = slope[: int(smoothed.argmin()) + 1]
        steepest = int(falling.argmin())
        suggested = float(rates[steepest]) if falling[steepest] < 0 else None
    padded = [*map(float, smoothed), *[math.nan] * (len(losses) - len(finite))]
    return RangeResult(smoothed=padded, suggested=suggested, diverges=diverges)


def _centred_mean(values: npt.NDArray[np.float64], *, width: int) -> npt.NDArray[np.float64]:
    """Each value averaged with its neighbours, equally many before and after; at the ends with fewer."""
    reach = width // 2
    means = []
    for i in range(len(values)):
        near = min(reach, i, len(values) - 1 - i)
        means.append(values[i - near : i + near + 1].mean())
    return np.array(means, dtype=np.float64)
