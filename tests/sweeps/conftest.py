"""Sweeps of a stand-in for `gptpl train`, each in a folder of its own."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine

from gptpl.sweeps.jobs import Launcher, Processes
from gptpl.sweeps.outcomes import Outcome
from gptpl.sweeps.study import Search, SearchSpace, SweepStudy, TrialResult
from gptpl.sweeps.study import values as choices
from gptpl.sweeps.worker import RunningTrial, Watcher, Worker


@dataclass
class Seen(Watcher):
    """Notes what a worker tells, and does something when it looks after its trials."""

    look: Callable[[list[RunningTrial]], object] = lambda running: None
    most_at_a_time: int = 0
    endings: list[tuple[str, str]] = field(default_factory=list)

    def moved(self, running: Any) -> None:
        self.most_at_a_time = max(self.most_at_a_time, len(running))
        self.look(list(running))

    def ended(self, trial: RunningTrial, result: Outcome) -> None:
        self.endings.append((trial.claim.folder, result.kind))


@dataclass(frozen=True)
class Sweep:
    """A sweep's folder, worked on anew by each call of `work`."""

    folder: Path
    space: SearchSpace
    search: Search
    shared: tuple[str, ...]

    def study(self) -> SweepStudy:
        return SweepStudy(self.folder, self.space, self.search)

    def work(
        self, *, launcher: Launcher | None = None, seen: Seen | None = None, retry: bool = False
    ) -> dict[str, TrialResult]:
        with self.study() as study:
            if retry:
                study.retry_failed()
            worker = Worker(
                self.folder,
                study,
                launcher or Processes(),
                self.shared,
                watcher=seen or Seen(),
                poll_seconds=0.02,
            )
            worker.work()
            return {result.folder: result for result in study.results()}

    @property
    def starts(self) -> list[dict[str, Any]]:
        """What was started, in order; forgotten when read."""
        path = self.folder / "starts.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]

    @property
    def started(self) -> list[str]:
        return [each["folder"] for each in self.starts]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """SQLite need not survive a power cut here; its waiting would be half of the time of these tests."""

    def hurry(connection: Any, record: Any) -> None:
        connection.execute("PRAGMA synchronous=OFF")

    event.listen(Engine, "connect", hurry)
    yield
    event.remove(Engine, "connect", hurry)


@pytest.fixture
def sweep(tmp_path: Path, fake_train: None) -> Callable[..., Sweep]:
    """Makes a sweep of lists of values, such as `sweep(name=("ok", "fail"))`."""

    def made(
        search: Search | None = None, shared: tuple[str, ...] = (), folder: str = "sweep", **values: Any
    ) -> Sweep:
        space = {
            key: choices(key, given) if isinstance(given, tuple) else given for key, given in values.items()
        }
        grid = Search(sampler="grid", n_trials=None, pruner="none", seed=0)
        (tmp_path / folder).mkdir()
        return Sweep(tmp_path / folder, space, search or grid, shared)

    return made


@pytest.fixture
def new_seen() -> Callable[..., Seen]:
    """A watcher that notes what it is told; what it is given is called at every look."""
    return lambda look=lambda running: None: Seen(look)
