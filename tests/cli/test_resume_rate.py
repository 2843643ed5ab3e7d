"""The ceiling over a resumed run's learning rate, against every step of both schedules one by one."""

from functools import partial

from hypothesis import given
from hypothesis import strategies as st

from gptpl.runs.resume_rules import held_text, lr_ceiling
from gptpl.training.schedules import CosineSchedule, LinearSchedule

PEAK_LR = 1e-2
COSINE = CosineSchedule(warmup_steps=3, min_lr=1e-4)
LINEAR = LinearSchedule(warmup_steps=0, min_lr=1e-6)

plans = st.tuples(
    st.sampled_from([COSINE, LINEAR]), st.integers(4, 40), st.integers(4, 80), st.integers(0, 40)
)


@given(plans, st.none() | st.floats(0, 1))
def test_the_rate_never_goes_above_what_was_still_to_come(plan, before):
    schedule, old_total, new_total, step = plan
    step = min(step, old_total)
    old, new = (
        [schedule.factor(s, total_steps=total, peak_lr=PEAK_LR) for s in range(total)]
        for total in (old_total, new_total)
    )
    held = 1.0 if before is None else before
    planned = [min(factor, held) for factor in old[step:] or old[-1:]]
    ceiling = lr_ceiling(
        partial(schedule.factor, total_steps=old_total, peak_lr=PEAK_LR),
        step=step, old_total_steps=old_total, total_steps=new_total, ceiling=before,
    )  # fmt: skip
    if new_total == old_total:
        assert ceiling == before
    else:
        assert ceiling == max(planned)  # not less either: a longer warm-up is not cut short
        assert all(min(factor, ceiling) <= max(planned) for factor in new[step:])


def ceiling_at(step: int, *, before: float | None = None) -> float | None:
    """Of a run of 40 steps that is to have 80."""
    factor = partial(COSINE.factor, total_steps=40, peak_lr=PEAK_LR)
    return lr_ceiling(factor, step=step, old_total_steps=40, total_steps=80, ceiling=before)


def test_a_finished_run_stays_at_its_last_rate():
    assert ceiling_at(40) == PEAK_LR**-1 * 1e-4


def test_a_run_in_its_warm_up_may_still_reach_the_peak():
    assert ceiling_at(1) == 1.0


def test_a_ceiling_is_never_raised():
    assert ceiling_at(1, before=0.25) == 0.25


def held(ceiling: float | None) -> str | None:
    factor = partial(COSINE.factor, total_steps=80, peak_lr=PEAK_LR)
    return held_text(factor, ceiling, step=40, total_steps=80, peak_lr=PEAK_LR)


def test_it_is_said_only_where_the_ceiling_cuts_something_off():
    assert held(None) is None
    assert held(0.9) is None
    text = held(0.01)
    assert text is not None
    assert "held at or below 0.0001 (" in text
    assert "optimizer.lr=" in text
    highest = COSINE.factor(40, total_steps=80, peak_lr=PEAK_LR) * PEAK_LR
    assert f"raise it to {highest:.2g};" in text


def test_a_run_without_a_step_left_is_not_held():
    factor = partial(COSINE.factor, total_steps=40, peak_lr=PEAK_LR)
    assert held_text(factor, 0.01, step=40, total_steps=40, peak_lr=PEAK_LR) is None
