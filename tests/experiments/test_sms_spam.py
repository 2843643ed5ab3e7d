"""The study of a spam classifier: its rows are what its runs say, and only the methods differ."""

import csv
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptpl.checkpoints.loading import load_classifier
from gptpl.evaluation.classifier import predictions

RECORDED = Path(__file__).parents[2] / "experiments/sms_spam/result.json"
BASELINE = "TF-IDF"

pytestmark = pytest.mark.studies


@pytest.fixture(scope="module")
def sms_spam(study: Callable[[str], Any]) -> Any:
    return study("sms_spam")


def test_the_rows_are_the_means_of_the_runs(sms_spam: Any) -> None:
    check_rows(sms_spam.result)


def test_the_recorded_rows_are_the_means_of_the_recorded_runs(sms_spam: Any) -> None:
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    check_rows(recorded)
    accuracy = {row["method"]: row["test/accuracy"] for row in recorded["rows"]}
    assert list(accuracy)[: len(sms_spam.module.METHODS)] == list(sms_spam.module.METHODS)
    assert accuracy["pretrained, all"] >= 0.95
    seconds = [run["seconds"] for run in recorded["each_run"].values()]
    assert max(seconds) < 15 * 60


def check_rows(result: Any) -> None:
    for row in result["rows"]:
        if row["method"].startswith(BASELINE):
            continue
        runs = [run for name, run in result["each_run"].items() if name.startswith(f"{row['method']}, seed")]
        assert len(runs) > 1
        for name in ("test/accuracy", "test/f1", "seconds"):
            assert row[name] == pytest.approx(statistics.mean(run[name] for run in runs), abs=1e-4)
        accuracies = [run["test/accuracy"] for run in runs]
        assert (row["lowest"], row["highest"]) == (min(accuracies), max(accuracies))


def test_the_accuracy_is_what_the_checkpoint_says_of_the_test_texts(sms_spam: Any) -> None:
    run = sms_spam.folder / "runs/random, all, seed 1"
    with (run / "data/test.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    loaded = load_classifier(run / "checkpoints/last.ckpt")
    found = predictions(loaded, [row["text"] for row in rows], batch_size=4)
    said = [loaded.labels[each.probabilities.index(max(each.probabilities))] for each in found]
    right = sum(label == row["label"] for label, row in zip(said, rows, strict=True))
    measured = sms_spam.result["each_run"]["random, all, seed 1"]["test/accuracy"]
    assert right / len(rows) == pytest.approx(measured, abs=1e-6)


def test_all_runs_have_the_same_test(sms_spam: Any) -> None:
    tests = {path.read_text(encoding="utf-8") for path in sms_spam.folder.glob("runs/*/data/test.csv")}
    assert len(tests) == 1
