"""One training run as its folder tells it: settings, record, evaluations, samples."""

import csv
import json
import logging
import math
import platform
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import yaml

from gptpl.errors import InputError
from gptpl.files.durable import write_atomically
from gptpl.files.run_settings import Setting, flat_settings, with_current_names

log = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
CHECKPOINT_FOLDER, LAST, BEST = "checkpoints", "last.ckpt", "best.ckpt"
RUN_FILE = "run.json"
METRICS_FILE = "metrics.csv"
EVALUATIONS_FILE = "evaluations.jsonl"

State = Literal["finished", "stopped", "failed", "unfinished"]
"""`unfinished`: still running, or ended without a chance to record why."""

Mode = Literal["min", "max"]
"""Whether the lowest or the highest value of a metric is its best."""
LOSS = "val/loss"
BITS_PER_BYTE = "val/bits_per_byte"

_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError)
"""What parsers raise over damaged text."""


class RunError(InputError):
    """A folder without a run, or a file of a run that cannot be read."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Metrics after a step, by name, in evaluation mode."""

    step: int
    tokens_seen: int
    metrics: Mapping[str, float]

    @property
    def train_loss(self) -> float:
        """In nats per token; NaN if it was not measured."""
        return self.metrics.get("eval/train_loss", math.nan)

    @property
    def val_loss(self) -> float:
        """In nats per token; NaN if it was not measured."""
        return self.metrics.get(LOSS, math.nan)


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The settings of a run, its `run.json`, and its metrics.

    Attributes:
        rows: `metrics.csv` without its empty cells; empty without that logger.
        recorded: `evaluations.jsonl`; empty for a run from before gptpl wrote it.
    """

    path: Path
    config: Mapping[str, Any]
    record: Mapping[str, Any]
    rows: Sequence[Mapping[str, float]]
    recorded: Sequence[Evaluation] = ()

    @property
    def name(self) -> str:
        """The folder and the one around it, such as `quick/2026-11-21_14-51-09`."""
        return "/".join(self.path.absolute().parts[-2:])

    @property
    def state(self) -> State:
        """How the run ended."""
        states: tuple[State, ...] = ("finished", "failed", "stopped")
        return next((state for state in states if self.record.get(state)), "unfinished")

    @property
    def started(self) -> datetime:
        """See `started`."""
        return started(self.path, self.record)

    @property
    def tags(self) -> list[str]:
        """Words that the user gave it, from `run.json`, which keeps changes, or else from the settings."""
        tags = self.record.get("tags", self.config.get("tags"))
        return [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []

    @property
    def notes(self) -> str:
        """What the user wrote about it, from where the tags are."""
        notes = self.record.get("notes", self.config.get("notes"))
        return notes if isinstance(notes, str) else ""

    @property
    def steps(self) -> int:
        """Optimizer steps made, as far as its files tell."""
        recorded = self.record.get("steps") if self.state == "finished" else self.entry(self.state, "step")
        logged = [row["step"] for row in self.rows] + [each.step for each in self.recorded]
        return round(number(recorded) or max(logged, default=0))

    @property
    def planned_steps(self) -> int | None:
        """Optimizer steps of the whole run; None for a run from before gptpl recorded them."""
        planned = number(self.record.get("planned_steps"))
        return None if planned is None else round(planned)

    @property
    def tokens_seen(self) -> int:
        """Tokens in the steps made, as far as its files tell."""
        recorded = self.record.get("tokens_seen") if self.state == "finished" else None
        logged = [row.get("train/tokens_seen", 0.0) for row in self.rows]
        logged += [each.tokens_seen for each in self.recorded]
        return round(number(recorded) or max(logged, default=0))

    @cached_property
    def settings(self) -> dict[str, Setting]:
        """What the run learned with, on one level."""
        return flat_settings(self.config)

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """By step; those of runs from before gptpl recorded them are in `metrics.csv`."""
        return _evaluations(self.rows, self.recorded)

    @property
    def best(self) -> Evaluation | None:
        """The evaluation with the lowest validation loss, as `best_by`."""
        return self.best_by(LOSS, "min")

    def best_by(self, metric: str, mode: Mode) -> Evaluation | None:
        """The evaluation with the best finite value of a metric; step 0 does not count."""
        learned = [each for each in self.evaluations if each.step > 0]
        found = [each for each in learned if math.isfinite(each.metrics.get(metric, math.nan))]
        choose = min if mode == "min" else max
        return choose(found, key=lambda each: each.metrics[metric], default=None)

    @property
    def last(self) -> Evaluation | None:
        """The last evaluation."""
        return self.evaluations[-1] if self.evaluations else None

    def entry(self, *names: str) -> Any:
        """The value in `run.json` under nested names, or None."""
        value: Any = self.record
        for name in names:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    def metric(self, name: str) -> float:
        """The last value that was logged, or NaN."""
        found = [each.metrics for each in self.recorded] + [*self.rows]
        return next((metrics[name] for metrics in reversed(found) if name in metrics), math.nan)

    def samples(self) -> list[dict[str, Any]]:
        """The texts that the run sampled, in order, without a torn last line."""
        path = self.path / "samples.jsonl"
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        samples = []
        for line in text.split("\n"):
            with suppress(json.JSONDecodeError):
                samples.append(json.loads(line))
        return [sample for sample in samples if isinstance(sample, dict)]


def change_tags(folder: Path, *, add: Sequence[str] = (), remove: Collection[str] = ()) -> list[str]:
    """Change a run's tags and return them. Raises InputError for a tag that is not a word, or not there."""
    for tag in add:
        if not re.fullmatch(r"\w[\w.:/+-]*", tag):
            raise InputError(f"{tag!r} is not a tag: give a word of letters, digits and -_.:/+")
    run = RunRecord(path=folder, config=read_config(folder), record=read_run_json(folder), rows=[])
    for tag in remove:
        if tag not in run.tags:
            raise InputError(f"{folder} has no tag {tag!r}: its tags are {', '.join(run.tags) or 'none'}")
    tags = [tag for tag in dict.fromkeys([*run.tags, *add]) if tag not in remove]
    if tags != run.tags:
        write_run_json(folder, tags=tags)
    return tags


