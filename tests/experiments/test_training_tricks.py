"""The study of four habits of training: every row is there, and what must hold at any size holds."""

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.studies


@pytest.fixture(scope="module")
def tricks(study: Callable[[str], Any]) -> Any:
    return study("training_tricks").result


def test_accumulated_micro_batches_train_as_one_batch(tricks: Any) -> None:
    rows = {row["micro-batches x sequences"]: row for row in tricks["accumulation"]}
    for name in ("4 x 4", "16 x 1"):
        assert float(rows[name]["largest difference of a step's loss"]) < 1e-5
        assert rows[name]["last validation loss"] == pytest.approx(
            rows["1 x 16"]["last validation loss"], abs=1e-5
        )
    # which is not so because the loss hardly depends on anything
    assert float(rows["1 x 16, another seed"]["its difference"]) > 1e-3


def test_early_stopping_ends_the_run_and_keeps_the_lowest_loss_so_far(tricks: Any) -> None:
    for row in tricks["early_stopping"]:
        assert row["at step"] < row["stops at step"] < row["of"]
        assert row["loss it keeps"] < row["loss at its end"]
        assert row["saves"] == f"{1 - row['stops at step'] / row['of']:.0%}"


def test_clipping_and_schedules_are_compared_for_every_seed(tricks: Any) -> None:
    assert [row["schedule"] for row in tricks["schedule"]] == [
        "constant",
        "constant, warm-up",
        "cosine, warm-up",
    ]
    for row in [*tricks["schedule"], *tricks["clipping"]]:
        seeds = row["of each seed"]
        assert len(seeds) == len(tricks["seeds"])
        assert row["last validation loss"] == pytest.approx(sum(seeds) / len(seeds), abs=1e-3)
    for row in tricks["clipping"]:
        assert row["largest gradient norm"] >= row["median gradient norm"] > 0


def test_the_record_says_what_it_was_measured_with(tricks: Any) -> None:
    assert {"torch", "lightning", "gptpl"} <= set(tricks["versions"])
    assert tricks["data"]["name"] == "tale"
