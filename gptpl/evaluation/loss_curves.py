"""What loss curves show: those of a run in words, and those of a learning-rate range test."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Kind = Literal["learning", "overfitting", "underfitting", "unchanged", "unstable", "too short"]

# --- a run in words -------------------------------------------------------------------------------------

MIN_POINTS = 3
"""Evaluations that are needed for a verdict."""
JUMP_NATS, JUMP_FRACTION = 0.5, 0.2
"""The training loss jumps when it climbs above its lowest value so far by more than JUMP_NATS and by more
than JUMP_FRACTION of its fall until then. The noise of a mean over a few batches stays below both."""
STILL_FRACTION, STILL_NATS = 0.01, 0.01
"""Validation losses closer than this to each other (as a fraction of the whole fall, and at least in nats)
are equal: even a converged model still moves a little."""
RISE_STILLS = 3.0
"""A validation loss has risen when it ends so many of these differences above its lowest value."""
GAP_FRACTION = 0.25
"""A validation loss that stands still means overfitting if the training loss makes so much of its fall
then."""
HARDLY_MOVED_FRACTION = 0.02
"""A training loss that ends less than this below its first value has hardly moved."""
GUESSING_FRACTION = 0.95
"""A loss above this fraction of the loss of guessing is no better than guessing."""


@dataclass(frozen=True, kw_only=True)
class LossPoint:
    """One evaluation. Losses are means in nats per token, both measured in evaluation mode."""

    step: int
    """Finished optimizer steps."""
    epoch: float
    """Passes over the training data, with the fraction of the current one."""
    tokens_seen: int
    train_loss: float
    val_loss: float


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the curves show, as a word and as a line of text."""

    kind: Kind
    message: str


def curve_verdict(
    points: Sequence[LossPoint],
    *,
    uniform_loss: float | None = None,
    whole_model: bool = True,
    caveat: str = "",
) -> Verdict:
    """Judge a run by its evaluations, in any order.

    `uniform_loss` is ln V, the loss of guessing evenly among V tokens, if known. A larger model is advised
    only if the `whole_model` trains. A `caveat` on the data comes first in the message.

    The first rule that holds decides:

    1. unstable: a loss is not finite;
    2. too short: fewer than `MIN_POINTS` evaluations;
    3. unstable: the training loss jumps. A validation loss that jumps while the training loss falls is
       overfitting;
    4. overfitting: after the validation loss reached its lowest level the training loss continued to fall,
       while the validation loss rose again, or stood still during a large part of the training loss's fall;
    5. unchanged: the training loss hardly moved, and was better than guessing before the first step: the
       weights had been trained before;
    6. underfitting: the training loss hardly moved, or ends no better than guessing;
    7. learning: none of these.
    """
    ordered = sorted(points, key=lambda point: point.step)
    kind, message = _unsteady(ordered) or _judged(ordered, uniform_loss, whole_model)
    return Verdict(kind=kind, message=f"{caveat} {message}" if caveat else message)


def _unsteady(points: Sequence[LossPoint]) -> tuple[Kind, str] | None:
    """By rules 1 to 3."""
    remedy = "try a lower learning rate, warm-up or gradient clipping."
    for point in points:
        for name, loss in (("training", point.train_loss), ("validation", point.val_loss)):
            if not math.isfinite(loss):
                return "unstable", f"Unstable: the {name} loss is {loss} at step {point.step}; {remedy}"
    if len(points) < MIN_POINTS:
        return "too short", (
            f"Too short to judge: {len(points)} of at least {MIN_POINTS} evaluations; "
            "train longer or evaluate more often."
        )
    lowest = first = points[0]
    for point in points:
        climb = point.train_loss - lowest.train_loss
        if climb > max(JUMP_NATS, JUMP_FRACTION * (first.train_loss - lowest.train_loss)):
            return "unstable", (
                f"Unstable: training loss jumped from {_nats(lowest.train_loss)} (step {lowest.step}) to "
                f"{_nats(point.train_loss)} at step {point.step}; {remedy}"
            )
        lowest = min(lowest, point, key=lambda p: p.train_loss)
    return None


