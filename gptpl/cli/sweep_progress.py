"""What the terminal shows of a sweep while it runs, and `results.csv`, which is kept up to date."""

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from gptpl.files.run_record import LOSS
from gptpl.runs.listing import RESULTS_FILE
from gptpl.sweeps.outcomes import Outcome, Row, rows, write_results
from gptpl.sweeps.study import Search, SweepStudy
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
        self._known: dict[str, Row] = {}
        finished = [row.best for row in self.rows() if row.result.state == "finished"]
        self._sign = 1 if study.search.mode == "min" else -1
        self._best = min((self._sign * value for value in finished), default=math.inf)

    def rows(self) -> list[Row]:
        """The trials as they stand; the run of one that has ended is read once."""
        found = rows(self._folder, self._study.results(), self._study.search, self._known)
        self._known = {row.result.folder: row for row in found}
        return found

    def close(self) -> None:
        """Takes the bar away."""
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
        name = _name(self._study.search)
        self._bar.set_postfix_str(", ".join(_position(trial, name) for trial in running))

    def ended(self, trial: RunningTrial, result: Outcome) -> None:
        """Adds the trial to the table, and says how it ended."""
        self._known.pop(trial.claim.folder, None)  # also of a trial that ended in the same way before
        try:
            write_results(self._folder, self.rows(), self._study.search)
        except OSError as error:  # the trials are worth more than the table, which is written again
            say(f"warning: {RESULTS_FILE} cannot be written ({error.strerror})")
        if result.kind != "interrupted" or trial.pruned:
            self._ended += 1
            self._bar.update()
        how = _ending(trial, result, _name(self._study.search))
        if self._sign * result.value < self._best:
            self._best = self._sign * result.value
            how += f", the {'lowest' if self._sign > 0 else 'highest'} so far"
        seconds = time.monotonic() - trial.started_seconds
        say(
            f"[{self._ended}/{self._study.total()}] trial {trial.claim.folder}:"
            f" {' '.join(trial.claim.overrides)}: {how} ({seconds:.0f} s)"
        )


def _name(search: Search) -> str:
    return "val loss" if search.metric == LOSS else search.metric


def _position(trial: RunningTrial, name: str) -> str:
    value = f", {name} {trial.values[-1]:.3f}" if trial.values else ""
    return f"trial {trial.claim.folder} step {trial.step}{value}"


def _ending(trial: RunningTrial, result: Outcome, name: str) -> str:
    if result.kind == "finished":
        return f"{name} {result.value:.4f}"
    if result.kind == "interrupted" and trial.pruned:
        return f"pruned at step {trial.step}, {name} {trial.values[-1]:.4f}"
    return f"{result.kind}: {result.error}"
