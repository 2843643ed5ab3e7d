"""The study of the server under load: its ratios are those of its turns, and nothing was left by the soak."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "experiments/serving"


@pytest.fixture(scope="module")
def recorded() -> Any:
    return json.loads((FOLDER / "result.json").read_text(encoding="utf-8"))


def test_ratios_are_those_of_the_turns(recorded: Any) -> None:
    for measured in recorded["shapes"].values():
        ours = [turn["8 clients"]["tokens_per_second"] for turn in measured["turns"]["gptpl"]]
        for name, turns in measured["turns"].items():
            if not name.startswith("gptpl"):
                theirs = [turn["8 clients"]["tokens_per_second"] for turn in turns]
                middle = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
                assert measured["ratios"][f"gptpl / {name}, 8 clients"][0] == pytest.approx(middle, abs=0.01)


def test_the_readme_says_what_was_recorded(recorded: Any) -> None:
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for measured in recorded["shapes"].values():
        for name, (middle, least, most) in measured["ratios"].items():
            assert f"| {name} | {middle:.2f} ({least:.2f} - {most:.2f}) |" in readme


def test_the_soak_left_nothing() -> None:
    soak = json.loads((FOLDER / "soak.json").read_text(encoding="utf-8"))
    assert soak["seconds"] >= 600
    assert any(name.startswith("leaves") for name in soak["counts"])
    after, first = soak["after_all_have_ended"], soak["samples"][0]
    for gauge in ("running_rows", "queued_requests", "cache_use_ratio", "running_in_monitor", "errors"):
        assert after[gauge] == 0
    assert after["files"] <= first["files"] + 2
