"""One training run as its folder tells it: settings, record, evaluations, samples."""

import csv
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml  # type: ignore[import-untyped]

from gptpl.errors import InputError
from gptpl.records.settings import Setting, flat_settings

log = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
RUN_FILE = "run.json"
METRICS_FILE = "metrics.csv"
SAMPLES_FILE = "samples.jsonl"

State = Literal["finished", "stopped", "failed", "unfinished"]
"""`unfinished`: still running, or ended without a chance to say why."""


class RunError(InputError):
    """A folder that holds no run, or a file of a run that cannot be read."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The losses after a step, in nats per token and in evaluation mode; NaN where one was not measured."""

    step: int
    tokens_seen: int
    train_loss: float
    val_loss: float


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a run's folder holds. `rows` are those of `metrics.csv`, cells that are empty left out."""

    path: Path
    config: Mapping[str, Any]
    record: Mapping[str, Any]
    rows: Sequence[Mapping[str, float]]

    @property
    def name(self) -> str:
        """The folder with the one around it, such as `quick/2026-11-21_14-51-09`."""
        path = self.path.absolute()
        return f"{path.parent.name}/{path.name}"

    @property
    def state(self) -> State:
        """How the run ended."""
        states: tuple[State, ...] = ("finished", "failed", "stopped")
        return next((state for state in states if self.record.get(state)), "unfinished")

    @property
    def started(self) -> datetime:
        """When it was first started, in local time; where that is not recorded, when its settings were."""
        try:
            return datetime.fromisoformat(str(self.record.get("started"))).astimezone()
        except ValueError:
            return datetime.fromtimestamp((self.path / CONFIG_FILE).stat().st_mtime).astimezone()

    @property
    def steps(self) -> int:
        """The optimizer steps that it has made, as far as its files say."""
        ending = self.record.get(self.state)
        recorded = self.record.get("steps") if self.state == "finished" else _entry(ending, "step")
        return round(_number(recorded) or max((row["step"] for row in self.rows), default=0))

    @property
    def planned_steps(self) -> int | None:
        """The optimizer steps of the whole run; None where an older gptpl did not record them."""
        planned = _number(self.record.get("planned_steps"))
        return None if planned is None else round(planned)

    @property
    def tokens_seen(self) -> int:
        """The tokens in its steps, as far as its files say."""
        recorded = self.record.get("tokens_seen") if self.state == "finished" else None
        rows = (row.get("train/tokens_seen", 0.0) for row in self.rows)
        return round(_number(recorded) or max(rows, default=0))

    @cached_property
    def settings(self) -> dict[str, Setting]:
        """What the run learned with, on one level."""
        return flat_settings(self.config)

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """All of them, by step."""
        known = [(row["step"], row["train/tokens_seen"]) for row in self.rows if "train/tokens_seen" in row]
        per_step = known[-1][1] / known[-1][0] if known and known[-1][0] else 0.0
        return [
            Evaluation(
                step=int(row["step"]),
                tokens_seen=round(row.get("train/tokens_seen", row["step"] * per_step)),
                train_loss=row.get("eval/train_loss", math.nan),
                val_loss=row["val/loss"],
            )
            for row in self.rows
            if "val/loss" in row
        ]

    @property
    def best(self) -> Evaluation | None:
        """The evaluation with the lowest validation loss after the first step; None where there is none.

        What the model had before it learned anything is not its merit.
        """
        measured = [each for each in self.evaluations if each.step > 0 and math.isfinite(each.val_loss)]
        return min(measured, key=lambda each: each.val_loss) if measured else None

    @property
    def last(self) -> Evaluation | None:
        """The last evaluation."""
        return self.evaluations[-1] if self.evaluations else None

    def metric(self, name: str) -> float:
        """The last value of a column of `metrics.csv`, NaN where it has none."""
        return next((row[name] for row in reversed(self.rows) if name in row), math.nan)

    def samples(self) -> list[dict[str, Any]]:
        """The texts that the run sampled, in its order; a last line that is torn is left out."""
        path = self.path / SAMPLES_FILE
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        samples = []
        for line in text.split("\n"):
            try:
                sample = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(sample, dict):
                samples.append(sample)
        return samples


def _entry(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else None


def _number(value: Any) -> float | None:
    """The value, if it is a finite number."""
    known = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if known else None


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run, as far as one may look into it."""
    try:
        return (folder / CONFIG_FILE).is_file()
    except PermissionError:
        return False


def find_runs(folder: Path) -> list[Path]:
    """The folder, if it is a run's, or else all runs below it, by path; no run is searched for others.

    Links are not followed; hidden folders are left out, as those of runs that are being removed, and, with a
    warning, those that may not be read.
    """
    if is_run(folder):
        return [folder]
    try:
        children = sorted(child for child in folder.iterdir() if not child.name.startswith("."))
    except (PermissionError, FileNotFoundError) as error:
        log.warning("%s is left out: %s", folder, error.strerror)
        return []
    below = [child for child in children if child.is_dir() and not child.is_symlink()]
    return [run for child in below for run in find_runs(child)]


def read_run(folder: Path) -> RunRecord:
    """Reads a run. Raises RunError where the folder is none, or one of its files is damaged."""
    if not is_run(folder):
        raise RunError(f"{folder} is no run folder (it has no {CONFIG_FILE}): give one that gptpl train made")
    return RunRecord(
        path=folder,
        config=read_mapping(folder / CONFIG_FILE, parse_yaml),
        record=read_mapping(folder / RUN_FILE, json.loads) if (folder / RUN_FILE).is_file() else {},
        rows=_rows(folder / METRICS_FILE),
    )


def parse_yaml(text: str) -> Any:
    """As `yaml.safe_load`, by libyaml where that is there: ten times faster, which a list of runs feels."""
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506 - both are safe


def read_mapping(path: Path, parse: Any) -> dict[str, Any]:
    """The mapping in a file, by `parse_yaml` or `json.loads`. Raises RunError where there is none."""
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        value = None
    if not isinstance(value, dict):
        raise RunError(f"{path} is damaged: restore it, or leave this run out")
    return value


def _rows(path: Path) -> list[dict[str, float]]:
    if not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [
                {name: float(cell) for name, cell in row.items() if cell}
                for row in csv.DictReader(file, strict=True)
            ]
    except (OSError, ValueError, TypeError, AttributeError, csv.Error):
        rows = [{}]
    if not all("step" in row for row in rows):
        raise RunError(f"{path} is no whole table of numbers: restore it, or leave this run out")
    return rows
