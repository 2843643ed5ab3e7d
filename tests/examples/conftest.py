"""A stranger at work: gptpl is installed, their package and its config folder lie beside one another."""

import contextlib
import csv
import io
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from gptpl.cli.main import main

HERE = Path(__file__).parent
CONF = HERE / "conf"


@dataclass(frozen=True)
class Outcome:
    """What a command left."""

    status: int
    out: str
    err: str


class Lab:
    """The stranger's folder, with a file of notes in it."""

    conf = CONF

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        draw = random.Random(0)
        words = ["the", "sea", "sang", "to", "an", "old", "pilot", "and", "a", "keeper", "of", "the", "light"]
        with (folder / "notes.csv").open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["text", "title"])
            rows.writerows([" ".join(draw.choices(words, k=8)), f"Note {number}"] for number in range(40))

    def __call__(self, *arguments: str) -> Outcome:
        """Runs a command there."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.chdir(self.folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(list(arguments))
        return Outcome(status, out.getvalue(), err.getvalue())

    def done(self, *arguments: str) -> str:
        """Runs a command that must succeed; returns what it printed."""
        outcome = self(*arguments)
        assert outcome.status == 0, outcome.err
        return outcome.out

    def refused(self, *arguments: str) -> str:
        """Runs a command that must refuse its input in one line; returns that."""
        outcome = self(*arguments)
        *_, last = outcome.err.splitlines()
        assert outcome.status == 2, outcome
        assert "Traceback" not in outcome.err
        return last.removeprefix("gptpl: error: ")


@pytest.fixture(scope="session", autouse=True)
def _installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """As `pip install` leaves it, also for the processes of a sweep; an own cache, one thread."""
    before, path, threads = dict(os.environ), list(sys.path), torch.get_num_threads()
    sys.path.append(str(HERE))
    os.environ["PYTHONPATH"] = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(HERE)]).strip(
        os.pathsep
    )
    os.environ["GPTPL_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    sys.path[:] = path
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """One folder for all tests of a module."""
    return Lab(tmp_path_factory.mktemp("lab"))
