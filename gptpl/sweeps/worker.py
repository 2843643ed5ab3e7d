"""A worker of a sweep: starts trials, watches them, prunes them, and records their results."""

import math
import shlex
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from gptpl.callbacks.stopping import SIGNALS
from gptpl.files.durable import is_locked
from gptpl.files.run_record import CHECKPOINT_FOLDER, EVALUATIONS_FILE, LAST, METRICS_FILE, RunError, read_run
from gptpl.runs.listing import OUTPUT
from gptpl.runs.removal import remove_folder
from gptpl.sweeps.jobs import Command, Job, Launcher
from gptpl.sweeps.outcomes import BEGINS, Outcome, outcome
from gptpl.sweeps.study import STORAGE_ERRORS, Claim, SweepStudy, storage_error

PROGRAM = (sys.executable, "-m", "gptpl", "train")
PATIENCE_SECONDS = 60.0
"""How long trials may take to save when the worker itself fails."""


@dataclass(kw_only=True)
class RunningTrial:
    """A trial that this worker watches.

    Attributes:
        values: the sweep's metric, one for each evaluation.
        read_version: inode, time and size of the files from which `values` and `step` were read.
    """

    claim: Claim
    run_dir: Path
    output: Path
    job: Job
    started_seconds: float = field(default_factory=time.monotonic)
    pruned: bool = False
    values: list[float] = field(default_factory=list)
    step: int = 0
    read_version: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Its folder and its settings."""
        return f"{self.claim.folder}: {' '.join(self.claim.overrides)}"


class Watcher:
    """Is told about events; does nothing by itself."""

    def started(self, trial: RunningTrial) -> None:
        """A trial has been started or resumed."""

    def stopping(self) -> None:
        """After a signal the running trials have been asked to save and end."""

    def moved(self, running: Sequence[RunningTrial]) -> None:
        """Some time has passed."""

    def ended(self, trial: RunningTrial, result: Outcome) -> None:
        """A trial has ended, which is recorded."""

    def close(self) -> None:
        """The work has ended."""


class Worker:
    """Runs the trials of the sweep in a folder, as many at a time as the launcher takes.

    `train` are the arguments of `gptpl train` that all trials share; `stopped_by` is the signal that ended
    the work early.
    """

    def __init__(
        self,
        folder: Path,
        study: SweepStudy,
        launcher: Launcher,
        train: Sequence[str],
        *,
        watcher: Watcher,
        poll_seconds: float = 0.5,
    ) -> None:
        self._folder, self._study, self._launcher, self._train = folder, study, launcher, list(train)
        self._watcher, self._poll_seconds = watcher, poll_seconds
        self._running: list[RunningTrial] = []
        self.stopped_by: int | None = None

    def work(self) -> None:
        """Work until no trial is left, or until a signal such as Ctrl-C; a second one does not wait.

        Raises OSError if the sweep's own state cannot be written, after asking the trials to save.
        """
        (self._folder / OUTPUT).mkdir(exist_ok=True)
        with ExitStack() as stack:
            for number in SIGNALS if threading.current_thread() is threading.main_thread() else ():
                stack.callback(signal.signal, number, signal.signal(number, self._stop))
            stack.callback(self._end_what_runs)
            try:
                self._work()
            except STORAGE_ERRORS as error:
                raise storage_error(self._folder, error) from error

    def _work(self) -> None:
        abandoned = self._study.abandoned()
        told = False
        while True:
            while not self._stopping() and len(self._running) < self._launcher.n_jobs:
                claim = abandoned.pop(0) if abandoned else self._study.next()
                if claim is None:
                    break
                if self._stopping():  # the signal may have come while the study was asked
                    abandoned.append(claim)
                    break
                self._start(claim)
            if not self._running:
                break
            if self._stopping() and not told:
                told = True
                self._watcher.stopping()
            time.sleep(self._poll_seconds)
            self._look()
        for claim in abandoned:
            self._study.end(claim, "interrupted", error="not resumed yet")

    def _stopping(self) -> bool:
        return self.stopped_by is not None

    def _end_what_runs(self) -> None:
        """After an error of the worker itself no process keeps running, and no work is unsaved."""
        for trial in self._running:
            trial.job.stop()
        patience_ends = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < patience_ends and any(t.job.poll() is None for t in self._running):
            time.sleep(self._poll_seconds)
        for trial in self._running:
            trial.job.stop(at_once=True)

    def _start(self, claim: Claim) -> None:
        run_dir = self._folder / claim.folder
        if run_dir.is_dir() and is_locked(run_dir):
            self._study.end(claim, "interrupted", error="a process of an earlier start is still training it")
            return
        output = self._folder / OUTPUT / f"{claim.folder}.log"
        checkpoints = run_dir / CHECKPOINT_FOLDER
        # A copy of the folder may lack the link to the newest checkpoint, which resuming does not need.
        if (checkpoints / LAST).exists() or any(checkpoints.glob("step-*.ckpt")):
            flags = [each for each in self._train if each.startswith("--config-dir")]
            own = [*flags, f"resume={run_dir}"]
        else:
            remove_folder(run_dir)  # of a run that ended before its first checkpoint
            own = [*self._train, *claim.overrides, f"run_dir={run_dir}"]
        arguments = [*PROGRAM, *own]
        with output.open("a", encoding="utf-8") as file:
            file.write(f"{BEGINS}{time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(arguments)}\n")
        job = self._launcher.start(Command(arguments=arguments, cwd=Path.cwd(), output=output))
        trial = RunningTrial(claim=claim, run_dir=run_dir, output=output, job=job)
        self._running.append(trial)
        if self._stopping():  # the signal may have come since it was claimed
            job.stop()
        self._study.begun(claim, job.process)
        self._watcher.started(trial)

    def _look(self) -> None:
        for trial in list(self._running):
            status = trial.job.poll()
            self._read(trial)
            if status is not None:
                self._running.remove(trial)
                result = outcome(status, trial.run_dir, trial.output, self._study.search)
                state = "pruned" if result.kind == "interrupted" and trial.pruned else result.kind
                self._study.end(trial.claim, state, value=result.value, error=result.error)
                self._watcher.ended(trial, result)
            elif not trial.pruned and trial.values and trial.claim.trial.should_prune():
                trial.pruned = True
                trial.job.stop()
        self._watcher.moved(self._running)

    def _read(self, trial: RunningTrial) -> None:
        """Read the progress of a trial; a file that is just being written is read the next time."""
        files = [trial.run_dir / name for name in (EVALUATIONS_FILE, METRICS_FILE)]
        try:
            found = [file.stat() for file in files if file.exists()]
            version = [(each.st_ino, each.st_mtime_ns, each.st_size) for each in found]
            if version == trial.read_version:
                return
            run = read_run(trial.run_dir)
        except (FileNotFoundError, RunError):
            return
        trial.read_version = version
        # Without the evaluation before the first step.
        measured = [each.metrics for each in run.evaluations if each.step > 0]
        trial.values = [metrics.get(self._study.search.metric, math.nan) for metrics in measured]
        self._study.report(trial.claim, trial.values)
        trial.step = run.steps

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: the trials save and end, then the work does."""
        for trial in self._running:
            trial.job.stop(at_once=self.stopped_by is not None)
        self.stopped_by = self.stopped_by or number
