"""What came of a trial's process: read from its exit status, its run's folder and what it printed."""

import math
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gptpl.records.run_record import RunError, RunRecord, read_run

_SHELL_BASE = 128
"""A command that a signal ended, or that stopped for one, exits with this and the signal's number."""
_LAST_BYTES = 8192
BEGINS = "\n=== "
"""What a trial printed begins with this, after what earlier tries of it printed."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a trial ended. `loss` is its lowest validation loss, NaN unless it has finished."""

    kind: Literal["finished", "failed", "interrupted"]
    loss: float = math.nan
    error: str = ""


def outcome(status: int, run_dir: Path, output: Path) -> Outcome:
    """Judges a process that has ended.

    Args:
        status: as `subprocess` gives it: negative for the signal that killed it.
        run_dir: the trial's run; there may be none.
        output: the file that holds what the process printed.
    """
    if number := _signal(status):
        return Outcome(kind="interrupted", error=_signal_text(number))
    if status:
        return Outcome(kind="failed", error=_last_error(output) or f"exit status {status}")
    try:
        run = read_run(run_dir)
    except RunError as error:
        return Outcome(kind="failed", error=str(error))
    if run.state not in ("finished", "stopped"):  # stopped by its own settings, such as trainer.max_time
        return Outcome(kind="failed", error=f"it ended with status 0, but its run is {run.state}")
    if run.best is None:
        return Outcome(kind="failed", error="no validation loss that is a number: see its metrics.csv")
    return Outcome(kind="finished", loss=run.best.val_loss)


def validation_losses(run: RunRecord) -> list[float]:
    """Of a trial that may still be running, without that of the model which has learned nothing yet."""
    return [each.val_loss for each in run.evaluations if each.step > 0]


def _signal(status: int) -> int:
    """The signal that ended a process, 0 for none."""
    number = -status if status < 0 else status - _SHELL_BASE
    return number if number in signal.valid_signals() else 0


def _signal_text(number: int) -> str:
    name = signal.Signals(number).name
    why = " (the system does so when memory runs out)" if name == "SIGKILL" else ""
    return f"killed by {name}{why}" if name == "SIGKILL" else f"stopped by {name}"


def _last_error(output: Path) -> str:
    """The last line that names an error, or else the last line."""
    if not output.is_file():
        return ""
    with output.open("rb") as file:
        file.seek(max(0, output.stat().st_size - _LAST_BYTES))
        text = file.read().decode("utf-8", errors="replace").rpartition(BEGINS)[2]
    lines = text.splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    for mark in ("gptpl: error: ", "error: "):
        named = [line for line in lines if line.startswith(mark)]
        if named:
            # The first of several lines says what is wrong, the later ones what to do.
            return (named[-1] if mark.startswith("gptpl") else named[0]).removeprefix(mark)
    return lines[-1] if lines else ""
