"""What a loss curve says, in words: learning, overfitting, underfitting, unstable, and so on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["learning", "overfitting", "underfitting", "unchanged", "unstable", "too short"]

MIN_POINTS = 3
"""Fewer evaluations than this have no course to judge."""

JUMP_NATS = 0.5
JUMP_SHARE = 0.2
"""The training loss "jumps" when it climbs above its lowest value so far by more than JUMP_NATS and by more
than JUMP_SHARE of all it had fallen by then. The noise of a mean over a few batches stays below both."""

STILL_SHARE = 0.01
STILL_NATS = 0.01
"""Validation losses closer than this to each other (as a share of the whole fall, but at least in nats) count
as equal: at the end of a run even a converged model still moves a little."""

RISE_STILLS = 3.0
"""A validation loss has risen when it ends this many such differences above its lowest value."""

GAP_SHARE = 0.25
"""A validation loss that only stands still means overfitting when the training loss made this share of its
whole fall in the meantime."""

HARDLY_MOVED_SHARE = 0.02
"""A training loss that ends above this share below its first value has hardly moved."""

GUESSING_SHARE = 0.95
"""A loss above this share of the uniform guess's loss is no better than guessing."""


@dataclass(frozen=True, kw_only=True)
class LossPoint:
    """One evaluation. Losses are means in nats per token, both measured in evaluation mode."""

    step: int
    """Optimizer steps done."""
    epoch: float
    """Passes over the training data done, with the fraction of the present one."""
    tokens_seen: int
    train_loss: float
    val_loss: float


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the curves show, as a word and as one line for the reader."""

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

    Args:
        points: the evaluations.
        uniform_loss: ln V, the loss of guessing evenly among V tokens, where it is known.
        whole_model: whether all of the model trains: if not, a larger one is no advice.
        caveat: a sentence on the data without which the losses would mislead; it comes first.

    The first rule that holds decides:

    1. unstable: a loss is not finite;
    2. too short: fewer than `MIN_POINTS` evaluations;
    3. unstable: the training loss jumps up (`JUMP_NATS`, `JUMP_SHARE`);
    4. overfitting: since the validation loss reached its lowest level the training loss went on falling,
       while the validation loss rose again, or stood still during a large part of the training loss's fall;
    5. unchanged: the training loss hardly moved, and was better than guessing before the first step, as of
       weights that had been trained before;
    6. underfitting: the training loss hardly moved, or ends no better than guessing;
    7. learning: what remains.

    Only the training loss counts for a jump: a validation loss that climbs while the training loss falls is
    overfitting, however fast it climbs.
    """
    points = sorted(points, key=lambda point: point.step)
    more = "a larger model" if whole_model else "training more of the model (tune=all)"
    verdict = (
        _not_finite(points)
        or _too_short(points)
        or _jump(points)
        or _overfitting(points)
        or _unchanged(points, uniform_loss, "" if whole_model else f" or {more}")
        or _underfitting(points, uniform_loss, more)
        or _learning(points)
    )
    return replace(verdict, message=f"{caveat} {verdict.message}") if caveat else verdict


def _not_finite(points: Sequence[LossPoint]) -> Verdict | None:
    for point in points:
        for name, loss in (("training", point.train_loss), ("validation", point.val_loss)):
            if not math.isfinite(loss):
                message = (
                    f"Unstable: the {name} loss is {loss} at step {point.step}; "
                    "try a lower learning rate, warm-up or gradient clipping."
                )
                return Verdict(kind="unstable", message=message)
    return None


def _too_short(points: Sequence[LossPoint]) -> Verdict | None:
    if len(points) >= MIN_POINTS:
        return None
    message = (
        f"Too short to judge: {len(points)} of at least {MIN_POINTS} evaluations; "
        "train longer or evaluate more often."
    )
    return Verdict(kind="too short", message=message)


