"""The verdict on curves whose meaning is known: a published run and made ones."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptpl.evaluation.loss_curves import LossPoint, curve_verdict

# The published log of the book's run: train loss / validation loss every 5 steps.
PUBLISHED = """
9.781/9.933 8.111/8.339 6.661/7.048 5.961/6.616 5.726/6.600 5.201/6.348 4.417/6.278 4.069/6.226 3.732/6.160
2.850/6.179 2.427/6.141 2.104/6.134 1.882/6.234 1.320/6.238 0.985/6.242 0.717/6.293 0.541/6.393 0.391/6.452
"""


def curve(train: Sequence[float], val: Sequence[float]) -> list[LossPoint]:
    return [
        LossPoint(step=5 * i, epoch=i / 2, tokens_seen=2560 * i, train_loss=a, val_loss=b)
        for i, (a, b) in enumerate(zip(train, val, strict=True))
    ]


def published() -> list[LossPoint]:
    pairs = [pair.split("/") for pair in PUBLISHED.split()]
    return curve([float(a) for a, _ in pairs], [float(b) for _, b in pairs])


def test_published_run_overfits() -> None:
    verdict = curve_verdict(published(), uniform_loss=math.log(50257))
    assert verdict.kind == "overfitting"
    assert verdict.message == (
        "Overfitting from step 40: training loss fell to 0.39 while validation loss rose from its lowest "
        "6.13 (step 55) to 6.45."
    )


def test_published_run_was_still_learning_at_step_30() -> None:
    verdict = curve_verdict(published()[:7])
    assert verdict.kind == "learning"
    assert "both losses still fall (train 9.78 -> 4.42, val 9.93 -> 6.28)" in verdict.message


def test_points_may_come_in_any_order() -> None:
    assert curve_verdict(published()[::-1]) == curve_verdict(published())


def test_falling_losses_are_learning() -> None:
    falls = [4 + 6 * math.exp(-i / 10) for i in range(20)]
    verdict = curve_verdict(curve(falls, [loss + 0.1 for loss in falls]))
    assert verdict.kind == "learning"
    assert "more steps may help" in verdict.message


def test_levelled_off_losses_are_learning_that_has_ended() -> None:
    falls = [4 + 6 * math.exp(-i / 3) for i in range(40)]
    verdict = curve_verdict(curve(falls, [loss + 0.1 for loss in falls]))
    assert verdict.kind == "learning"
    # 1 % of the fall of 6 is left after 3 ln 100 = 13.8 points of 5 steps.
    assert "since step 70 the validation loss no longer falls" in verdict.message


def test_growing_gap_over_a_still_validation_loss_is_overfitting() -> None:
    train = [10, 8, 6, 5, 4, 3, 2, 1]
    val = [10, 8, 6.5, 6.2, 6.2, 6.2, 6.2, 6.2]
    verdict = curve_verdict(curve(train, val))
    assert verdict.kind == "overfitting"
    assert "from step 15" in verdict.message
    assert "stood still at about 6.20" in verdict.message


def test_still_validation_loss_over_a_slowly_falling_training_loss_is_learning_that_has_ended() -> None:
    train = [10, 8, 6, 5, 4.9, 4.8, 4.7, 4.6]
    val = [10, 8, 6.5, 6.2, 6.2, 6.2, 6.2, 6.2]
    verdict = curve_verdict(curve(train, val))
    assert verdict.kind == "learning"
    assert "since step 15 the validation loss no longer falls" in verdict.message


def test_losses_that_rise_together_are_no_overfitting() -> None:
    verdict = curve_verdict(curve([5, 4, 4.1, 4.2], [5, 4.2, 4.4, 4.6]))
    assert verdict.kind == "learning"
    assert "no longer falls" in verdict.message


def test_finetuning_that_only_hurts_validation_is_overfitting_from_the_start() -> None:
    verdict = curve_verdict(curve([3.2, 3.0, 2.7, 2.4], [3.1, 3.15, 3.2, 3.3]))
    assert verdict.kind == "overfitting"
    assert "from step 0:" in verdict.message


def test_validation_loss_that_doubles_between_evaluations_is_no_jump() -> None:
    assert curve_verdict(curve([10, 5, 1, 0.1], [10, 6, 7.5, 9])).kind == "overfitting"


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_flat_losses_are_underfitting(noise: float) -> None:
    flat = [10.8 + noise * (-1) ** i for i in range(20)]
    verdict = curve_verdict(curve(flat, flat))
    assert verdict.kind == "underfitting"
    assert "stay high (train 10.8" in verdict.message


def test_losses_near_guessing_are_underfitting_although_they_fell() -> None:
    falls = [12.0, 11.5, 11.0, 10.8]
    assert curve_verdict(curve(falls, falls)).kind == "learning"
    verdict = curve_verdict(curve(falls, falls), uniform_loss=10.82)
    assert verdict.kind == "underfitting"
    assert "guessing alone gives 10.82" in verdict.message


def test_trained_weights_that_hardly_move_are_unchanged_and_no_larger_model_is_asked_for() -> None:
    flat = [2.50, 2.49, 2.50, 2.48]
    for whole_model, advice in ((True, "learning rate."), (False, "training more of the model (tune=all).")):
        verdict = curve_verdict(curve(flat, flat), uniform_loss=10.82, whole_model=whole_model)
        assert verdict.kind == "unchanged"
        assert "(train 2.50 -> 2.48, val 2.50 -> 2.48)" in verdict.message
        assert verdict.message.endswith(advice)


def test_a_high_start_and_a_first_evaluation_after_steps_are_no_trained_weights() -> None:
    flat = [10.8, 10.8, 10.8]
    assert curve_verdict(curve(flat, flat), uniform_loss=10.82).kind == "underfitting"
    later = [replace(point, step=point.step + 5) for point in curve([2.5] * 3, [2.5] * 3)]
    assert curve_verdict(later, uniform_loss=10.82).kind == "underfitting"


def test_a_part_of_a_model_that_underfits_is_not_told_to_be_larger() -> None:
    flat = [0.69, 0.69, 0.69]
    whole = curve_verdict(curve(flat, flat), uniform_loss=math.log(2))
    part = curve_verdict(curve(flat, flat), uniform_loss=math.log(2), whole_model=False)
    assert whole.kind == part.kind == "underfitting"
    assert whole.message.endswith("a higher learning rate or a larger model.")
    assert part.message.endswith("a higher learning rate or training more of the model (tune=all).")


def test_a_caveat_comes_first() -> None:
    verdict = curve_verdict(published(), caveat="All are cut.")
    assert verdict.kind == "overfitting"
    assert verdict.message.startswith("All are cut. Overfitting from step 40: ")


def test_spike_is_unstable() -> None:
    falls = [10, 8, 6, 5, 4.5, 7.5, 5, 4, 3.5]
    verdict = curve_verdict(curve(falls, falls))
    assert verdict.kind == "unstable"
    assert "jumped from 4.50 (step 20) to 7.50 at step 25" in verdict.message


def test_slow_divergence_is_unstable() -> None:
    losses = [10, 8, 6, 6.3, 6.6, 6.9, 7.2, 7.5]
    assert curve_verdict(curve(losses, losses)).kind == "unstable"


def test_noise_of_few_batches_is_not_unstable() -> None:
    train = [10 * math.exp(-i / 20) + 0.2 * (-1) ** i for i in range(30)]
    assert curve_verdict(curve(train, [10 * math.exp(-i / 20) for i in range(30)])).kind == "learning"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["train", "val"])
@pytest.mark.parametrize("length", [1, 5])
def test_losses_that_are_not_finite_are_unstable(bad: float, which: str, length: int) -> None:
    good, broken = [5.0] * length, [5.0] * (length - 1) + [bad]
    verdict = curve_verdict(curve(broken, good) if which == "train" else curve(good, broken))
    assert verdict.kind == "unstable"
    assert f"is {bad} at step {5 * (length - 1)}" in verdict.message


@pytest.mark.parametrize("length", [0, 1, 2])
def test_one_or_two_points_are_too_short(length: int) -> None:
    verdict = curve_verdict(published()[:length])
    assert verdict.kind == "too short"
    assert f"{length} of at least 3" in verdict.message


losses = st.floats(allow_nan=True, allow_infinity=True)


@given(st.lists(st.tuples(st.integers(0, 10), losses, losses)), st.none() | st.floats(0.1, 20))
def test_every_input_has_a_verdict_of_one_line(
    rows: list[tuple[int, float, float]], uniform: float | None
) -> None:
    points = [LossPoint(step=s, epoch=s / 2, tokens_seen=s, train_loss=a, val_loss=b) for s, a, b in rows]
    verdict = curve_verdict(points, uniform_loss=uniform)
    assert verdict.kind in ("learning", "overfitting", "underfitting", "unchanged", "unstable", "too short")
    assert verdict.message
    assert "\n" not in verdict.message
    assert len(verdict.message) < 250


@given(st.lists(st.floats(0.01, 12), min_size=3, max_size=30))
def test_overfitting_always_names_a_step_at_or_before_the_lowest_validation_loss(val: list[float]) -> None:
    points = curve([10 * 0.8**i for i in range(len(val))], val)
    assert all(a.train_loss > b.train_loss for a, b in pairwise(points))
    verdict = curve_verdict(points)
    assert verdict.kind != "unstable"
    if verdict.kind == "overfitting":
        onset = int(verdict.message.split("from step ")[1].split(":")[0])
        assert onset <= min(points, key=lambda point: point.val_loss).step