def started(folder: Path, record: Mapping[str, Any]) -> datetime:
    """When a run was first started, in local time, or else when its settings were written."""
    try:
        return datetime.fromisoformat(str(record.get("started"))).astimezone()
    except (ValueError, OverflowError, OSError):  # no date, or one of the year 1
        return datetime.fromtimestamp((folder / CONFIG_FILE).stat().st_mtime).astimezone()


def number(value: Any) -> float | None:
    """A finite number that is not as large as only damage makes it, or else None."""
    known = isinstance(value, int | float) and -1e18 < value < 1e18
    return float(value) if known else None


def _fits(name: str, value: Any) -> bool:
    """Whether an entry of `run.json` has its type; how a run ended (`stopped`, `failed`) may have any."""
    match name:
        case "command" | "started" | "git_commit" | "notes":
            return isinstance(value, str)
        case "planned_steps" | "steps" | "tokens_seen" | "seconds":
            return number(value) is not None
        case "parameters" | "peak_memory_bytes":
            return isinstance(value, int) and number(value) is not None
        case "versions" | "hardware" | "data" | "tokenizer" | "start" | "metrics" | "performance":
            return isinstance(value, dict)
        case "resumed":
            return isinstance(value, list) and all(isinstance(each, dict) for each in value)
        case "tags":
            return isinstance(value, list)
    return True


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run; False for one that may not be read."""
    try:
        return (folder / CONFIG_FILE).is_file()
    except PermissionError:
        return False


def find_runs(folder: Path, *, depth: int = 99) -> list[Path]:
    """The folder, if it is a run's, or else all runs up to `depth` folders below it, by path.

    Left out are links, hidden folders (runs that are being removed) and, with a warning, unreadable ones.
    """
    if is_run(folder):
        return [folder]
    if depth == 0:
        return []
    try:
        children = sorted(child for child in folder.iterdir() if not child.name.startswith("."))
    except (PermissionError, FileNotFoundError) as error:
        log.warning("%s is left out: %s", folder, error.strerror)
        return []
    below = [child for child in children if child.is_dir() and not child.is_symlink()]
    return [run for child in below for run in find_runs(child, depth=depth - 1)]


def read_run(folder: Path) -> RunRecord:
    """Read a run. Raises RunError for a folder without a run, and for damaged files."""
    return RunRecord(
        path=folder,
        config=read_config(folder),
        record=read_run_json(folder),
        rows=_rows(folder / METRICS_FILE),
        recorded=_recorded(folder / EVALUATIONS_FILE),
    )


def read_config(folder: Path, *, needs: Collection[str] = ()) -> dict[str, Any]:
    """The settings of a run.

    Raises RunError for a folder without a run, for damage, and where a section in `needs`, such as `trainer`,
    is missing: the end of the file may be lost.
    """
    if folder.parent.name == CHECKPOINT_FOLDER and is_run(folder.parent.parent):
        raise RunError(f"{folder} is a checkpoint, not a run folder: give {folder.parent.parent}")
    if not is_run(folder):
        raise RunError(f"{folder} is not a run folder (it has no {CONFIG_FILE}): give one of gptpl train")
    config: dict[str, Any] = with_current_names(read_mapping(folder / CONFIG_FILE, parse_yaml))
    for section in needs:
        if not isinstance(config.get(section), dict):
            raise RunError(f"{folder / CONFIG_FILE} is damaged (it has no section {section}): restore it")
    return config


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write `config.yaml`: every setting with its value, without interpolations."""
    text = yaml.dump(
        dict(config), Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False
    )
    write_atomically(folder / CONFIG_FILE, text)


def read_run_json(folder: Path) -> dict[str, Any]:
    """`run.json` without known entries of a wrong type. Raises RunError for damage."""
    return {name: value for name, value in _raw_run_json(folder).items() if _fits(name, value)}


def recorded_rows(folder: Path) -> Any:
    """The number of rows of a run's data, if `run.json` has it."""
    data = read_run_json(folder).get("data")
    return data.get("rows") if isinstance(data, dict) else None


