"""Which settings matter: synthetic runs whose loss is known to depend on one of them."""

import math
import random
from typing import Any

import pytest

from gptpl.files.run_record import RunRecord
from gptpl.reports.pictures import axes, importance


@pytest.fixture
def memory_run(tmp_path):
    """A run with these settings that needs no files."""
    return lambda settings: RunRecord(path=tmp_path, config={"optimizer": settings}, record={}, rows=[])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_setting_that_decides_has_the_largest_share(memory_run, seed):
    rng = random.Random(seed)
    settings: list[dict[str, Any]] = [
        {"kind": rng.choice(["adamw", "muon"]), "lr": 10 ** rng.uniform(-4, -1), "decay": rng.random()}
        for _ in range(40)
    ]
    losses = [(math.log10(each["lr"]) + 2.5) ** 2 + rng.gauss(0, 0.02) for each in settings]
    found = axes(["optimizer.decay", "optimizer.kind", "optimizer.lr"], list(map(memory_run, settings)))
    result = importance(found, losses)
    assert result.shares[0][0].name == "optimizer.lr"
    assert result.shares[0][1] > 0.6
    assert sum(share for _, share in result.shares) == pytest.approx(1)
    assert "From 40 finished runs" in result.note
    assert result.note.endswith("losses): optimizer.lr.")


def test_a_choice_can_decide_too(memory_run):
    rng = random.Random(0)
    settings: list[dict[str, Any]] = [
        {"kind": rng.choice(["adamw", "muon", "sgd"]), "lr": rng.random()} for _ in range(24)
    ]
    losses = [{"muon": 1.0, "adamw": 2.0, "sgd": 3.0}[each["kind"]] + 0.1 * rng.random() for each in settings]
    result = importance(axes(["optimizer.lr", "optimizer.kind"], list(map(memory_run, settings))), losses)
    assert result.shares[0][0].name == "optimizer.kind"
    assert "optimizer.kind" in result.note
    assert result.shares[0][1] > 0.5


def test_chance_is_said_to_be_chance(memory_run):
    rng = random.Random(4)
    settings = [{"kind": rng.choice(["adamw", "muon"]), "lr": rng.random()} for _ in range(20)]
    found = axes(["optimizer.lr", "optimizer.kind"], list(map(memory_run, settings)))
    assert "none, so do not read anything" in importance(found, [rng.random() for _ in range(20)]).note


def test_too_few_runs_are_said_to_be(memory_run):
    runs = [memory_run({"lr": 0.1 * i}) for i in range(1, 10)]
    result = importance(axes(["optimizer.lr"], runs), [float(i) for i in range(9)])
    assert result.shares == []
    assert "9 finished runs of at least 10" in result.note


def test_no_difference_is_nothing_to_weigh(memory_run):
    assert "differ in no setting" in importance(axes([], []), []).note


def test_settings_that_change_together_are_one_axis(memory_run):
    runs = [
        memory_run({"width": width, "heads": width // 16, "lr": lr})
        for width in (32, 64)
        for lr in (0.1, 0.2)
    ]
    found = axes(["optimizer.width", "optimizer.heads", "optimizer.lr"], runs)
    assert [(axis.name, axis.together) for axis in found] == [
        ("optimizer.width", ["optimizer.heads"]),
        ("optimizer.lr", ()),
    ]
    assert found[0].title == "optimizer.width (+1)"


def test_values_drawn_anew_for_each_run_do_not_change_together(memory_run):
    runs = [memory_run({"lr": 0.1 * i, "decay": 0.3 / i}) for i in range(1, 5)]
    assert len(axes(["optimizer.lr", "optimizer.decay"], runs)) == 2


def test_places_on_an_axis(memory_run):
    runs = [
        memory_run({"lr": lr, "kind": kind, "width": width})
        for lr, kind, width in ((1e-3, "b", 10), (1e-2, "a", 20), (1e-1, "b", 50))
    ]
    lr, kind, width = axes(["optimizer.lr", "optimizer.kind", "optimizer.width"], runs)
    assert lr.places() == pytest.approx([0, 0.5, 1])  # logarithmic
    assert kind.places() == [0, 1, 0]
    assert width.places() == pytest.approx([0, 0.25, 1])
