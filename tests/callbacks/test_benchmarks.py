"""Benchmarks during training: when, what, where to, and that training does not notice."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gptpl.callbacks.benchmarks import Benchmarks
from gptpl.errors import InputError
from gptpl.evaluation.benchmarks import MultipleChoice
from gptpl.evaluation.harness import Harness
from gptpl.evaluation.questions import QuestionFile
from gptpl.evaluation.suite import Suite


def suite_in(folder: Path) -> Suite:
    rows = [{"context": f"{n} is", "choices": ["a", "the b", "c d e"], "gold": n % 3} for n in range(9)]
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return Suite(tasks={"mine": MultipleChoice(data=QuestionFile(path=str(path)))})


def test_they_are_asked_at_due_steps_and_at_the_end(training: Any, tmp_path: Path) -> None:
    path, suite = tmp_path / "run" / "benchmarks.jsonl", suite_in(tmp_path)
    trainer = training.fit(Benchmarks(suite=suite, path=path, every_n_steps=3))
    found = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert [record["step"] for record in found] == [3, 6, 8]
    module = trainer.lightning_module
    last = suite.run(module.net, module.tokenizer).tasks["mine"].metrics
    assert found[-1]["metrics"] == {f"mine/{name}": metric.value for name, metric in last.items()}
    assert found[-1]["tokens_seen"] == module.tokens_seen


def test_training_does_not_notice(training: Any, tmp_path: Path) -> None:
    path, suite = tmp_path / "run" / "benchmarks.jsonl", suite_in(tmp_path)
    alone = training.fit().lightning_module.state_dict()
    asked = training.fit(Benchmarks(suite=suite, path=path, every_n_steps=1)).lightning_module.state_dict()
    assert all(torch.equal(value, asked[name]) for name, value in alone.items())


def test_what_would_fail_later_fails_before_training(training: Any, tmp_path: Path) -> None:
    data = QuestionFile(path=str(tmp_path / "none.jsonl"))
    suite = Suite(tasks={"mine": MultipleChoice(data=data)})
    with pytest.raises(InputError, match=r"cannot read .*none\.jsonl"):
        training.fit(Benchmarks(suite=suite, path=tmp_path / "benchmarks.jsonl"))
    with pytest.raises(InputError, match="must be 1 or more, got 0"):
        Benchmarks(suite=suite, path=tmp_path / "benchmarks.jsonl", every_n_steps=0)
    rows = [{"context": "a", "choices": ["b" * 99], "gold": 0}]
    (tmp_path / "long.jsonl").write_text(json.dumps(rows[0]))
    suite = Suite(tasks={"mine": MultipleChoice(data=QuestionFile(path=str(tmp_path / "long.jsonl")))})
    with pytest.raises(InputError, match="every question has an answer longer than the model's context"):
        training.fit(Benchmarks(suite=suite, path=tmp_path / "benchmarks.jsonl"))


def test_a_model_that_has_diverged_goes_on_training(
    training: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    suite = suite_in(tmp_path)

    def diverged(*_: Any, **__: Any) -> None:
        raise InputError("the model's logits are nan")

    monkeypatch.setattr(suite, "run", diverged)
    trainer = training.fit(Benchmarks(suite=suite, path=tmp_path / "benchmarks.jsonl", every_n_steps=4))
    assert trainer.global_step == 8
    assert "no benchmarks at step 4: the model's logits are nan" in caplog.text


def test_suites_that_run_other_programs_are_not_for_training(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="takes suites whose tasks gptpl reads itself"):
        Benchmarks(suite=Harness(tasks=["hellaswag"]), path=tmp_path / "benchmarks.jsonl")
