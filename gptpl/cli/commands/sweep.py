"""Train with several settings and compare them: the same as gptpl train -m.

examples:
  gptpl sweep experiment=quick optimizer.lr=1e-3,3e-3 tokenizer=bytes,words      # every combination
  gptpl sweep experiment=quick sweep=learning_rate                               # a ready-made search
  gptpl sweep experiment=quick sweep=tpe 'optimizer.lr=tag(log,interval(1e-4,1e-1))'  # your own search
  gptpl sweep experiment=quick seed=1,2,3 hydra.launcher.n_jobs=2                # two trials at a time
  gptpl sweep experiment=quick seed=1,2,3 hydra/launcher=slurm hydra.launcher.timeout_min=120  # as SLURM jobs
  gptpl sweep experiment=quick seed=1,2,3 sweep.retry_failed=true                # try the failed trials again

The same command again skips what has finished and continues what was interrupted. Writes
runs/sweeps/NAME_HASH, or hydra.sweep.dir=FOLDER: a run folder for each trial (0/, 1/, ...), results.csv,
report.html, report.md. Exit status: 0 all trials finished or pruned, 1 some failed or are left, 2 bad
input; 128 + the number of a signal that stopped it.
"""

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from gptpl.cli.arguments import parse
from gptpl.errors import InputError
from gptpl.files.run_record import LOSS
from gptpl.reports import Criterion, report
from gptpl.runs.listing import RESULTS_FILE
from gptpl.sweeps.outcomes import Outcome, RankedTrial, ranked, write_results
from gptpl.sweeps.study import SweepStudy
from gptpl.sweeps.sweep import sweep
from gptpl.sweeps.worker import RunningTrial, Watcher
from gptpl.text import table


def run(arguments: list[str]) -> int:
    """Runs the trials that are left; returns the exit status."""
    given = parse("train", arguments, sweeps=True)
    for flag, is_given in (("--cfg", given.cfg), ("--info", given.info)):
        if is_given:
            raise InputError(f"{flag} shows the settings of one run: leave -m out")
    result = sweep(
        *given.overrides,
        config_dir=given.config_dir,
        config_name=given.config_name,
        watch=Progress,
        say=say,
    )
    print("\n".join(table(result.rows())))
    print(f"\ntable   {result.table}")
    if result.trials:
        by = Criterion(metric=result.search.metric, mode=result.search.mode)
        print(f"report  {report(result.folder, by=by).page}")
    return result.status(say)


# --- the progress at the terminal and in results.csv ----------------------------------------------------


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
