"""Trials on other machines or in other libraries' pools: SLURM by submitit, Ray, joblib.

A trial is always the same command in a process of its own. It is asked to stop by a file next to its output,
because a signal does not reach another machine; all machines must see the sweep's folder.
"""

import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from gptpl.errors import InputError
from gptpl.sweeps.jobs import Command, ProcessJob, trial_environment

_LOOK_EVERY_SECONDS = 0.5
_STOP, _STOP_AT_ONCE = "stop", "stop at once"
_LOST = -9
"""The exit status of a job that its pool has lost, as if it had been killed."""


class ExecutorJob:
    """A trial in a pool."""

    process = ""

    def __init__(self, future: Future[int], stop_file: Path, losses: Sequence[type[Exception]]) -> None:
        self._future, self._stop_file = future, stop_file
        self._losses: tuple[type[Exception], ...] = (CancelledError, *losses)

    def poll(self) -> int | None:
        """See `gptpl.sweeps.jobs.Job`."""
        if not self._future.done():
            return None
        self._stop_file.unlink(missing_ok=True)
        try:
            return int(self._future.result())
        except self._losses:
            return _LOST

    def stop(self, *, at_once: bool = False) -> None:
        """See `gptpl.sweeps.jobs.Job`."""
        self._stop_file.write_text(_STOP_AT_ONCE if at_once else _STOP, encoding="utf-8")
        if at_once:
            self._future.cancel()


class Executor:
    """A launcher that passes `run_command` to a pool's `submit`.

    The futures of joblib and Ray and the jobs of submitit have the same methods; if a process is lost, they
    raise one of `losses`.
    """

    def __init__(
        self,
        n_jobs: int,
        submit: Callable[[Command, Path], Future[int]],
        losses: Sequence[type[Exception]],
        close: Callable[[], None] = lambda: None,
    ) -> None:
        if n_jobs < 1:
            raise InputError(f"hydra.launcher.n_jobs must be 1 or more, got {n_jobs}")
        self.n_jobs, self._submit, self._losses, self.close = n_jobs, submit, losses, close

    def start(self, command: Command) -> ExecutorJob:
        """See `gptpl.sweeps.jobs.Launcher`."""
        stop_file = command.output.with_suffix(".stop")
        stop_file.unlink(missing_ok=True)
        return ExecutorJob(self._submit(command, stop_file), stop_file, self._losses)


def run_command(command: Command, stop_file: Path) -> int:
    """Run a trial, wherever the pool has put it, until it ends or the file asks it to stop.

    Returns the exit status.
    """
    if stop_file.exists():
        return -signal.SIGTERM  # asked to stop while it waited in a queue
    environment = trial_environment()
    # Lightning would take the trial for one task of the SLURM job; in an interactive job it starts its own
    # processes.
    environment["SLURM_JOB_NAME"] = "interactive"
    job = ProcessJob(command, environment)
    asked = ""
    while (status := job.poll()) is None:
        wish = stop_file.read_text(encoding="utf-8") if stop_file.exists() else ""
        if wish and wish != asked:
            asked = wish
            job.stop(at_once=wish == _STOP_AT_ONCE)
        time.sleep(_LOOK_EVERY_SECONDS)
    return status


def slurm(*, folder: str, n_jobs: int, cluster: str | None = None, **parameters: Any) -> Executor:
    """Each trial as a SLURM job, by submitit.

    Args:
        folder: of submitit's files.
        n_jobs: jobs in the queue or running at a time.
        cluster: None: SLURM; "local": processes here, to try it out.
        parameters: those of `submitit.AutoExecutor.update_parameters`; None: SLURM's defaults.

    Raises InputError without submitit or SLURM, and for several tasks, each of which would start the trial.
    """
    for name in ("tasks_per_node", "nodes"):
        if (tasks := parameters.get(name)) not in (None, 1):
            raise InputError(
                f"hydra.launcher.{name}={tasks} would start each trial {tasks} times in one folder: leave it"
                " out, and give gpus_per_node and trainer.devices, whose processes a trial starts itself"
            )
    submitit = _imported("submitit", "slurm")
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
    except RuntimeError as error:
        raise InputError(f"hydra/launcher=slurm: {error}; hydra.launcher.cluster=local runs here") from error
    executor.update_parameters(**{name: value for name, value in parameters.items() if value is not None})
    errors = submitit.core.utils
    lost = (errors.UncompletedJobError, errors.FailedJobError)
    return Executor(n_jobs, partial(executor.submit, run_command), lost)


def ray(
    *, n_jobs: int, address: str | None = None, cpus_per_trial: int = 1, gpus_per_trial: float = 0
) -> Executor:
    """Each trial as a task of a Ray cluster, or of one started here; Ray assigns its GPUs."""
    library = _imported("ray", "ray")
    library.init(address=address, log_to_driver=False, ignore_reinit_error=True)
    task = library.remote(num_cpus=cpus_per_trial, num_gpus=gpus_per_trial, max_retries=0)(run_command)
    lost = (library.exceptions.RayError,)
    return Executor(n_jobs, lambda command, stop: task.remote(command, stop).future(), lost, library.shutdown)


def joblib(*, n_jobs: int) -> Executor:
    """Each trial as a task of loky, joblib's pool of processes."""
    loky = _imported("joblib.externals.loky", "joblib")
    pool = loky.get_reusable_executor(max_workers=max(1, n_jobs))
    return Executor(n_jobs, partial(pool.submit, run_command), (loky.BrokenProcessPool,), pool.shutdown)


def _imported(module: str, launcher: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise InputError(
            f"hydra/launcher={launcher} needs {package}: pip install {package}, or use"
            " hydra/launcher=processes"
        ) from error
