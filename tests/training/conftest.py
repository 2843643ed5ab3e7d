"""`gptpl train` in a process of its own, and what it logged."""

import contextlib
import csv
import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gptpl.cli.main import main

ROOT = Path(__file__).parents[2]


# --- the command on one and on two devices ---------------------------------------------------------------


class Pair:
    """Two processes that train on a device each, one run after the other; see rank.py."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = os.environ | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "WORLD_SIZE": "2",
        }
        self.errors = [folder / f"rank_{rank}.err" for rank in range(2)]
        self.processes: list[subprocess.Popen[str]] = []
        for rank, path in enumerate(self.errors):
            with path.open("w") as errors:
                process = subprocess.Popen(
                    [sys.executable, str(Path(__file__).with_name("rank.py"))],
                    env=environment | {"LOCAL_RANK": str(rank), "NODE_RANK": "0"},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                )
            self.processes.append(process)

    def run(self, **job: object) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
        answers = [process.stdout.readline() for process in self.processes if process.stdout is not None]
        assert answers == ["0\n", "0\n"], "".join(path.read_text()[-3000:] for path in self.errors)


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
            process.communicate()


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
def launched() -> Callable[..., Path]:
    """`launched(folder, *overrides)`: as `train`, by the command in a process that starts the others."""
    return _launched


def _launched(folder: Path, *overrides: str) -> Path:
    run_dir = folder / "run"
    environment = os.environ | {
        "GPTPL_CACHE": str(folder.parent / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-m", "gptpl", "train", *SETTINGS, f"run_dir={run_dir}", *overrides],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    deadline = time.monotonic() + 10
    while _processes_of(str(run_dir)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _processes_of(str(run_dir)) == []
    return run_dir


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
