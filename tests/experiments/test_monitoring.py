"""The study of drift: its fast form of the alarm is the server's, and its record holds what it concludes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.monitoring.drift import REFERENCE, THRESHOLD, WINDOW, deviations_of
from gptpl.serving.monitoring import Drift

RECORDED = Path(__file__).parents[2] / "experiments/monitoring/result.json"


def test_deviations_are_the_servers() -> None:
    outputs = np.random.default_rng(0).normal((-2.0, 0.1), (0.3, 0.05), (REFERENCE + WINDOW + 30, 2))
    drift = Drift(reference=REFERENCE, window=WINDOW, threshold=THRESHOLD)
    served: list[list[float]] = []
    for log_probability, repetition in outputs:
        drift.add(log_probability=log_probability, repetition=repetition)
        if measured := drift.measured:
            served.append([abs(measured[name].deviation) for name in Drift.MEASURES])
    found = deviations_of(outputs[:REFERENCE], outputs[REFERENCE:])
    assert found == pytest.approx(np.array(served), rel=1e-9)


def test_the_record_holds_what_the_readme_concludes() -> None:
    rows: dict[str, Any] = {row["change"]: row for row in json.loads(RECORDED.read_text("utf-8"))["rows"]}
    assert rows["20 % of the steps"]["found within 200"] == 1
    assert rows["temperature 1.2"]["found within 200"] == 1
    assert rows["int8"]["found within 200"] < 0.1
