"""Which trials a sweep has, told without running any: the loss of a trial is its `lr`."""

import statistics
from dataclasses import replace

import pytest

from gptpl.sweeps.study import Search, interval


def tried(sweep, count=None):
    """The overrides of the trials that are left, each finished at once with its `lr` as loss."""
    found: list[dict[str, str]] = []
    with sweep.study() as study:
        while count is None or len(found) < count:
            claim = study.next()
            if claim is None:
                break
            found.append(dict(each.split("=") for each in claim.overrides))
            study.end(claim, "finished", value=float(found[-1]["lr"]))
    return found


def search(sampler, n_trials=None):
    return Search(sampler=sampler, n_trials=n_trials, pruner="none", seed=0)


def test_a_grid_has_every_combination_once_the_last_setting_changing_fastest(sweep):
    grid = sweep(lr=("1", "2"), b=("x", "y", "'z z'"))
    assert [tuple(each.values()) for each in tried(grid)] == [
        ("1", "x"), ("1", "y"), ("1", "'z z'"), ("2", "x"), ("2", "y"), ("2", "'z z'"),
    ]  # fmt: skip
    assert tried(grid) == []


def test_drawn_values_lie_in_their_intervals_and_no_trial_repeats_another(sweep):
    space = {
        "lr": interval("lr", 1e-5, 1e-1, log=True),
        "layers": interval("layers", 1, 4),
        "b": ("x", "y"),
    }
    drawn = tried(sweep(search("random", 16), **space))
    assert len({each["lr"] for each in drawn}) == 16
    assert all(1e-5 <= float(each["lr"]) <= 1e-1 for each in drawn)
    # Of a logarithmic interval the half below 1e-3 is drawn as often as the half above.
    assert 4 <= sum(float(each["lr"]) < 1e-3 for each in drawn) <= 12
    assert {each["layers"] for each in drawn} == {"1", "2", "3", "4"}
    assert {each["b"] for each in drawn} == {"x", "y"}


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_search_that_was_stopped_draws_what_it_would_have_drawn(sweep, sampler):
    at_once = sweep(search(sampler, 12), folder="at_once", lr=interval("lr", 1.0, 8.0))
    parts = sweep(search(sampler, 12), folder="parts", lr=interval("lr", 1.0, 8.0))
    assert tried(parts, 5) + tried(parts) == tried(at_once)


def test_a_search_can_be_made_longer(sweep):
    short = sweep(search("random", 3), lr=interval("lr", 1.0, 8.0))
    assert len(tried(short)) == 3
    assert len(tried(replace(short, search=search("random", 5)))) == 2
    assert tried(short) == []


def test_tpe_draws_where_trials_did_well(sweep):
    drawn = [float(each["lr"]) for each in tried(sweep(search("tpe", 18), lr=interval("lr", 1.0, 8.0)))]
    assert statistics.mean(drawn[10:]) < statistics.mean(drawn[:10]) - 1
