"""Helpers of the studies: run `gptpl train` into a folder, read its results, write the record."""

import contextlib
import csv
import io
import json
import re
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gptpl.cli.main import main as gptpl

Overrides = Sequence[str]


@dataclass(frozen=True)
class Evaluation:
    """Losses in evaluation mode, in nats per token."""

    step: int
    train_loss: float
    val_loss: float


def train_all(runs: Mapping[str, Overrides], folder: Path) -> dict[str, Path]:
    """`gptpl train` once for each name, one after the other, into folder/name; returns the runs' folders.

    A run that has finished there with the same overrides is not trained again. Raises SystemExit with
    the output of the command if a run fails.
    """
    with tqdm(runs.items(), unit="run") as bar:
        for name, overrides in bar:
            bar.set_postfix_str(name)
            _train(folder / name, overrides)
    return {name: folder / name for name in runs}


def _train(run: Path, overrides: Overrides) -> None:
    arguments = ["train", *overrides, f"run_dir={run}"]
    if (run / "run.json").exists():
        record = run_record(run)
        if "finished" in record and record["command"] == shlex.join(["gptpl", *arguments]):
            return
    shutil.rmtree(run, ignore_errors=True)
    output = io.StringIO()
    # In this process: a study of many small runs would wait longer for imports than for training.
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        status = gptpl(arguments)
    if status:
        raise SystemExit(
            f"{shlex.join(['gptpl', *arguments])} ended with status {status}:\n{output.getvalue()}"
        )


def run_record(run: Path) -> dict[str, Any]:
    """The run's run.json."""
    return json.loads((run / "run.json").read_text(encoding="utf-8"))


def settings_of(overrides: Overrides) -> list[str]:
    """Overrides for a record: without paths of the machine on which it was made."""
    return [override for override in overrides if not override.startswith("data.path=")]


def column(run: Path, name: str) -> dict[int, float]:
    """A metric of the run's metrics.csv by the optimizer steps at which it was logged."""
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


def evaluations(run: Path) -> list[Evaluation]:
    """Every evaluation of the run, the one before the first step included."""
    train, val = column(run, "eval/train_loss"), column(run, "val/loss")
    return [Evaluation(step, train[step], val[step]) for step in sorted(val)]


def lowest(points: Sequence[Evaluation]) -> Evaluation:
    """The evaluation with the lowest validation loss: where the curve turns, if it is not the last."""
    return min(points, key=lambda point: point.val_loss)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, a column for each key of the first row."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row.values())) + " |" for row in rows)])


def write_result(
    output: Path, runs: Mapping[str, Path], *, name: str = "result.json", **content: Any
) -> None:
    """Write the record: the content, and the versions, hardware and data of the runs."""
    record = run_record(next(iter(runs.values())))
    measured_with = {
        "date": time.strftime("%Y-%m-%d"),
        "versions": record["versions"],
        "hardware": record["hardware"],
        "data": record["data"],
    }
    text = json.dumps(measured_with | content, indent=1)
    # a list of numbers stays on its line
    text = re.sub(r"\[[\s\d.,\-e]+\]", lambda numbers: " ".join(numbers[0].split()), text)
    output.mkdir(parents=True, exist_ok=True)
    (output / name).write_text(text + "\n", encoding="utf-8")
