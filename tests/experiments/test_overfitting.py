"""The study of overfitting: its rows are what its curves say, and the plan changes one thing at a time."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RECORDED = Path(__file__).parents[2] / "experiments/overfitting/result.json"

pytestmark = pytest.mark.studies


@pytest.fixture(scope="module")
def overfitting(study: Callable[[str], Any]) -> Any:
    return study("overfitting")


def test_the_rows_are_what_the_curves_say(overfitting: Any) -> None:
    check_rows(overfitting.result)
    changes = [row["change"] for row in overfitting.result["rows"]]
    assert changes == ["baseline", "dropout 0", "baseline, seed 1"]


def test_the_recorded_rows_are_what_the_recorded_curves_say(overfitting: Any) -> None:
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    check_rows(recorded)
    assert list(recorded["curves"]) == list(overfitting.module.CHANGES)
    baseline = recorded["rows"][0]
    assert baseline["last validation loss"] > baseline["lowest validation loss"] + 0.1  # it overfits


def check_rows(result: Any) -> None:
    for row in result["rows"][: len(result["curves"])]:
        curve = result["curves"][row["change"]]
        step, train, val = min(curve, key=lambda point: point[2])
        assert row["at step"] == step
        assert row["lowest validation loss"] == pytest.approx(val, abs=1e-3)
        assert row["training loss there"] == pytest.approx(train, abs=1e-3)
        assert row["last gap"] == pytest.approx(curve[-1][2] - curve[-1][1], abs=2e-3)


def test_one_thing_is_changed_at_a_time(overfitting: Any) -> None:
    changes = dict(overfitting.module.CHANGES)
    assert changes.pop("baseline") == ()
    # a tied head begins far off under the book's initialisation, so it is shown under both
    *initialised, tied = changes.pop("tied head, GPT-2's init")
    assert (tuple(initialised), (tied,)) == (changes["GPT-2's initialisation"], changes["tied head"])
    assert {len(overrides) for overrides in changes.values()} == {1}


def test_the_change_reaches_the_run(overfitting: Any) -> None:
    config = (overfitting.folder / "runs/dropout 0, seed 123/config.yaml").read_text(encoding="utf-8")
    assert "drop_rate: 0.0\n" in config
