"""Answers during the training: which, when, what is written, and that the training does not notice."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from gptpl.callbacks.samples import SampleResponses
from gptpl.data.instructions.datamodule import InstructionDataModule
from gptpl.data.sources import InstructionFile
from gptpl.errors import InputError
from gptpl.evaluation.answers import Answer, Answerer
from gptpl.tokenizers import BytesTokenizer
from gptpl.training.instruction_tuning import InstructionModule


def adamw(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=1e-3)


@pytest.fixture
def tune(pretraining, tmp_path: Path):
    """Tunes for 4 steps, 2 an epoch; gives the module."""
    entries = [{"instruction": f"ask {n}", "input": "it" * (n % 2), "output": f"say {n}"} for n in range(20)]
    (tmp_path / "entries.json").write_text(json.dumps(entries))

    def run(*callbacks: L.Callback, **options: Any) -> InstructionModule:
        data = InstructionDataModule(
            corpus=InstructionFile(tmp_path / "entries.json"),
            tokenizer=BytesTokenizer(),
            template="{{ instruction }}{{ input }}",
            response_marker="\n> ",
            max_length=32,
            batch_size=4,
            train_ratio=0.5,
        )
        module = InstructionModule(
            pretraining.net(context_length=32, drop_rate=0.1),
            tokenizer=BytesTokenizer(),
            make_optimizer=adamw,
            lr_factor=lambda step: 1.0,
            total_steps=4,
            run_config={},
            eval_every_n_steps=2,
            **data.module_settings(),
        )
        pretraining.fit(*callbacks, module=module, data=data, **options)
        return module

    return run


def records(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_answers_are_those_of_the_model_to_evenly_spaced_entries(tune, pretraining, tmp_path):
    path = tmp_path / "samples.jsonl"
    module = tune(SampleResponses(path=path, entries=3, max_new_tokens=5, every_n_epochs=None))
    made = records(path)
    # Of 20 entries the last 8 are for validation.
    assert [record["prompt"] for record in made] == ["ask 12", "ask 14", "ask 17\nit"]
    assert [record["reference"] for record in made] == ["say 12", "say 14", "say 17"]
    answerer = Answerer(
        net=module.net,
        tokenizer=BytesTokenizer(),
        template=module.template,
        rules=SampleResponses(path=path)._answerer(module).rules,
        max_new_tokens=5,
    )
    expected = answerer.answers([f"{prompt}\n> " for prompt in ("ask 12", "ask 14", "ask 17it")])
    assert [record["continuation"] for record in made] == [answer.text for answer in expected]
    assert {record["step"] for record in made} == {4}
    assert made[0]["strategy"] == {"temperature": 0.0}
    assert made[0]["tokens_seen"] > 0


def test_the_share_of_well_formed_answers_is_logged_when_due(tune, pretraining, tmp_path, monkeypatch):
    good = iter([True, False, True, True, False, False])

    def answers(self: Answerer, prompts: list[str]) -> list[Answer]:
        return [Answer(text="x", well_formed=next(good), finish="length") for _ in prompts]

    monkeypatch.setattr(Answerer, "answers", answers)
    path = tmp_path / "samples.jsonl"
    tune(SampleResponses(path=path, entries=2, every_n_epochs=1, every_n_steps=3))
    # After the epochs, of 2 steps each, and after step 3.
    assert pretraining.column("val/well_formed") == {2: 0.5, 3: 1.0, 4: 0.0}
    assert [record["well_formed"] for record in records(path)] == [True, False, True, True, False, False]


def test_the_training_does_not_notice(tune, tmp_path):
    sampled = tune(SampleResponses(path=tmp_path / "s.jsonl", entries=2, max_new_tokens=3, every_n_steps=1))
    after = torch.random.get_rng_state()
    plain = tune()
    assert torch.random.get_rng_state().equal(after)
    for ours, theirs in zip(sampled.net.parameters(), plain.net.parameters(), strict=True):
        assert ours.equal(theirs)


@pytest.mark.parametrize(
    "settings", [{"entries": 0}, {"max_new_tokens": 0}, {"every_n_steps": 0}, {"every_n_epochs": -2}]
)
def test_bad_numbers(settings):
    [(name, value)] = settings.items()
    with pytest.raises(
        InputError, match=rf"^{name} of the sampled responses must be 1 or more, got {value}$"
    ):
        SampleResponses(path="x", **settings)


def test_a_training_of_another_task_is_refused(pretraining, tmp_path):
    with pytest.raises(InputError, match=r"^callbacks.sample_responses needs instruction [^\n]*=default$"):
        pretraining.fit(SampleResponses(path=tmp_path / "x"))
