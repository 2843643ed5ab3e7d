"""The studies, run in this process in their quick setting, each into a folder of its own."""

import importlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


@dataclass(frozen=True)
class Study:
    """A study that has run."""

    module: ModuleType
    folder: Path

    @property
    def result(self) -> Any:
        return json.loads((self.folder / "result.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session", autouse=True)
def _own_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of the tests' own, one thread for tiny models, and afterwards everything as it was."""
    before, threads = dict(os.environ), torch.get_num_threads()
    os.environ["GPTPL_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    for name in ("HYDRA_FULL_ERROR", "GPTPL_RUN_DIR"):
        os.environ.pop(name, None)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def study(
    tmp_path_factory: pytest.TempPathFactory, forked_trials: Callable[[], AbstractContextManager[None]]
) -> Callable[[str], Study]:
    """`study("loss_analysis")`: that study, run once with `--quick`."""
    done: dict[str, Study] = {}

    def run(name: str) -> Study:
        if name not in done:
            module = importlib.import_module(f"experiments.{name}.study")
            folder = tmp_path_factory.mktemp(name)
            with forked_trials():
                module.main(["--quick", "--output", str(folder)])
            done[name] = Study(module, folder)
        return done[name]

    return run
