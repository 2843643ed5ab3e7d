"""The scaling study: the fit against laws that are known, and a record whose law is that of its rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

RECORDED = Path(__file__).parents[2] / "experiments/scaling/result.json"

pytestmark = pytest.mark.studies


@pytest.fixture(scope="module")
def scaling(study: Callable[[str], Any]) -> Any:
    return study("scaling")


@pytest.fixture(scope="module")
def grid() -> tuple[Any, Any]:
    """Sizes and counts of tokens, each with each, as in the study."""
    sizes, counts = np.meshgrid([25e3, 57e3, 150e3, 330e3, 790e3], [128e3, 256e3, 512e3, 1024e3])
    return sizes.ravel(), counts.ravel()


@pytest.mark.parametrize("law", [(0.9, 12.0, 0.30, 60.0, 0.35), (0.0, 6.0, 0.10, 900.0, 0.60)])
def test_the_law_of_synthetic_losses_is_found(scaling: Any, grid: Any, law: tuple[float, ...]) -> None:
    parameters, tokens = grid
    irreducible, size, a, data, b = law
    losses = irreducible + size / parameters**a + data / tokens**b
    found = scaling.module.fit(parameters, tokens, losses)
    assert (found.a, found.b) == pytest.approx((a, b), abs=2e-3)
    assert pytest.approx(irreducible, abs=0.02) == found.E


def test_the_interval_holds_the_true_exponents_of_noisy_losses(scaling: Any, grid: Any) -> None:
    parameters, tokens = grid
    losses = 0.9 + 12 / parameters**0.3 + 60 / tokens**0.35
    losses = losses + np.random.default_rng(0).normal(0, 0.005, len(losses))
    interval = scaling.module.bootstrap(parameters, tokens, losses, times=30)
    assert interval["a"][0] < 0.3 < interval["a"][1]
    assert interval["a"][1] - interval["a"][0] > 1e-3


def test_a_straight_line_in_logarithms(scaling: Any) -> None:
    x = np.array([1e3, 1e4, 1e5])
    assert scaling.module.straight_slope(x, 7 * x**-0.076) == pytest.approx(0.076)


def test_parameters_are_counted_without_embeddings(scaling: Any) -> None:
    for row in scaling.result["rows"]:
        width = row["width"]
        # 12 matrices of width x width a block, biases of all but query, key and value, and LayerNorms
        block = 12 * width**2 + 6 * width + 4 * width
        assert row["parameters"] == row["layers"] * block + 2 * width


def test_the_quick_study_is_complete(scaling: Any) -> None:
    assert len(scaling.result["rows"]) == 6
    assert {row["tokens"] for row in scaling.result["rows"]} == {8 * 1024, 16 * 1024}
    assert (scaling.folder / "scaling.png").stat().st_size > 10_000


def test_the_recorded_law_is_that_of_the_recorded_rows(scaling: Any) -> None:
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    parameters, tokens, losses = scaling.module.columns(recorded["rows"])
    law = scaling.module.Law(**recorded["law"])
    apart = losses - law.loss(parameters, tokens)
    assert np.sqrt((apart**2).mean()) == pytest.approx(recorded["root mean square residual"], abs=1e-4)
    for name in ("E", "a", "b"):
        low, high = recorded["90 % interval"][name]
        assert low <= recorded["law"][name] <= high
