"""The commands, run in this process as a user would run them, and a few trained runs to use them on."""

import contextlib
import csv
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from gptpl.cli.main import main


@dataclass(frozen=True)
class RunFolder:
    """What a run left, read without gptpl."""

    path: Path

    @property
    def config(self) -> Any:
        return OmegaConf.to_container(OmegaConf.load(self.path / "config.yaml"))

    @property
    def record(self) -> Any:
        return json.loads((self.path / "run.json").read_text(encoding="utf-8"))

    @property
    def rows(self) -> list[dict[str, str]]:
        """Of metrics.csv."""
        with (self.path / "metrics.csv").open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    @property
    def steps(self) -> list[int]:
        """Of metrics.csv."""
        return [int(row["step"]) for row in self.rows]

    @property
    def samples(self) -> list[Any]:
        lines = (self.path / "samples.jsonl").read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines if line]

    @property
    def files(self) -> set[str]:
        """Paths below it; `events` for TensorBoard's, `step-*` for checkpoints of whatever step."""
        names = {path.relative_to(self.path).as_posix() for path in self.path.rglob("*") if path.is_file()}
        names = {re.sub(r"step-\d{8}", "step-*", name) for name in names}
        return {"events" if name.startswith("tensorboard/events.out.tfevents.") else name for name in names}

    def checkpoint(self, name: str) -> Any:
        return torch.load(self.path / f"checkpoints/{name}.ckpt", weights_only=True)


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit status, what it wrote, and the folder that it ran in."""

    status: int
    out: str
    err: str
    folder: Path

    @property
    def run(self) -> RunFolder:
        """The only run below the folder."""
        [config] = self.folder.rglob("config.yaml")
        return RunFolder(config.parent)


Command = Callable[..., Outcome]


def run_command(*arguments: str, cwd: Path) -> Outcome:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(list(arguments))
    return Outcome(status, out.getvalue(), err.getvalue(), cwd)


@pytest.fixture(scope="session", autouse=True)
def _own_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of the tests' own, and afterwards everything as it was (Lightning stores its seed there)."""
    before = dict(os.environ)
    os.environ["GPTPL_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    for name in ("HYDRA_FULL_ERROR", "GPTPL_RUN_DIR"):
        os.environ.pop(name, None)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def command() -> Command:
    """Runs a command in a given folder: `command("train", "model=tiny", cwd=folder).status`."""
    return run_command


@pytest.fixture
def gptpl(tmp_path: Path) -> Command:
    """Runs a command in the test's own folder: `gptpl("train", "model=tiny").status`."""
    return lambda *arguments: run_command(*arguments, cwd=tmp_path)


@pytest.fixture
def run_folder() -> Callable[[Path], RunFolder]:
    """Reads a run's folder."""
    return RunFolder


@pytest.fixture
def refused(gptpl: Command, tmp_path: Path) -> Callable[..., str]:
    """Runs a command that must be refused; returns the one line that it says, without `gptpl: error: `.

    Refused means: exit status 2, that line and no traceback, nothing on standard output, no file touched.
    """

    def refusal(*arguments: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        outcome = gptpl(*arguments)
        assert (outcome.status, outcome.out) == (2, ""), outcome
        *earlier, last = outcome.err.splitlines()
        # What is wrong may only be found in a checkpoint that was opened, or a text that was encoded; a
        # warning may come before.
        allowed = ("checkpoint: ", "encoding the corpus", "warning: ")
        assert all(line.startswith(allowed) for line in earlier), outcome.err
        assert last.startswith("gptpl: error: ")
        assert sorted(tmp_path.rglob("*")) == before
        return last.removeprefix("gptpl: error: ")

    return refusal


TRAIN = ("train", "trainer=cpu", "trainer.precision=32-true", "scheduler.warmup_steps=1")


@pytest.fixture(scope="session")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """`experiment=quick`, stopped after 8 of its steps. Copy its folder before changing anything in it."""
    outcome = run_command(
        *(*TRAIN, "experiment=quick", "trainer.max_steps=8", "eval_every_n_steps=4"),
        cwd=tmp_path_factory.mktemp("quick"),
    )
    assert outcome.status == 0, outcome.err
    return outcome


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A tiny model of a text of the user's own under the tokenizer of words, with windows of 16 tokens."""
    folder = tmp_path_factory.mktemp("words")
    nouns = ("pilot", "keeper", "fisher", "widow", "child")
    sentences = [
        f"The {word} {noun} sang, and the sea was still." for word in ("old", "tall") for noun in nouns
    ]
    (folder / "my text, 1.txt").write_text("\n".join(sentences * 16), encoding="utf-8")
    outcome = run_command(
        *(*TRAIN, "model=tiny", "model.context_length=16", "tokenizer=words"),
        *("data=text_file", "data.path=my text, 1.txt", "run_dir=run", "trainer.max_steps=3"),
        "callbacks.sample_text.strategies=[{temperature: 0.0}]",
        cwd=folder,
    )
    assert outcome.status == 0, outcome.err
    return outcome


@pytest.fixture
def copy(quick: Outcome, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the quick run: `copy("runs/a", {"optimizer.lr": 1.0}, started=...)`; None leaves one out."""

    def make(name: str, settings: dict[str, Any] | None = None, **entries: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(quick.run.path, folder, symlinks=True)
        config = quick.run.config
        for key, value in (settings or {}).items():
            group, _, last = key.rpartition(".")
            (config[group] if group else config)[last] = value
        text = OmegaConf.to_yaml(OmegaConf.create(config | {"run_dir": str(folder)}))
        (folder / "config.yaml").write_text(text.replace(str(quick.run.path), str(folder)))
        record = {k: v for k, v in (quick.run.record | entries).items() if v is not None}
        (folder / "run.json").write_text(json.dumps(record))
        return folder

    return make
