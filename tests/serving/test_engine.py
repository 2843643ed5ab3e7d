"""The engine's thread by itself: what it measures before it begins."""

import time

import pytest
import torch

from gptpl.generation import SamplingRules
from gptpl.generation.continuous import ContinuousBatch
from gptpl.serving.engine import Delta, Engine, Event, Generation
from tests.serving.conftest import PROMPT, until


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of threads that are set in turn; there are two at first."""
    found = [2]
    monkeypatch.setattr(torch, "get_num_threads", lambda: found[-1])
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    return found


def text(engine: Engine) -> str:
    events: list[Event] = []
    engine.submit(
        Generation(
            engine.model,
            engine.model.tokenizer.encode(PROMPT).tolist(),
            deliver=events.append,
            rules=SamplingRules(),
            max_new_tokens=8,
        )
    )
    until(lambda: any(isinstance(each, Delta) and each.completion for each in events))
    return "".join(each.text for each in events if isinstance(each, Delta))


@pytest.mark.parametrize("slow, chosen", [(2, 1), (1, 2), (None, 2)])
def test_the_faster_number_of_threads_is_chosen(base, monkeypatch, threads, slow, chosen):
    original = ContinuousBatch.step

    def step(self: ContinuousBatch) -> None:
        original(self)
        time.sleep(0.015 if threads[-1] == slow else 0.008)

    monkeypatch.setattr(ContinuousBatch, "step", step)
    engine = Engine(base, max_rows=2, piece=8, kept_bytes=10**6, alone=True)
    engine.start()
    assert text(engine) == base.generate(PROMPT, max_new_tokens=8, temperature=0)
    assert threads[-1] == chosen
    assert set(threads) == {1, 2}
    engine.stop()
    assert threads[-1] == 2


def test_long_steps_and_several_models_use_all_threads(base, monkeypatch, threads):
    original = ContinuousBatch.step

    def step(self: ContinuousBatch) -> None:
        original(self)
        time.sleep(0.03)

    monkeypatch.setattr(ContinuousBatch, "step", step)
    for alone in (True, False):
        engine = Engine(base, max_rows=2, piece=8, kept_bytes=0, alone=alone)
        engine.start()
        text(engine)
        assert 1 not in threads
        engine.stop()


def test_an_engine_whose_trial_fails_serves_with_all_threads(base, monkeypatch, threads):
    original = ContinuousBatch.step
    failing = [True]

    def step(self: ContinuousBatch) -> None:
        if failing:
            failing.clear()
            raise RuntimeError("no memory")
        original(self)

    monkeypatch.setattr(ContinuousBatch, "step", step)
    engine = Engine(base, max_rows=2, piece=8, kept_bytes=0, alone=True)
    engine.start()
    assert text(engine) == base.generate(PROMPT, max_new_tokens=8, temperature=0)
    assert 1 not in threads
    engine.stop()
