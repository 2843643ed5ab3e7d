"""Schedules: their course for any run (property tests), torch's own cosine, and the settings they refuse."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from gptpl.errors import InputError
from gptpl.training.schedules import (
    ConstantSchedule,
    CosineSchedule,
    LinearSchedule,
    Schedule,
)

DECAYS = [CosineSchedule, LinearSchedule]
decays = pytest.mark.parametrize("kind", DECAYS)
totals = st.integers(1, 400)
lrs = st.floats(1e-6, 1.0)


def rates(schedule: Schedule, *, total_steps: int, peak_lr: float, beyond: int = 0) -> list[float]:
    steps = range(total_steps + beyond)
    return [peak_lr * schedule.factor(step, total_steps=total_steps, peak_lr=peak_lr) for step in steps]


# --- their course ---------------------------------------------------------------------------------------


@decays
@given(data=st.data(), total_steps=totals, peak_lr=lrs, floor=st.floats(0, 1))
def test_up_in_a_line_then_down_to_the_floor_and_never_below(kind, data, total_steps, peak_lr, floor):
    warmup = data.draw(st.integers(0, total_steps - 1))
    min_lr = floor * peak_lr
    schedule = kind(warmup_steps=warmup, min_lr=min_lr)
    course = rates(schedule, total_steps=total_steps, peak_lr=peak_lr, beyond=5)
    tolerance = 1e-9 * peak_lr
    for step in range(warmup):
        assert course[step] == pytest.approx(peak_lr * (step + 1) / warmup, rel=1e-9)
    assert all(later <= earlier + tolerance for earlier, later in pairwise(course[warmup:]))
    assert max(course) <= peak_lr + tolerance
    if warmup < total_steps - 1:
        assert course[warmup] == pytest.approx(peak_lr, rel=1e-9)
    assert course[total_steps - 1 :] == pytest.approx([min_lr] * 6, rel=1e-9, abs=tolerance)


@given(data=st.data(), total_steps=totals, peak_lr=lrs)
def test_constant_rises_to_the_peak_and_stays(data, total_steps, peak_lr):
    warmup = data.draw(st.integers(0, total_steps - 1))
    course = rates(ConstantSchedule(warmup_steps=warmup), total_steps=total_steps, peak_lr=peak_lr, beyond=5)
    rise = [peak_lr * (step + 1) / warmup for step in range(warmup)]
    assert course == pytest.approx(rise + [peak_lr] * (total_steps + 5 - warmup), rel=1e-9)


@given(total_steps=st.integers(2, 300), peak_lr=lrs, floor=st.floats(0, 1))
def test_the_cosine_is_torchs_own(total_steps, peak_lr, floor):
    """Without warm-up, for the steps that torch's recursive form is meant for."""
    min_lr = floor * peak_lr
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak_lr)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total_steps - 1, eta_min=min_lr)
    expected = []
    for _ in range(total_steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    ours = rates(CosineSchedule(warmup_steps=0, min_lr=min_lr), total_steps=total_steps, peak_lr=peak_lr)
    assert ours == pytest.approx(expected, rel=1e-6, abs=1e-9 * peak_lr)


def test_the_line_is_straight_and_the_cosine_is_half_way_in_the_middle():
    def at(kind, step, min_lr):
        return kind(warmup_steps=10, min_lr=min_lr).factor(step, total_steps=101, peak_lr=1.0)

    middle, third = 10 + 45, 10 + 30
    assert at(LinearSchedule, middle, 0.2) == at(CosineSchedule, middle, 0.2) == pytest.approx(0.6)
    assert at(CosineSchedule, third, 0.0) == pytest.approx(0.75)  # cos(60 degrees) = 1/2
    assert at(LinearSchedule, third, 0.0) == pytest.approx(2 / 3)


@decays
def test_a_run_of_one_step_is_made_at_the_floor(kind):
    assert rates(kind(warmup_steps=0, min_lr=0.1), total_steps=1, peak_lr=1.0) == pytest.approx([0.1])


@pytest.mark.parametrize("total_steps", [1, 2, 3, 4, 10, 39, 40, 90, 100_000])
@decays
def test_the_default_warm_up_fits_every_run_and_is_10_steps_from_40_on(kind, total_steps):
    course = rates(kind(), total_steps=total_steps, peak_lr=1e-3)
    wanted = {1: 0, 2: 0, 3: 0, 4: 1, 10: 2, 39: 9}.get(total_steps, 10)
    assert course == rates(kind(warmup_steps=wanted), total_steps=total_steps, peak_lr=1e-3)
    assert course.index(max(course)) == max(wanted - 1, 0)


# --- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*DECAYS, ConstantSchedule])
@given(warmup=st.integers(1, 50), data=st.data())
def test_a_warmup_that_fills_the_run_is_refused(kind, warmup, data):
    total_steps = data.draw(st.integers(1, warmup))
    schedule = kind(warmup_steps=warmup) if kind is ConstantSchedule else kind(warmup_steps=warmup, min_lr=0)
    with pytest.raises(InputError) as caught:
        schedule.factor(0, total_steps=total_steps, peak_lr=1.0)
    message = str(caught.value)
    assert f"scheduler.warmup_steps={warmup} " in message
    assert f"must be below the run's {total_steps} optimizer steps" in message
    assert "\n" not in message


@decays
def test_a_floor_above_the_peak_is_refused(kind):
    with pytest.raises(InputError, match=r"scheduler.min_lr=0.01 must not be above optimizer.lr=0.001"):
        kind(warmup_steps=5, min_lr=0.01).factor(0, total_steps=10, peak_lr=0.001)


@pytest.mark.parametrize("kind", [*DECAYS, ConstantSchedule])
def test_a_negative_warmup_is_refused(kind):
    settings = {} if kind is ConstantSchedule else {"min_lr": 0.0}
    with pytest.raises(InputError, match=r"scheduler.warmup_steps must be 0 or more, got -1"):
        kind(warmup_steps=-1, **settings)


@decays
@given(min_lr=st.floats(max_value=0, exclude_max=True, allow_nan=False))
def test_a_negative_floor_is_refused(kind, min_lr):
    assume(math.isfinite(min_lr))
    with pytest.raises(InputError, match=r"scheduler.min_lr must be 0 or more, got -"):
        kind(warmup_steps=0, min_lr=min_lr)
