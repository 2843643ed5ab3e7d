"""Tokens per second by a clock that the test moves."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from gptpl.callbacks import after_step, metrics
from gptpl.callbacks.after_step import AfterStep
from gptpl.callbacks.metrics import Throughput
from gptpl.errors import InputError
from gptpl.training import module as training_module
from gptpl.training.costs import training_flops_per_token


class Clock:
    """Stands still but for what a test adds."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    return clock


@pytest.fixture
def module():
    return SimpleNamespace(
        log=lambda name, value: None,
        step=0,
        tokens_seen=0,
        tokens_per_second=None,
        evaluation_seconds=0.0,
        device=torch.device("cpu"),
    )


def train_step(callback: Throughput, clock: Clock, module: Any, *, seconds: float, tokens: int = 100) -> None:
    clock.now += seconds
    module.tokens_seen += tokens
    module.step += 1
    trainer: Any = SimpleNamespace(global_step=module.step, callbacks=[callback])
    callback.on_train_batch_end(trainer, module, None, None, 0)
    callback.on_train_batch_end(trainer, module, None, None, 1)  # of the next step's first micro-batch


def test_tokens_over_the_time_of_their_steps(clock, module):
    """Waiting for data counts, evaluations do not."""
    callback = Throughput()
    train_step(callback, clock, module, seconds=60)
    for seconds, tokens in ((1.0, 100), (3.0, 200)):
        clock.now += 1000
        module.evaluation_seconds += 1000
        clock.now += 10  # for data
        train_step(callback, clock, module, seconds=seconds, tokens=tokens)
    assert module.tokens_per_second == pytest.approx(300 / 24)


def test_the_first_step_does_not_count(clock, module):
    """It compiles and fills caches."""
    callback = Throughput()
    train_step(callback, clock, module, seconds=60)
    assert module.tokens_per_second is None
    train_step(callback, clock, module, seconds=2)
    assert module.tokens_per_second == pytest.approx(50)


def test_only_the_last_steps_of_the_window_count(clock, module):
    callback = Throughput(window=2)
    for seconds in (60, 10, 1, 3):
        train_step(callback, clock, module, seconds=seconds)
    assert module.tokens_per_second == pytest.approx(200 / 4)


def test_a_real_run_counts_the_wait_for_data_but_not_samples_and_evaluations(pretraining, clock, monkeypatch):
    """A batch is waited for 0.1 s, samples take 0.2 s, evaluations 0.5 s a batch; the rest takes no time."""
    for part in (after_step, training_module):
        monkeypatch.setattr(part, "time", clock)

    class SlowData(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            for _ in range(9):
                clock.now += 0.1
                yield torch.zeros(4, 16, dtype=torch.int64), torch.zeros(4, 16, dtype=torch.int64)

    class SlowSamples(AfterStep):
        def after_step(self, trainer: Any, pl_module: Any) -> None:
            clock.now += 0.2

    module = pretraining.module(total_steps=5, eval_every_n_steps=2)
    evaluate = module.evaluation_sums

    def evaluate_slowly(batch: Any) -> Any:
        clock.now += 0.5
        return evaluate(batch)

    module.evaluation_sums = evaluate_slowly
    data = pretraining.data()
    data.train_dataloader = lambda: DataLoader(SlowData(), batch_size=None)
    pretraining.fit(Throughput(), SlowSamples(), module=module, data=data)
    speeds = list(pretraining.column("train/tokens_per_second").values())
    assert speeds == pytest.approx([64 / 0.1] * 4)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_an_accelerator_is_not_waited_for(clock, module, monkeypatch, device):
    """The check of the gradient's norm has waited already: once more would leave the device without work."""

    def synchronize() -> None:
        raise AssertionError("the host waits for the device")

    monkeypatch.setattr(torch.accelerator, "synchronize", synchronize)
    module.device = torch.device(device)
    callback = Throughput()
    train_step(callback, clock, module, seconds=1)
    train_step(callback, clock, module, seconds=2)
    assert module.tokens_per_second == pytest.approx(50)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_real_run_logs_its_speed(pretraining, accumulate):
    module = pretraining.module(total_steps=6)
    pretraining.fit(Throughput(), module=module, accumulate_grad_batches=accumulate)
    speeds = pretraining.column("train/tokens_per_second")
    assert list(speeds) == [2, 3, 4, 5, 6]
    assert all(speed > 0 for speed in speeds.values())
    assert speeds[6] == pytest.approx(module.tokens_per_second)


def test_a_real_run_logs_its_utilisation(pretraining, monkeypatch):
    """A device of a million FLOP/s: MFU times that is the arithmetic of the tokens of a second."""
    monkeypatch.setattr(metrics, "peak_flops", lambda device, dtype, config: 1e6)
    module = pretraining.module(total_steps=4)
    pretraining.fit(Throughput(), module=module)
    speeds, mfu = (pretraining.column(f"train/{name}") for name in ("tokens_per_second", "mfu"))
    assert list(mfu) == [2, 3, 4]
    a_token = training_flops_per_token(module.net.config, 16)
    for step, share in mfu.items():
        assert share * 1e6 == pytest.approx(speeds[step] * a_token, rel=1e-5)


def test_an_unknown_device_has_no_utilisation(pretraining, monkeypatch):
    monkeypatch.setattr(metrics, "peak_flops", lambda device, dtype, config: None)
    pretraining.fit(Throughput(), module=pretraining.module(total_steps=4))
    header = (pretraining.folder / "metrics.csv").read_text().splitlines()[0]
    assert "tokens_per_second" in header
    assert "mfu" not in header


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_of_nothing_is_refused(window):
    with pytest.raises(InputError, match=rf"^callbacks\.throughput\.window must be positive, got {window}$"):
        Throughput(window=window)
