"""The study of learning rates: what it says of its sweeps is what their files say."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.studies


@pytest.fixture(scope="module")
def rates(study: Callable[[str], Any]) -> Any:
    return study("learning_rate")


def trials(folder: Path, group: str, key: str) -> dict[float, float]:
    """Rate and last validation loss of each trial of a sweep, read by hand."""
    found = {}
    for config in folder.glob("*/config.yaml"):
        rate = yaml.safe_load(config.read_text(encoding="utf-8"))[group][key]
        with (config.parent / "metrics.csv").open(newline="", encoding="utf-8") as file:
            found[rate] = [float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]][-1]
    return found


def test_the_best_rate_is_that_of_the_lowest_loss_for_each_optimizer(rates: Any) -> None:
    rows = {row["optimizer"]: row for row in rates.result["rates"]}
    for name, key in (("AdamW", "lr"), ("Muon", "muon_lr")):
        found = trials(rates.folder / f"sweeps/{name.lower()}_0.12m", "optimizer", key)
        assert len(found) == 2
        best = min(found, key=lambda rate: found[rate])
        assert rows[name]["best learning rate"] == pytest.approx(best, rel=0.05)
        recorded = rates.result["trials"][f"{name}, 0.12M"]
        assert recorded == [[rate, pytest.approx(found[rate], abs=1e-4)] for rate in sorted(found)]


def test_muon_leaves_the_rest_of_the_model_to_adamw_at_its_best_rate(rates: Any) -> None:
    rows = {row["optimizer"]: row for row in rates.result["rates"]}
    config = yaml.safe_load((rates.folder / "sweeps/muon_0.12m/0/config.yaml").read_text(encoding="utf-8"))
    assert config["optimizer"]["_target_"].endswith(".muon")
    assert config["optimizer"]["lr"] == rows["AdamW"]["best learning rate"]


def test_both_optimizers_see_as_many_tokens_and_the_report_has_all_trials(rates: Any) -> None:
    assert len({row["tokens"] for row in rates.result["rates"]}) == 1
    report = (rates.folder / "report/report.md").read_text(encoding="utf-8").replace("\\_", "_")
    assert all(f"{name}_0.12m" in report for name in ("adamw", "muon"))