def _jump(points: Sequence[LossPoint]) -> Verdict | None:
    lowest = first = points[0]
    for point in points:
        climb = point.train_loss - lowest.train_loss
        if climb > max(JUMP_NATS, JUMP_SHARE * (first.train_loss - lowest.train_loss)):
            message = (
                f"Unstable: training loss jumped from {_nats(lowest.train_loss)} (step {lowest.step}) to "
                f"{_nats(point.train_loss)} at step {point.step}; "
                "try a lower learning rate, warm-up or gradient clipping."
            )
            return Verdict(kind="unstable", message=message)
        lowest = min(lowest, point, key=lambda p: p.train_loss)
    return None


def _overfitting(points: Sequence[LossPoint]) -> Verdict | None:
    first, last = points[0], points[-1]
    best = min(points, key=lambda point: point.val_loss)
    still, onset = _still(points), _onset(points)
    fell_after_best = best.train_loss - last.train_loss
    fell_after_onset = onset.train_loss - last.train_loss
    if last.val_loss - best.val_loss > RISE_STILLS * still and fell_after_best > still:
        course = f"rose from its lowest {_nats(best.val_loss)} (step {best.step}) to {_nats(last.val_loss)}"
    elif fell_after_onset > still and fell_after_onset > GAP_SHARE * (first.train_loss - last.train_loss):
        course = f"stood still at about {_nats(best.val_loss)}"
    else:
        return None
    message = (
        f"Overfitting from step {onset.step}: training loss fell to {_nats(last.train_loss)} "
        f"while validation loss {course}."
    )
    return Verdict(kind="overfitting", message=message)


def _unchanged(points: Sequence[LossPoint], uniform_loss: float | None, more: str) -> Verdict | None:
    first = points[0]
    if uniform_loss is None or first.step or first.train_loss > GUESSING_SHARE * uniform_loss:
        return None
    if not _hardly_moved(points):
        return None
    message = (
        f"Unchanged: the losses end where the weights began ({_courses(points)}): these may know such text"
        f" already; if not, try more steps, a higher learning rate{more}."
    )
    return Verdict(kind="unchanged", message=message)


def _underfitting(points: Sequence[LossPoint], uniform_loss: float | None, more: str) -> Verdict | None:
    guess = ""
    if uniform_loss is not None and points[-1].train_loss > GUESSING_SHARE * uniform_loss:
        guess = f", while guessing alone gives {_nats(uniform_loss)}"
    if not _hardly_moved(points) and not guess:
        return None
    message = (
        f"Underfitting: both losses stay high ({_courses(points)}){guess}; "
        f"try more steps, a higher learning rate or {more}."
    )
    return Verdict(kind="underfitting", message=message)


def _hardly_moved(points: Sequence[LossPoint]) -> bool:
    first, last = points[0], points[-1]
    return first.train_loss - last.train_loss < HARDLY_MOVED_SHARE * abs(first.train_loss)


def _learning(points: Sequence[LossPoint]) -> Verdict:
    onset = _onset(points)
    if points.index(onset) < len(points) - len(points) // 3:  # the last third of the run gained nothing
        message = (
            f"Learning: both losses fell ({_courses(points)}), but since step {onset.step} "
            "the validation loss no longer falls."
        )
    else:
        message = f"Learning: both losses still fall ({_courses(points)}); more steps may help."
    return Verdict(kind="learning", message=message)


def _onset(points: Sequence[LossPoint]) -> LossPoint:
    """The first point whose validation loss is as good as the lowest: from here on it gained nothing."""
    limit = min(point.val_loss for point in points) + _still(points)
    return next(point for point in points if point.val_loss <= limit)


def _still(points: Sequence[LossPoint]) -> float:
    """The difference in validation loss, in nats, below which two evaluations count as equal."""
    fall = points[0].val_loss - min(point.val_loss for point in points)
    return max(STILL_NATS, STILL_SHARE * fall)


def _courses(points: Sequence[LossPoint]) -> str:
    first, last = points[0], points[-1]
    return (
        f"train {_nats(first.train_loss)} -> {_nats(last.train_loss)}, "
        f"val {_nats(first.val_loss)} -> {_nats(last.val_loss)}"
    )


def _nats(loss: float) -> str:
    return f"{loss:.2f}" if abs(loss) < 1e4 else f"{loss:.3g}"
