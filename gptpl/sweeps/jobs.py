"""Trials as processes of their own: on this machine, or elsewhere by submitit (SLURM), Ray or joblib.

A trial is always the same command in a process of its own. On another machine it is asked to stop by a file
next to its output, because a signal does not reach it; all machines must see the sweep's folder.
"""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import psutil

from gptpl.errors import InputError

_OF_A_PROCESS_GROUP = (
    *("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "GPTPL_RUN_DIR", "PL_GLOBAL_SEED"),
)
"""Variables of torch and Lightning for the processes of one training: a trial starts a group of its own."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """The command of a trial, its working directory, and the file of its output."""

    arguments: Sequence[str]
    cwd: Path
    output: Path


class Job(Protocol):
    """A trial that has been started; `process` is its name for `is_alive`, empty on another machine."""

    process: str

    def poll(self) -> int | None:
        """The exit status, negative for the signal that killed it; None while it runs."""

    def stop(self, *, at_once: bool = False) -> None:
        """Ask it to save and end; `at_once`: to end."""


class Launcher(Protocol):
    """Runs trials, `n_jobs` at a time."""

    n_jobs: int

    def start(self, command: Command) -> Job:
        """Start a trial."""

    def close(self) -> None:
        """Release the resources."""


class ProcessJob:
    """A process on this machine, in a process group of its own, so that Ctrl-C does not reach it."""

    def __init__(self, command: Command, environment: Mapping[str, str]) -> None:
        with command.output.open("ab") as output:
            self._process = subprocess.Popen(
                command.arguments,
                cwd=command.cwd,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        started_seconds = 0.0
        with suppress(psutil.NoSuchProcess):
            started_seconds = psutil.Process(self._process.pid).create_time()
        self.process = f"{socket.gethostname()} {self._process.pid} {started_seconds}"

    def poll(self) -> int | None:
        """See `Job`."""
        return self._process.poll()

    def stop(self, *, at_once: bool = False) -> None:
        """See `Job`; at once, together with all processes that it has started."""
        if self._process.poll() is not None:
            return
        if at_once and os.name == "posix":
            os.killpg(self._process.pid, signal.SIGKILL)
        elif at_once:
            self._process.kill()
        else:
            self._process.terminate()


class Processes:
    """Trials as processes on this machine: by default one for each GPU, or else one at a time.

    On a machine with GPUs each trial sees only its own (`gpus_per_trial`, by default 1), from which
    trainer.devices are taken. Several trials share the CPU's cores equally, unless OMP_NUM_THREADS is set.
    """

    def __init__(self, *, n_jobs: int | None = None, gpus_per_trial: int | None = None) -> None:
        devices = visible_gpus()
        each = min(1, len(devices)) if gpus_per_trial is None else gpus_per_trial
        if not 0 <= each <= len(devices):
            raise InputError(f"hydra.launcher.gpus_per_trial must be 0 to {len(devices)} here, got {each}")
        places = len(devices) // each if each else None
        self.n_jobs = (places or 1) if n_jobs is None else n_jobs
        if self.n_jobs < 1 or (places is not None and self.n_jobs > places):
            most = f"1 to {places}" if places else "1 or more"
            raise InputError(f"hydra.launcher.n_jobs must be {most} here, got {n_jobs}")
        self._groups = [devices[place * each : (place + 1) * each] for place in range(self.n_jobs)]
        self._jobs: list[ProcessJob | None] = [None] * self.n_jobs

    def start(self, command: Command) -> ProcessJob:
        """See `Launcher`."""
        place = next(i for i, job in enumerate(self._jobs) if job is None or job.poll() is not None)
        environment = trial_environment()
        if self._groups[place]:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self._groups[place])
        if self.n_jobs > 1:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // self.n_jobs)))
        self._jobs[place] = job = ProcessJob(command, environment)
        return job

    def close(self) -> None:
        """See `Launcher`."""


def is_alive(process: str) -> bool:
    """Whether a `Job.process` of this machine still runs, rather than a later one with the same number."""
    host, _, rest = process.partition(" ")
    if host != socket.gethostname():
        return False
    pid, started_seconds = rest.split()
    try:
        found = psutil.Process(int(pid))
        return found.create_time() == float(started_seconds) and found.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def trial_environment() -> dict[str, str]:
    """The environment of this process, without variables that would make a trial part of another job."""
    return {name: value for name, value in os.environ.items() if name not in _OF_A_PROCESS_GROUP}


def usable_cores() -> int:
    """Physical cores that this process may use."""
    physical = psutil.cpu_count(logical=False) or 1
    return min(physical, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else physical


def visible_gpus() -> list[str]:
    """The CUDA devices that this process may use, by number or by their names in CUDA_VISIBLE_DEVICES."""
    import torch

    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if named else [str(number) for number in range(count)]


# --- elsewhere ------------------------------------------------------------------------------------------

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
