"""How trials ended, and their ranking, `results.csv`.

Read from exit status, output, and the run's own record: a trial needs no logger.
"""

import csv
import io
import math
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gptpl.errors import SIGNAL_STATUS
from gptpl.files.durable import write_atomically
from gptpl.files.run_record import LOSS, RunError, read_run
from gptpl.runs.listing import RESULTS_FILE
from gptpl.sweeps.study import Search, TrialResult

_LAST_BYTES = 8192
BEGINS = "\n=== "
"""Begins the output of each attempt at a trial in its file."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a trial ended; `value` is the best of the sweep's metric, NaN unless it has finished."""

    kind: Literal["finished", "failed", "interrupted"]
    value: float = math.nan
    error: str = ""


def outcome(status: int, run_dir: Path, output: Path, search: Search) -> Outcome:
    """How a process ended, by its exit status (as `subprocess` gives it) and its output."""
    number = -status if status < 0 else status - SIGNAL_STATUS
    if number in signal.valid_signals():
        name = signal.Signals(number).name
        killed = "killed by SIGKILL (the system does so when memory runs out)"
        return Outcome(kind="interrupted", error=killed if name == "SIGKILL" else f"stopped by {name}")
    if status:
        return Outcome(kind="failed", error=_last_error(output) or f"exit status {status}")
    try:
        run = read_run(run_dir)
    except RunError as error:
        return Outcome(kind="failed", error=str(error))
    if run.state not in ("finished", "stopped"):  # stopped by its own settings, such as trainer.max_time
        return Outcome(kind="failed", error=f"exit status 0, but its run is {run.state}")
    best = run.best_by(search.metric, search.mode)
    if best is None:
        measured = ", ".join(sorted({name for each in run.evaluations for name in each.metrics})) or "nothing"
        return Outcome(kind="failed", error=f"no {search.metric} that is a number: it measured {measured}")
    return Outcome(kind="finished", value=best.metrics[search.metric])


def _last_error(output: Path) -> str:
    """The last error in the output, or else its last line."""
    if not output.is_file():
        return ""
    with output.open("rb") as file:
        file.seek(max(0, output.stat().st_size - _LAST_BYTES))
        text = file.read().decode("utf-8", errors="replace").rpartition(BEGINS)[2]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for mark in ("gptpl: error: ", "error: "):
        named = [line for line in lines if line.startswith(mark)]
        if named:
            # The first of several lines says what is wrong, the later ones what to do.
            return (named[-1] if mark.startswith("gptpl") else named[0]).removeprefix(mark)
    return lines[-1] if lines else ""


# --- all trials -----------------------------------------------------------------------------------------

_ENDED = ("finished", "pruned", "failed", "interrupted")


@dataclass(frozen=True, kw_only=True)
class RankedTrial:
    """A trial with the best and the last value of the sweep's metric, NaN if it was not measured."""

    result: TrialResult
    best: float
    last: float
    error: str

    def cells(self) -> list[str]:
        """In the order of `header`."""
        values = ["" if math.isnan(value) else f"{value:.4f}" for value in (self.best, self.last)]
        return [self.result.folder, " ".join(self.result.overrides), self.result.state, *values, self.error]


def header(search: Search) -> list[str]:
    """The columns of the table."""
    name = "val_loss" if search.metric == LOSS else search.metric
    return ["trial", "overrides", "state", f"best_{name}", name, "error"]


def ranked(
    folder: Path,
    results: Sequence[TrialResult],
    search: Search,
    known: Mapping[str, RankedTrial] | None = None,
) -> list[RankedTrial]:
    """The trials of the sweep in a folder, those that have finished first, the best first.

    `known` are trials by their folders, as found before: if one has ended with the same result, its run is
    not read again.
    """
    found = []
    for result in results:
        before = (known or {}).get(result.folder)
        if before is None or before.result != result or result.state not in _ENDED:
            before = _measured(folder, result, search)
        found.append(before)

    def rank(trial: RankedTrial) -> tuple[bool, float]:
        value = math.inf if math.isnan(trial.best) else search.sign * trial.best
        return trial.result.state != "finished", value

    return sorted(found, key=rank)


def _measured(folder: Path, result: TrialResult, search: Search) -> RankedTrial:
    best, last, error = result.value, math.nan, result.error
    if result.state != "waiting":
        try:
            run = read_run(folder / result.folder)
            if (found := run.best_by(search.metric, search.mode)) is not None:
                best = found.metrics[search.metric]
            if run.last is not None:
                last = run.last.metrics.get(search.metric, math.nan)
        except RunError as damage:  # the table shows at least how it ended
            error = str(damage) if result.state == "finished" else error
    return RankedTrial(result=result, best=best, last=last, error=error)


def write_results(folder: Path, trials: Sequence[RankedTrial], search: Search) -> None:
    """Write `results.csv`, a row for each trial."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([header(search), *(trial.cells() for trial in trials)])
    write_atomically(folder / RESULTS_FILE, text.getvalue())
