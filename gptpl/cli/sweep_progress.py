"""The progress of a sweep at the terminal and in `results.csv`."""

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from gptpl.files.run_record import LOSS
from gptpl.runs.listing import RESULTS_FILE
from gptpl.sweeps.outcomes import Outcome, RankedTrial, ranked, write_results
from gptpl.sweeps.study import SweepStudy
from gptpl.sweeps.worker import RunningTrial, Watcher


def say(line: str) -> None:
    """A line on standard error, above the progress bar if there is one."""
    tqdm.write(line, file=sys.stderr)


class Progress(Watcher):
    """A progress bar of the trials, and a line for each that ends."""

    def __init__(self, folder: Path, study: SweepStudy, n_jobs: int) -> None:
        self._folder, self._study, self._n_jobs = folder, study, n_jobs
        self._known: dict[str, RankedTrial] = {}
        found = self._rows()
        self._ended = sum(row.result.state in ("finished", "pruned", "failed") for row in found)
        if self._ended:
            say(f"{self._ended} of {study.total()} trials have ended before")
        self._bar = tqdm(
            total=study.total(),
            initial=self._ended,
            unit="trial",
            desc="sweep",
            file=sys.stderr,
            leave=False,
            disable=None,  # without a terminal the lines of `ended` are enough
        )
        self._metric = "val loss" if study.search.metric == LOSS else study.search.metric
        self._sign = study.search.sign
        finished = (self._sign * row.best for row in found if row.result.state == "finished")
        self._best = min(finished, default=math.inf)

    def _rows(self) -> list[RankedTrial]:
        """The trials so far; the run of one that has ended is read once."""
        found = ranked(self._folder, self._study.results(), self._study.search, self._known)
        self._known = {row.result.folder: row for row in found}
        return found

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()

    def started(self, trial: RunningTrial) -> None:
        """Print the trial if others run at the same time; else the bar shows it."""
        if self._n_jobs > 1:
            say(f"trial {trial.name}")

    def stopping(self) -> None:
        """Print what is being waited for."""
        say("stopping: the trials save and end; a second signal ends them at once")

    def moved(self, running: Sequence[RunningTrial]) -> None:
        """Update the bar."""
        parts = []
        for trial in running:
            parts.append(f"trial {trial.claim.folder} step {trial.step}")
            parts += [f"{self._metric} {value:.3f}" for value in trial.values[-1:]]
        self._bar.set_postfix_str(", ".join(parts))

    def ended(self, trial: RunningTrial, result: Outcome) -> None:
        """Add the trial to the table, and print how it ended."""
        self._known.pop(trial.claim.folder, None)  # it may have ended before, too
        try:
            write_results(self._folder, self._rows(), self._study.search)
        except OSError as error:  # the trials go on; the table is written again
            say(f"warning: {RESULTS_FILE} cannot be written ({error.strerror})")
        pruned = result.kind == "interrupted" and trial.pruned
        if pruned or result.kind != "interrupted":
            self._ended += 1
            self._bar.update()
        how = f"{result.kind}: {result.error}"
        if result.kind == "finished":
            how = f"{self._metric} {result.value:.4f}"
        elif pruned:
            how = f"pruned at step {trial.step}, {self._metric} {trial.values[-1]:.4f}"
        if self._sign * result.value < self._best:
            self._best = self._sign * result.value
            how += f", the {'lowest' if self._sign > 0 else 'highest'} so far"
        seconds = time.monotonic() - trial.started_seconds
        say(f"[{self._ended}/{self._study.total()}] trial {trial.name}: {how} ({seconds:.0f} s)")
