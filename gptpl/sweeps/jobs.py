"""A trial as a process of its own, and how many of them run side by side on this machine."""

import os
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

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
