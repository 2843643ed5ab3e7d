"""Stops a training: between two steps with everything saved, or where it no longer improves."""

import logging
import math
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping as LightningEarlyStopping

from gptpl.callbacks.after_step import AfterStep, of_every_rank
from gptpl.callbacks.checkpoints import LastCheckpoint, declared_mode
from gptpl.errors import SIGNAL_STATUS, InputError
from gptpl.settings import COUNT_OR_NULL
from gptpl.training.task import Better

log = logging.getLogger(__name__)

SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")  # SIGUSR1: SLURM, before the time is over
    if hasattr(signal, name)
]
CTRL_C = "Ctrl-C"


class RunStopped(Exception):  # noqa: N818 (nothing is wrong)
    """A training that was stopped after an optimizer step, of which it has a checkpoint if it keeps any.

    `reason` is "Ctrl-C", "SIGTERM", "stop()", "trainer.max_time=00:08:00:00", ...; `status` the exit status:
    128 + the signal's number, or 0 if the settings asked for it.
    """

    def __init__(self, reason: str, *, step: int, status: int) -> None:
        super().__init__(f"stopped by {reason} after step {step}")
        self.reason = reason
        self.step = step
        self.status = status


class StopAtBoundary(AfterStep):
    """Stops after the step in which a signal came, the time ran out, or a given step was reached.

    Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP let the step end, save, and raise RunStopped out of `Trainer.fit`; a
    second Ctrl-C interrupts at once. A signal to one of several processes is enough. Afterwards signals have
    their former handlers. Only the main thread can set handlers: a fit in another thread is stopped by
    `stop`. `max_time` is DD:HH:MM:SS of training in this session, apart from earlier ones of a resumed run.
    """

    def __init__(self, *, max_time: str | None = None, stop_at_step: int | None = None) -> None:
        super().__init__()
        self.max_time = max_time
        self._seconds = None if max_time is None else duration(max_time).total_seconds()
        if stop_at_step is not None:
            COUNT_OR_NULL.check("trainer.stop_at_step", stop_at_step)
        self.stop_at_step = stop_at_step
        self._signal: int | None = None
        self._asked = False
        self._found: tuple[str, int] | None = None
        self._started_seconds = time.monotonic()
        self._before: dict[int, Any] = {}
        self._process = os.getpid()

    def stop(self) -> None:
        """Ask for a stop after the current step, from any thread or callback."""
        self._asked = True

    # --- signals --------------------------------------------------------------------------------------

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set the signals' handlers, before the first evaluation."""
        self._take_signals()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set the signals' handlers and start the clock."""
        super().on_train_start(trainer, pl_module)
        self._take_signals()
        self._started_seconds = time.monotonic()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore the signals' handlers."""
        self._give_signals_back()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Restore the signals' handlers."""
        self._give_signals_back()

    def _take_signals(self) -> None:
        if not self._before:  # not yet set by the sanity check of this fit
            self._signal = None  # which may have stopped an earlier fit
        self._process = os.getpid()
        for number in SIGNALS:
            current = signal.getsignal(number)
            if current == self._note or (number != signal.SIGINT and current == signal.SIG_IGN):
                continue  # `nohup` ignores SIGHUP; a shell's `&` ignores SIGINT, but it can be sent
            try:
                signal.signal(number, self._note)
            except ValueError:  # not in the main thread
                return
            # Lightning's own handler of SIGTERM would end the run with exit status 0.
            self._before.setdefault(number, current)

    def _give_signals_back(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            if signal.getsignal(number) == self._note:  # else Lightning has restored it already
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        """The handler: note the signal, for the end of the step."""
        if os.getpid() != self._process:  # a data loader's worker, which inherited the handler
            # Ctrl-C, torchrun and SLURM signal all processes, and the main one still needs its workers. At
            # its end it signals those again that are left.
            if number != signal.SIGINT:
                signal.signal(number, signal.SIG_DFL)
            return
        if self._signal is not None and number == signal.SIGINT:
            self._give_signals_back()
            raise KeyboardInterrupt
        self._signal = number
        again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
        with suppress(RuntimeError):  # the signal interrupted a write to the same stream
            log.warning("%s: stopping after this step%s", _name(number), again)

    # --- at the boundary ------------------------------------------------------------------------------

    def due(self, trainer: L.Trainer, pl_module: L.LightningModule) -> bool:
        """Whether this rank has a reason to stop."""
        self._found = self._reason(trainer.global_step)
        return self._found is not None

    def after_step(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save, and stop on all ranks for the first one's reason."""
        reason, status = next(filter(None, of_every_rank(trainer, self._found)))
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, LastCheckpoint):
                callback.save(trainer, pl_module)
        raise RunStopped(reason, step=trainer.global_step, status=status)

    def _reason(self, step: int) -> tuple[str, int] | None:
        """Why to stop now, and the exit status; None: do not stop."""
        if self._asked:
            self._asked = False
            return "stop()", 0
        if self._signal is not None:
            return _name(self._signal), SIGNAL_STATUS + self._signal
        if self._seconds is not None and time.monotonic() - self._started_seconds >= self._seconds:
            return f"trainer.max_time={self.max_time}", 0
        if step == self.stop_at_step:
            return f"trainer.stop_at_step={self.stop_at_step}", 0
        return None


@contextmanager
def interrupts() -> Iterator[None]:
    """Let KeyboardInterrupt out of `Trainer.fit`, and restore SIGINT's handler.

    Lightning 2.6 turns it into SystemExit (outside the main thread into ValueError), and ignores SIGINT from
    then on if training had not begun.
    """
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except (SystemExit, ValueError) as error:
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


def duration(text: str, key: str = "trainer.max_time") -> timedelta:
    """The time that a setting gives; raises InputError unless it is DD:HH:MM:SS."""
    match = re.fullmatch(r"(\d+):(\d+):(\d+):(\d+)", text)
    names = ("days", "hours", "minutes", "seconds")
    time_limit = timedelta(**dict(zip(names, map(int, match.groups()), strict=True))) if match else None
    if not time_limit:
        raise InputError(f"{key} must be DD:HH:MM:SS, such as 00:08:00:00, got {text}")
    return time_limit


def _name(number: int) -> str:
    return CTRL_C if number == signal.SIGINT else signal.Signals(number).name


class EarlyStopping(LightningEarlyStopping):
    """Lightning's, but for `mode` None: see `gptpl.callbacks.checkpoints.declared_mode`.

    And a resumed run has its own `patience`, where Lightning's would have that of the checkpoint.
    """

    def __init__(
        self,
        *,
        monitor: str = "val/loss",
        patience: int = 5,
        min_delta: float = 0.0,
        mode: Better | None = None,
        verbose: bool = True,
        check_finite: bool = True,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
    ) -> None:
        super().__init__(
            monitor=monitor,
            patience=patience,
            min_delta=min_delta,
            mode=mode or "min",
            verbose=verbose,
            check_finite=check_finite,
            stopping_threshold=stopping_threshold,
            divergence_threshold=divergence_threshold,
        )
        self._mode_given = mode

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find out whether low or high is better."""
        if self._mode_given is None and stage == "fit":
            self.mode = declared_mode(self.monitor, trainer, pl_module)
            sign = -1 if self.mode == "min" else 1
            self.min_delta = sign * abs(self.min_delta)
            if not torch.isfinite(self.best_score):
                self.best_score = torch.tensor(-sign * math.inf)
        super().setup(trainer, pl_module, stage)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the best score so far, and the number of evaluations since."""
        super().load_state_dict(state_dict | {"patience": self.patience})