def write_run_json(folder: Path, *, remove: Collection[str] = (), **entries: Any) -> None:
    """Change entries of `run.json`; a reader sees all changes or none. Raises RunError for damage."""
    kept = {name: value for name, value in _raw_run_json(folder).items() if name not in remove}
    write_atomically(folder / RUN_FILE, json.dumps(kept | entries, indent=2) + "\n")


def _raw_run_json(folder: Path) -> dict[str, Any]:
    path = folder / RUN_FILE
    return read_mapping(path, json.loads) if path.is_file() else {}


# --------------------------------------------------------------------------------------------- YAML and JSON

_DEEPEST, _MOST_ENTRIES = 40, 20_000
"""Limits of a file of a run, which YAML can exceed in a few bytes."""


def parse_yaml(text: str) -> Any:
    """Plain data from YAML, in which, as in OmegaConf, 1e-3 is a number and 2026-01-01 a text.

    Raises ValueError for text that nests too deep, found in the parser's events: libyaml's loader, ten times
    faster than Python's, would end the process.
    """
    depth = 0
    for event in yaml.parse(text, Loader=_SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise ValueError(f"it nests deeper than {_DEEPEST} levels")
    return yaml.load(text, Loader=_SafeLoader)  # noqa: S506 - a SafeLoader


class _SafeLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    pass


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    def ignore_aliases(self, data: Any) -> bool:
        return True


for _class in (_SafeLoader, _Dumper):
    _class.yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in forms if _class is _Dumper or not tag.endswith(":timestamp")]
        for first, forms in _class.yaml_implicit_resolvers.items()
    }
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\d[\d_]*\.?|\.\d)[\d_]*[eE][-+]?\d+$"),
        list("-+0123456789."),
    )


def read_mapping(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """The mapping in a file, by `parse_yaml` or `json.loads`. Raises RunError for anything else."""
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except (*_UNREADABLE, yaml.YAMLError):
        value = None
    if not isinstance(value, dict) or not is_modest(value):
        raise _damaged(path)
    return {str(name): entry for name, entry in value.items()}


def _damaged(path: Path) -> RunError:
    return RunError(f"{path} is damaged: restore it, or leave this run out")


def is_modest(value: Any) -> bool:
    """Whether plain data are nested and numerous as settings may be, also if parts are shared or circular."""
    seen, waiting = 0, [(value, 0)]
    while waiting:
        value, depth = waiting.pop()
        seen += 1
        if depth > _DEEPEST or seen > _MOST_ENTRIES:
            return False
        if isinstance(value, dict | list):
            waiting += [(each, depth + 1) for each in (value.values() if isinstance(value, dict) else value)]
    return True


# ------------------------------------------------------------------------------------------------- metrics


def read_evaluations(folder: Path) -> list[Evaluation]:
    """The evaluations of a run, by step. Raises RunError for damaged files."""
    return _evaluations(_rows(folder / METRICS_FILE), _recorded(folder / EVALUATIONS_FILE))


def _rows(path: Path) -> list[dict[str, float]]:
    """`metrics.csv` without its empty cells."""
    if not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            cells = [row.items() for row in csv.DictReader(file, strict=True)]
        rows = [{name: float(cell) for name, cell in row if cell} for row in cells]
    except (*_UNREADABLE, csv.Error):
        rows = [{}]
    if not all("step" in row for row in rows):
        raise _damaged(path)
    return rows


def _recorded(path: Path) -> list[Evaluation]:
    """`evaluations.jsonl` without a last line that is torn, or is being written."""
    if not path.is_file():
        return []
    try:
        *lines, _ = path.read_bytes().decode("utf-8").split("\n")
        return [
            Evaluation(
                step=int(record["step"]),
                tokens_seen=int(record["tokens_seen"]),
                metrics={str(name): float(value) for name, value in record["metrics"].items()},
            )
            for record in map(json.loads, lines)
        ]
    except _UNREADABLE:
        raise _damaged(path) from None


def _evaluations(rows: Sequence[Mapping[str, float]], recorded: Sequence[Evaluation]) -> list[Evaluation]:
    """The recorded ones, and those of `metrics.csv` from before gptpl recorded them."""
    counted = [(row["step"], row["train/tokens_seen"]) for row in rows if "train/tokens_seen" in row]
    per_step = counted[-1][1] / counted[-1][0] if counted and counted[-1][0] else 0.0
    by_step = {}
    for row in rows:
        if LOSS in row:
            step, tokens_seen = int(row["step"]), row.get("train/tokens_seen", row["step"] * per_step)
            metrics = {name: value for name, value in row.items() if name != "step"}
            by_step[step] = Evaluation(step=step, tokens_seen=round(tokens_seen), metrics=metrics)
    by_step |= {each.step: each for each in recorded}
    return [by_step[step] for step in sorted(by_step)]


def package_version(package: str) -> str | None:
    """The installed version; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def recorded_versions() -> dict[str, str | None]:
    """Of Python, and of the packages that decide what a training does."""
    packages = ("gptpl", "torch", "lightning", "hydra-core", "tiktoken", "numpy")
    return {"python": platform.python_version()} | {name: package_version(name) for name in packages}
