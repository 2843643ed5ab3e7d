"""The study of content filters: its scores are those of the rules and probabilities that it names."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptpl.checkpoints.loading import load_classifier
from gptpl.evaluation.classifier import predictions

RECORDED = Path(__file__).parents[2] / "experiments/content_filter/result.json"


@pytest.fixture(scope="module")
def filters(study: Callable[[str], Any]) -> Any:
    return study("content_filter")


def check(row: Any, found: list[bool], wanted: list[bool]) -> None:
    hits = [one and other for one, other in zip(found, wanted, strict=True)].count(True)
    assert row["precision"] == pytest.approx(hits / max(1, found.count(True)), abs=1e-4)
    assert row["recall"] == pytest.approx(hits / wanted.count(True), abs=1e-4)


def test_scores_are_those_of_the_test_texts(filters: Any) -> None:
    run = filters.folder / "runs/seed 1"
    with (run / "data/test.csv").open(newline="", encoding="utf-8") as file:
        texts = [(row["text"], row["label"] == "code") for row in csv.DictReader(file)]
    rows = {row["filter"]: row for row in filters.result["rows"]}
    wanted = [each for _, each in texts]
    words = filters.result["words"]
    edge = r"[^\W_]"
    listed = [
        any(re.search(rf"(?<!{edge}){word}(?!{edge})", text.lower()) for word in words) for text, _ in texts
    ]
    check(rows["20 words"], listed, wanted)
    patterns = filters.result["patterns"].values()
    check(rows["patterns"], [any(re.search(each, text) for each in patterns) for text, _ in texts], wanted)
    loaded = load_classifier(run / "checkpoints/last.ckpt")
    code = loaded.labels.index("code")
    found = [each.probabilities[code] for each in predictions(loaded, [text for text, _ in texts])]
    for threshold in (0.3, 0.5, 0.7):
        check(rows[f"classifier, {threshold}"], [each >= threshold for each in found], wanted)


def test_words_and_patterns_come_from_training_texts_alone(filters: Any) -> None:
    with (filters.folder / "runs/seed 1/data/train.csv").open(newline="", encoding="utf-8") as file:
        texts = [(row["text"].lower(), row["label"] == "code") for row in csv.DictReader(file)]
    for word in filters.result["words"]:
        labels = [wanted for text, wanted in texts if re.search(rf"(?<![^\W\d_]){word}(?![^\W\d_])", text)]
        assert labels.count(True) >= 5
        assert labels.count(True) >= 0.95 * len(labels)


def test_the_record_holds_what_the_readme_concludes() -> None:
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    rows = {row["filter"]: row for row in recorded["rows"]}
    assert recorded["texts"]["test"]["texts"] > 1000
    assert recorded["verdicts_unlike_predictions"] == 0
    assert rows["classifier, 0.5"]["f1"] > rows["50 words and patterns"]["f1"] > rows["50 words"]["f1"]
    assert rows["classifier, 0.01"]["recall"] >= rows["classifier, 0.99"]["recall"]
