"""Signals, time limits and a chosen step end a training after a whole step, with that step saved."""

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest

from gptpl.callbacks.checkpoints import LastCheckpoint
from gptpl.callbacks.stopping import SIGNALS, RunStopped, StopAtBoundary, duration, interrupts
from gptpl.errors import InputError


class InStep(L.Callback):
    """Does something within an optimizer step: before its backward pass."""

    def __init__(self, step: int, act: Any) -> None:
        self.step = step
        self.act = act

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Any) -> None:
        if trainer.global_step + 1 == self.step:
            self.act()


def killing(number: int, step: int = 5) -> InStep:
    return InStep(step, lambda: os.kill(os.getpid(), number))


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "checkpoints"


@pytest.fixture(autouse=True)
def _handlers():
    """Those of a terminal's process, also where the tests run under `nohup`; given back by every run."""
    usual = dict.fromkeys(SIGNALS, signal.SIG_DFL) | {signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    after = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert after == usual


STATUS = {"SIGINT": 130, "SIGTERM": 143, "SIGUSR1": 138, "SIGHUP": 129}
"""What a shell gives for each, on Linux."""


@pytest.mark.parametrize("name", STATUS)
def test_a_signal_ends_the_run_after_the_step_it_came_in(pretraining, folder, name):
    last = LastCheckpoint(dirpath=str(folder))
    with pytest.raises(RunStopped) as stopped:
        pretraining.fit(last, StopAtBoundary(), killing(getattr(signal, name)))
    assert (stopped.value.step, stopped.value.status) == (5, STATUS[name])
    assert (folder / "last.ckpt").resolve() == folder / "step-00000005.ckpt"
    assert list(pretraining.column("train/loss")) == [1, 2, 3, 4, 5]


def test_a_second_ctrl_c_interrupts_at_once(pretraining, folder):
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the step went on")

    last = LastCheckpoint(dirpath=str(folder))
    with pytest.raises(SystemExit):  # by which Lightning answers a KeyboardInterrupt
        pretraining.fit(last, StopAtBoundary(), InStep(5, twice))
    assert (folder / "last.ckpt").resolve() == folder / "step-00000004.ckpt"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning leaves it ignored


def test_an_interrupt_is_a_keyboard_interrupt_and_leaves_ctrl_c_working(pretraining, folder):
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), interrupts():
        pretraining.fit(LastCheckpoint(dirpath=str(folder)), StopAtBoundary(), InStep(5, twice))
    assert (folder / "last.ckpt").resolve() == folder / "step-00000004.ckpt"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_of_the_preparations_leaves_ctrl_c_working(pretraining):
    class Setup(L.Callback):
        def setup(self, *args: Any, **settings: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), interrupts():
        pretraining.fit(StopAtBoundary(), Setup())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    "error", [SystemExit(3), ValueError("another"), RunStopped("Ctrl-C", step=1, status=130)]
)
def test_other_ends_are_not_taken_for_an_interrupt(error):
    with pytest.raises(type(error)) as raised, interrupts():
        raise error
    assert raised.value is error