def _judged(points: Sequence[LossPoint], uniform_loss: float | None, whole_model: bool) -> tuple[Kind, str]:
    """By rules 4 to 7."""
    first, last = points[0], points[-1]
    best = min(points, key=lambda point: point.val_loss)
    still = max(STILL_NATS, STILL_FRACTION * (first.val_loss - best.val_loss))
    # From here on the validation loss gains nothing.
    onset = next(point for point in points if point.val_loss <= best.val_loss + still)
    fall, fell_after_onset = (point.train_loss - last.train_loss for point in (first, onset))
    overfitting = f"Overfitting from step {onset.step}: training loss fell to {_nats(last.train_loss)} while"
    if last.val_loss - best.val_loss > RISE_STILLS * still and best.train_loss - last.train_loss > still:
        return "overfitting", (
            f"{overfitting} validation loss rose from its lowest {_nats(best.val_loss)} (step {best.step})"
            f" to {_nats(last.val_loss)}."
        )
    if fell_after_onset > still and fell_after_onset > GAP_FRACTION * fall:
        return "overfitting", f"{overfitting} validation loss stood still at about {_nats(best.val_loss)}."

    more = "a larger model" if whole_model else "training more of the model (tune=all)"
    courses = (
        f"train {_nats(first.train_loss)} -> {_nats(last.train_loss)}, "
        f"val {_nats(first.val_loss)} -> {_nats(last.val_loss)}"
    )
    hardly_moved = fall < HARDLY_MOVED_FRACTION * abs(first.train_loss)
    no_better = math.inf if uniform_loss is None else GUESSING_FRACTION * uniform_loss
    if hardly_moved and uniform_loss is not None and not first.step and first.train_loss <= no_better:
        return "unchanged", (
            f"Unchanged: the losses end where the weights began ({courses}): these may know such text"
            f" already; if not, try more steps, a higher learning rate{'' if whole_model else f' or {more}'}."
        )
    guess = ""
    if uniform_loss is not None and last.train_loss > no_better:
        guess = f", while guessing alone gives {_nats(uniform_loss)}"
    if hardly_moved or guess:
        return "underfitting", (
            f"Underfitting: both losses stay high ({courses}){guess}; "
            f"try more steps, a higher learning rate or {more}."
        )
    if points.index(onset) < len(points) - len(points) // 3:  # the last third of the run gained nothing
        return "learning", (
            f"Learning: both losses fell ({courses}), but since step {onset.step} "
            "the validation loss no longer falls."
        )
    return "learning", f"Learning: both losses still fall ({courses}); more steps may help."


def _nats(loss: float) -> str:
    return f"{loss:.2f}" if abs(loss) < 1e4 else f"{loss:.3g}"


# --- in a picture ---------------------------------------------------------------------------------------


def tokens_text(tokens: float, _position: object = None) -> str:
    """Such as "500", "40k", "1.5M", "3B": a formatter of matplotlib's for an axis of tokens."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(tokens) >= size:
            return f"{tokens / size:g}{letter}"
    return f"{tokens:g}"


def finite(loss: float) -> float:
    """The loss, or NaN, which leaves a gap in a curve."""
    return loss if math.isfinite(loss) else math.nan


# --- the learning-rate range test (Smith 2017, "Cyclical learning rates") -------------------------------

SMOOTHED_FRACTION = 0.1
"""Of all steps, over which each loss is averaged, before and after it together."""
LOST = 0.1
"""Training has diverged when its loss is above the lowest one by this fraction of the first one, and by all
that was gained."""
_ONLINE_DECAY = 0.7


@dataclass(frozen=True, kw_only=True)
class RangeResult:
    """What a ramp of the learning rate shows."""

    smoothed: list[float]
    """Losses averaged over neighbouring steps, as many as were given."""
    suggested: float | None
    """The rate at which the smoothed loss falls fastest, by the rate's logarithm; None: it never falls."""
    diverges: float | None
    """The first rate at which training has diverged; None: it has not."""


def ramp_rate(step: int, *, min_lr: float, max_lr: float, steps: int) -> float:
    """The learning rate of step 0, 1, ..., from `min_lr` to `max_lr` by equal factors."""
    return float(min_lr * (max_lr / min_lr) ** (step / (steps - 1)))


class Divergence:
    """Tells whether the losses so far have diverged."""

    def __init__(self) -> None:
        self._average = self._weight = 0.0
        self._first = self._lowest = math.nan

    def after(self, loss: float) -> bool:
        """Take the next loss; True if it is not finite, or its running average far above its lowest."""
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
    """Read a ramp of `steps` steps that may have ended early.

    `rates` are the learning rates of the steps that were made, ascending, `losses` those before each update,
    of which the last may not be finite.
    """
    divergence = Divergence()
    diverges = next((rate for rate, loss in zip(rates, losses, strict=True) if divergence.after(loss)), None)
    known = [loss for loss in losses if math.isfinite(loss)]
    width = max(3, round(SMOOTHED_FRACTION * steps))
    smoothed = _centred_mean(np.array(known, dtype=np.float64), width=width)
    suggested = None
    if len(known) >= 3:
        slope = np.gradient(smoothed, np.log(rates[: len(known)]))
        # What follows the lowest loss can only be noise, or the way back down from a divergence.
        falling = slope[: int(smoothed.argmin()) + 1]
        steepest = int(falling.argmin())
        suggested = float(rates[steepest]) if falling[steepest] < 0 else None
    padded = [*map(float, smoothed), *[math.nan] * (len(losses) - len(known))]
    return RangeResult(smoothed=padded, suggested=suggested, diverges=diverges)


def _centred_mean(values: npt.NDArray[np.float64], *, width: int) -> npt.NDArray[np.float64]:
    """Each value averaged with its neighbours, equally many before and after; fewer at the ends."""
    last = len(values) - 1
    reaches = [min(width // 2, i, last - i) for i in range(len(values))]
    return np.array([values[i - near : i + near + 1].mean() for i, near in enumerate(reaches)], np.float64)
