"""What the terminal shows of a sweep while it runs, and `results.csv`, which is kept up to date."""

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from gptpl.records.sweep_folder import RESULTS_FILE
from gptpl.sweeps.outcome import Outcome
from gptpl.sweeps.results import rows, write_results
from gptpl.sweeps.study import SweepStudy
from gptpl.sweeps.worker import RunningTrial, Watcher

_ENDED = ("finished", "pruned", "failed")


def say(line: str) -> None:
    """A line on standard error, above the progress bar if there is one."""
    tqdm.write(line, file=sys.stderr)


class Progress(Watcher):
    """A bar of the trials with an estimate of the time, and a line for each that ends."""

    def __init__(self, folder: Path, study: SweepStudy, n_jobs: int) -> None:
        self._folder, self._study = folder, study
        ended = sum(result.state in _ENDED for result in study.results())
        if ended:
            say(f"{ended} of {study.total()} trials have ended before")
        self._bar = tqdm(
            total=study.total(),
            initial=ended,
            unit="trial",
            desc="sweep",
            file=sys.stderr,
            leave=False,
            disable=None,  # where nobody watches, the lines of `ended` are enough
        )
        self._n_jobs, self._ended = n_jobs, ended
        finished = [row for row in rows(folder, study.results()) if row.result.state == "finished"]
        self._lowest = min((row.best_val_loss for row in finished), default=math.inf)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def started(self, trial: RunningTrial) -> None:
        """Says so where trials run side by side; else the bar does."""
        if self._n_jobs > 1:
            say(f"trial {trial.claim.folder}: {' '.join(trial.claim.overrides)}")

    def stopping(self) -> None:
        """Says what is being waited for."""
        say("stopping: the trials save and end; once more, and they end at once")

    def moved(self, running: Sequence[RunningTrial]) -> None:
        """Shows how far the trials are."""
        self._bar.set_postfix_str(", ".join(map(_position, running)))

    def ended(self, trial: RunningTrial, result: Outcome) -> None:
        """Adds the trial to the table, and says how it ended."""
        try:
            write_results(self._folder, rows(self._folder, self._study.results()))
        except OSError as error:  # the trials are worth more than the table, which is written again
            say(f"warning: {RESULTS_FILE} cannot be written ({error.strerror})")
        if result.kind != "interrupted" or trial.pruned:
            self._ended += 1
            self._bar.update()
        how = _ending(trial, result)
        if result.loss < self._lowest:
            self._lowest = result.loss
            how += ", the lowest so far"
        seconds = time.monotonic() - trial.started_seconds
        say(
            f"[{self._ended}/{self._study.total()}] trial {trial.claim.folder}:"
            f" {' '.join(trial.claim.overrides)}: {how} ({seconds:.0f} s)"
        )


def _position(trial: RunningTrial) -> str:
    loss = f", val loss {trial.losses[-1]:.3f}" if trial.losses else ""
    return f"trial {trial.claim.folder} step {trial.step}{loss}"


def _ending(trial: RunningTrial, result: Outcome) -> str:
    if result.kind == "finished":
        return f"val loss {result.loss:.4f}"
    if result.kind == "interrupted" and trial.pruned:
        return f"pruned at step {trial.step}, val loss {trial.losses[-1]:.4f}"
    return f"{result.kind}: {result.error}"