def in_thread(act: Any) -> BaseException | None:
    """What it raised in a thread that is not the main one, where no handler of signals can be set."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(act).exception()


def test_a_fit_in_another_thread_is_stopped_by_asking(pretraining, folder):
    stopping = StopAtBoundary()

    def fit() -> None:
        with interrupts():
            pretraining.fit(LastCheckpoint(dirpath=str(folder)), stopping, InStep(5, stopping.stop))

    error = in_thread(fit)
    assert str(error) == "stopped by stop() after step 5"
    assert (folder / "last.ckpt").resolve() == folder / "step-00000005.ckpt"


def test_an_interrupt_in_another_thread_is_a_keyboard_interrupt(pretraining):
    def interrupt() -> None:
        raise KeyboardInterrupt

    def fit() -> None:
        with interrupts():
            pretraining.fit(StopAtBoundary(), InStep(5, interrupt))

    assert isinstance(in_thread(fit), KeyboardInterrupt)


@pytest.mark.parametrize("ask", ["signal", "stop"])
def test_a_stop_ends_one_fit_and_not_the_next(pretraining, ask):
    stopping = StopAtBoundary()
    act = stopping.stop if ask == "stop" else lambda: os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(RunStopped, match="after step 5"):
        pretraining.fit(stopping, InStep(5, act))
    assert pretraining.fit(stopping).global_step == 20


def test_a_signal_of_another_kind_after_ctrl_c_still_waits_for_the_step(pretraining, folder):
    def both() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(RunStopped, match="SIGTERM after step 5"):
        pretraining.fit(LastCheckpoint(dirpath=str(folder)), StopAtBoundary(), InStep(5, both))


def test_a_hangup_that_is_ignored_stays_ignored(pretraining):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        trainer = pretraining.fit(StopAtBoundary(), killing(signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert trainer.global_step == 20


def test_a_process_that_loads_data_does_not_take_part(pretraining):
    """A worker inherits the handler: what reaches all processes must not break it off."""
    stop = StopAtBoundary()
    stop._take_signals()
    end, reached = os.pipe()
    try:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGTERM)  # to all, as by torchrun
            time.sleep(0.05)
            os.write(reached, b"still there")
            os.kill(os.getpid(), signal.SIGTERM)  # by this the loader ends its workers
            time.sleep(10)
            os._exit(0)
        _, status = os.waitpid(child, 0)
    finally:
        stop._give_signals_back()
    assert os.WTERMSIG(status) == signal.SIGTERM
    assert os.read(end, 20) == b"still there"


@pytest.mark.slow
def test_a_signal_to_all_processes_saves_the_step(tmp_path, copies):
    """As torchrun sends it, with workers that load the data."""
    run = copies(
        *("train", "experiment=quick", "trainer=cpu", "run_dir=run", "trainer.max_epochs=1000"),
        *("data.num_workers=2", "callbacks.checkpoint_last.every_n_steps=5"),
        cwd=tmp_path, output=tmp_path / "said", GPTPL_CACHE=tmp_path / "cache", before=os.setsid,
    )  # fmt: skip
    deadline = time.monotonic() + 100
    while not list(tmp_path.glob("run/checkpoints/step-*.ckpt")):
        assert run.status is None, run.said
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGTERM)
    assert run.wait(60) == 128 + signal.SIGTERM, run.said
    stopped = json.loads((tmp_path / "run/run.json").read_text())["stopped"]
    assert stopped["reason"] == "SIGTERM"
    assert (tmp_path / "run/checkpoints" / f"step-{stopped['step']:08d}.ckpt").exists()


def test_a_run_stops_when_its_time_is_over(pretraining, folder, monkeypatch):
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + 3600)
    waiting = InStep(3, lambda: monkeypatch.setattr("gptpl.callbacks.stopping.time", clock))
    with pytest.raises(RunStopped) as stopped:
        pretraining.fit(LastCheckpoint(dirpath=str(folder)), StopAtBoundary(max_time="00:01:00:00"), waiting)
    assert (stopped.value.step, stopped.value.status) == (3, 0)
    assert (folder / "last.ckpt").resolve() == folder / "step-00000003.ckpt"


def test_a_run_stops_at_the_step_that_was_given(pretraining, folder):
    with pytest.raises(RunStopped, match=r"^stopped by trainer\.stop_at_step=6 after step 6$"):
        pretraining.fit(LastCheckpoint(dirpath=str(folder)), StopAtBoundary(stop_at_step=6))
    assert (folder / "last.ckpt").resolve() == folder / "step-00000006.ckpt"
    assert 6 not in pretraining.column("val/loss")  # that evaluation is the resumed run's


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("00:00:10:00", timedelta(minutes=10)),
        ("1:02:03:04", timedelta(days=1, hours=2, minutes=3, seconds=4)),
    ],
)
def test_durations(text, expected):
    assert duration(text) == expected


@pytest.mark.parametrize("text", ["soon", "10:00", "00:00:00:00", "-1:00:00:00", "00:00:00:1.5", ""])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(InputError, match=r"^trainer\.max_time must be DD:HH:MM:SS"):
        StopAtBoundary(max_time=text)


def test_a_step_before_the_first_is_refused():
    with pytest.raises(InputError, match=r"^trainer\.stop_at_step must be 1 or more, or null, got 0"):
        StopAtBoundary(stop_at_step=0)
