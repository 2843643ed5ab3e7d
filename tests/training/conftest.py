"""This room's tests run on one thread: the models are so small that threads only wait for each other."""

import csv
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- the command in processes of its own -----------------------------------------------------------------


@pytest.fixture(scope="session")
def train() -> Callable[..., Path]:
    """`train(folder, *overrides)`: a run of 6 steps of `gptpl train`; returns its folder."""
    return _train


@pytest.fixture(scope="session")
def logged() -> Callable[[Path], dict[int, dict[str, float]]]:
    """`logged(run_dir)`: metrics.csv by step."""
    return _logged


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


def _train(folder: Path, *overrides: str) -> Path:
    """`gptpl train` in a process of its own that must leave no other behind; returns the run's folder."""
    run_dir = folder / "run"
    resumed = any(override.startswith("resume=") for override in overrides)
    settings = [
        "experiment=quick",
        "model.drop_rate=0",
        "trainer.max_steps=6",
        "scheduler.warmup_steps=2",
        "eval_every_n_steps=3",
        "callbacks.sample_text.max_new_tokens=5",
        f"run_dir={run_dir}",
    ]
    environment = os.environ | {
        "GPTPL_CACHE": str(folder.parent / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-m", "gptpl", "train", *([] if resumed else settings), *overrides],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    deadline = time.monotonic() + 10
    while _processes_of(str(run_dir)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _processes_of(str(run_dir)) == []
    return run_dir


def _logged(run_dir: Path) -> dict[int, dict[str, float]]:
    with (run_dir / "metrics.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    return {int(row["step"]): {name: float(value) for name, value in row.items() if value} for row in table}
