"""The study of instruction tuning: its rows are what runs and answers say."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RECORDED = Path(__file__).parents[2] / "experiments/instructions/result.json"

pytestmark = pytest.mark.studies


@pytest.fixture(scope="module")
def instructions(study: Callable[[str], Any]) -> Any:
    return study("instructions")


def test_the_losses_are_those_of_the_runs(instructions: Any) -> None:
    for row in instructions.result["rows"]:
        with (instructions.folder / "runs" / row["method"] / "metrics.csv").open(newline="") as file:
            losses = [float(line["val/loss"]) for line in csv.DictReader(file) if line["val/loss"]]
        assert row["validation loss before"] == pytest.approx(losses[0], abs=1e-3)
        assert row["lowest"] == pytest.approx(min(losses), abs=1e-3)
        assert row["lowest"] < row["validation loss before"]


def test_the_scores_are_those_of_the_answers(instructions: Any) -> None:
    for row in instructions.result["rows"]:
        path = instructions.folder / "runs" / row["method"] / "responses.json"
        answers = json.loads(path.read_text(encoding="utf-8"))
        test = json.loads((path.parent / "data/test.json").read_text(encoding="utf-8"))
        assert [each["instruction"] for each in answers] == [each["instruction"] for each in test]
        filled = [bool(each["model_response"].strip()) for each in answers]
        assert row["well-formed"] <= sum(filled) / len(filled) + 1e-3
        same = [each["model_response"].strip() == each["output"] for each in answers]
        assert row["exact match"] >= sum(same) / len(same) - 1e-3


def test_the_record_shows_what_it_says(instructions: Any) -> None:
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    assert [row["method"] for row in recorded["rows"]] == list(instructions.module.METHODS)
    for row in recorded["rows"]:
        losses = [loss for _, loss in recorded["losses"][row["method"]]]
        assert row["lowest"] == pytest.approx(min(losses), abs=1e-3)
        assert row["lowest"] < row["validation loss before"] - 1
        assert len(recorded["answers"][row["method"]]) == instructions.module.SHOWN
