"""The engine's thread by itself: what it measures before it begins."""

import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from gptpl.generation import SamplingRules
from gptpl.generation.continuous import ContinuousBatch
from gptpl.serving import engine as engine_module
from gptpl.serving.engine import Delta, Engine, Event, Generation
from tests.serving.conftest import PROMPT, until


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of threads that are set in turn; there are two at first."""
    found = [2]
    monkeypatch.setattr(torch, "get_num_threads", lambda: found[-1])
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    return found


@pytest.fixture
def steps_take(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], float]], None]:
    """Sets how long the engine finds that a step takes: its clock moves by that, and by nothing else."""
    passed = [0.0]
    original = ContinuousBatch.step

    def set_seconds(seconds: Callable[[], float]) -> None:
        def step(self: ContinuousBatch) -> None:
            original(self)
            passed[0] += seconds()

        monkeypatch.setattr(ContinuousBatch, "step", step)

    clock = SimpleNamespace(perf_counter=lambda: passed[0], monotonic=time.monotonic)
    monkeypatch.setattr(engine_module, "time", clock)
    return set_seconds


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
def test_the_faster_number_of_threads_is_chosen(base, steps_take, threads, slow, chosen):
    steps_take(lambda: 0.015 if threads[-1] == slow else 0.008)
    engine = Engine(base, max_rows=2, piece=8, kept_bytes=10**6, alone=True)
    engine.start()
    assert text(engine) == base.generate(PROMPT, max_new_tokens=8, temperature=0)
    assert threads[-1] == chosen
    assert set(threads) == {1, 2}
    engine.stop()
    assert threads[-1] == 2


@pytest.mark.parametrize("seconds, alone", [(0.03, True), (0.008, False)])
def test_long_steps_and_several_models_use_all_threads(base, steps_take, threads, seconds, alone):
    steps_take(lambda: seconds)
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
