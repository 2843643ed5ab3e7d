"""`gptpl train` in a process of its own, and what it logged."""

import contextlib
import csv
import io
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from gptpl.cli.main import main
from gptpl.runs.claims import PROCESS_RUN_DIR

ROOT = Path(__file__).parents[2]


# --- the command on one and on two devices ---------------------------------------------------------------


class Pair:
    """Two copies of this process that train on a device each, one run after the other."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        variables = {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        self.errors = [folder / f"rank_{rank}.err" for rank in range(2)]
        self.connections: list[Connection] = []
        self.processes = []
        context = multiprocessing.get_context("fork")
        for rank, path in enumerate(self.errors):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, path, variables | {"LOCAL_RANK": str(rank)}), daemon=True
            )
            process.start()
            self.connections.append(ours)
            self.processes.append(process)

    def run(self, **job: Any) -> None:
        for connection in self.connections:
            connection.send(job)
        answers = [connection.poll(280) and connection.recv() for connection in self.connections]
        assert answers == [0, 0], "".join(path.read_text()[-3000:] for path in self.errors)


def _serve(jobs: Connection, errors: Path, variables: Mapping[str, str]) -> None:
    """Run `gptpl` with the arguments of each job, in its folder; answer with the exit status."""
    file = os.open(errors, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout, sys.stderr = (open(stream, "w", closefd=False) for stream in (1, 2))  # noqa: SIM115
    os.environ.update(variables)
    while True:
        job = jobs.recv()
        os.chdir(job["folder"])
        os.environ |= {"GPTPL_CACHE": job["cache"], PROCESS_RUN_DIR: job["run_dir"]}
        os.environ["WORLD_SIZE"] = "2"  # which Lightning removes after a run
        jobs.send(main(job["arguments"]))


@pytest.fixture(scope="session")
def gptpl_train(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """`gptpl_train(folder, *overrides, ranks=1, status=0)`: the command in that folder; what it says.

    On one device it runs in this process, on two in a `Pair`, which says nothing.
    """
    pairs: list[Pair] = []

    def train(folder: Path, *overrides: str, ranks: int = 1, status: int = 0) -> str:
        (run_dir,) = [
            each.partition("=")[2] for each in overrides if each.startswith(("run_dir=", "resume="))
        ]
        cache, arguments = str(folder.parent / "cache"), ["train", *overrides]
        if ranks == 2:
            if not pairs:
                pairs.append(Pair(tmp_path_factory.mktemp("pair")))
            pairs[0].run(folder=str(folder), cache=cache, run_dir=str(folder / run_dir), arguments=arguments)
            return ""
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as said:
            patch.chdir(folder)
            patch.setenv("GPTPL_CACHE", cache)
            assert main(arguments) == status, said.getvalue()
        return said.getvalue()

    yield train
    for pair in pairs:
        for process in pair.processes:
            process.kill()
            process.join()


@pytest.fixture(scope="session")
def train(gptpl_train: Callable[..., str]) -> Callable[..., Path]:
    """`train(folder, *overrides)`: a run of 6 steps; returns its folder. On two devices with ddp and fsdp."""

    def run(folder: Path, *overrides: str) -> Path:
        ranks = 2 if {"trainer=ddp", "trainer=fsdp"} & set(overrides) else 1
        resumed = any(override.startswith("resume=") for override in overrides)
        gptpl_train(folder, *([] if resumed else [*SETTINGS, "run_dir=run"]), *overrides, ranks=ranks)
        return folder / "run"

    return run


SETTINGS = (
    *("experiment=quick", "model.drop_rate=0", "trainer.max_steps=6", "scheduler.warmup_steps=2"),
    *("eval_every_n_steps=3", "callbacks.sample_text.max_new_tokens=5"),
)


@pytest.fixture(scope="session")
def launched(copy: type[Any]) -> Callable[..., Path]:
    """`launched(folder, *overrides)`: as `train`, by the command in a process that starts the others."""

    def run(folder: Path, *overrides: str) -> Path:
        run_dir = folder / "run"
        first = copy(
            *("train", *SETTINGS, f"run_dir={run_dir}", *overrides),
            cwd=folder,
            output=folder.parent / "said",
            GPTPL_CACHE=folder.parent / "cache",
            PYTHONPATH=ROOT,
        )
        try:
            assert first.wait(280) == 0, first.said
        finally:
            first.end()
        deadline = time.monotonic() + 10
        while _processes_of(str(run_dir)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert _processes_of(str(run_dir)) == []
        return run_dir

    return run


def _processes_of(mark: str) -> list[str]:
    """Command lines of running processes that name `mark`."""
    lines = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it has ended meanwhile
            continue
        if mark in line and entry.parent.name != str(os.getpid()):
            lines.append(line)
    return lines


@pytest.fixture(scope="session")
def logged() -> Callable[[Path], dict[int, dict[str, float]]]:
    """`logged(run_dir)`: metrics.csv by step."""
    return _logged


def _logged(run_dir: Path) -> dict[int, dict[str, float]]:
    with (run_dir / "metrics.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    return {int(row["step"]): {name: float(value) for name, value in row.items() if value} for row in table}
