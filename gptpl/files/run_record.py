"""One training run as its folder tells it: settings, record, evaluations, samples."""

import csv
import itertools
import json
import logging
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import yaml

from gptpl.errors import InputError
from gptpl.files.durable import write_atomically
from gptpl.files.run_settings import Setting, flat_settings, with_current_names

log = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
RUN_FILE = "run.json"
METRICS_FILE = "metrics.csv"
EVALUATIONS_FILE = "evaluations.jsonl"

State = Literal["finished", "stopped", "failed", "unfinished"]
"""`unfinished`: still running, or ended without a chance to say why."""

Mode = Literal["min", "max"]
"""Whether the lowest or the highest value of a metric is its best."""
LOSS = "val/loss"


_LARGEST = 1e18
_DEEPEST, _MOST_ENTRIES = 40, 20_000
"""Of a file of a run."""
_SHALLOW = 2000
_BRACKETS = {"[": 1, "{": 1, "]": -1, "}": -1}

_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError)
"""What parsers raise over damaged text."""


class RunError(InputError):
    """A folder that holds no run, or a file of a run that cannot be read."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured after a step, in evaluation mode; losses in nats per token, NaN if not measured."""

    step: int
    tokens_seen: int
    train_loss: float
    val_loss: float
    metrics: Mapping[str, float]
    """All of them by name."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a run's folder holds: its settings, `run.json`, and what was measured.

    Attributes:
        rows: of `metrics.csv`, cells that are empty left out; none without that logger.
        recorded: of `evaluations.jsonl`; none of a run from before gptpl wrote it.
    """

    path: Path
    config: Mapping[str, Any]
    record: Mapping[str, Any]
    rows: Sequence[Mapping[str, float]]
    recorded: Sequence[Evaluation] = ()

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
        return started(self.path, self.record)

    @property
    def tags(self) -> list[str]:
        """Words that its user gave it: those of `run.json`, where changes are kept, or of its settings."""
        tags = self.record["tags"] if "tags" in self.record else self.config.get("tags")
        return [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []

    @property
    def notes(self) -> str:
        """What its user wrote about it, from where the tags are."""
        notes = self.record.get("notes", self.config.get("notes"))
        return notes if isinstance(notes, str) else ""

    @property
    def steps(self) -> int:
        """The optimizer steps that it has made, as far as its files say."""
        recorded = self.record.get("steps") if self.state == "finished" else self.entry(self.state, "step")
        logged = max((row["step"] for row in self.rows), default=0)
        return round(number(recorded) or max([logged, *(each.step for each in self.recorded)]))

    @property
    def planned_steps(self) -> int | None:
        """The optimizer steps of the whole run; None where an older gptpl did not record them."""
        planned = number(self.record.get("planned_steps"))
        return None if planned is None else round(planned)

    @property
    def tokens_seen(self) -> int:
        """The tokens in its steps, as far as its files say."""
        recorded = self.record.get("tokens_seen") if self.state == "finished" else None
        logged = max((row.get("train/tokens_seen", 0.0) for row in self.rows), default=0)
        return round(number(recorded) or max([logged, *(each.tokens_seen for each in self.recorded)]))

    @cached_property
    def settings(self) -> dict[str, Setting]:
        """What the run learned with, on one level."""
        return flat_settings(self.config)

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """All of them, by step."""
        return _evaluations(self.rows, self.recorded)

    @property
    def best(self) -> Evaluation | None:
        """The evaluation with the lowest validation loss, as `best_by`."""
        return self.best_by(LOSS, "min")

    def best_by(self, metric: str, mode: Mode) -> Evaluation | None:
        """The evaluation after step 0, when nothing is learned yet, with the best value of a metric."""
        sign = 1 if mode == "min" else -1
        measured = [each for each in self.evaluations if each.step > 0]
        finite = [each for each in measured if math.isfinite(each.metrics.get(metric, math.nan))]
        return min(finite, key=lambda each: sign * each.metrics[metric]) if finite else None

    @property
    def last(self) -> Evaluation | None:
        """The last evaluation."""
        return self.evaluations[-1] if self.evaluations else None

    def entry(self, *names: str) -> Any:
        """What `run.json` holds under these names, one below the other; None where there is nothing."""
        value: Any = self.record
        for name in names:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    def metric(self, name: str) -> float:
        """The last value that was logged, NaN where there is none."""
        logged = (row[name] for row in reversed(self.rows) if name in row)
        recorded = (each.metrics[name] for each in reversed(self.recorded) if name in each.metrics)
        return next(itertools.chain(logged, recorded), math.nan)

    def samples(self) -> list[dict[str, Any]]:
        """The texts that the run sampled, in its order; a last line that is torn is left out."""
        path = self.path / "samples.jsonl"
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        samples = []
        for line in text.split("\n"):
            with suppress(json.JSONDecodeError):
                samples.append(json.loads(line))
        return [sample for sample in samples if isinstance(sample, dict)]


def change_tags(folder: Path, *, add: Sequence[str] = (), remove: Collection[str] = ()) -> list[str]:
    """Changes a run's tags and returns them. Raises InputError for one that is no word, or not there."""
    for tag in add:
        if not re.fullmatch(r"\w[\w.:/+-]*", tag):
            raise InputError(f"{tag!r} is no tag: give a word of letters, digits and -_.:/+")
    run = RunRecord(path=folder, config=read_config(folder), record=read_run_json(folder), rows=[])
    for tag in remove:
        if tag not in run.tags:
            raise InputError(f"{folder} has no tag {tag!r}: its tags are {', '.join(run.tags) or 'none'}")
    tags = [tag for tag in dict.fromkeys([*run.tags, *add]) if tag not in remove]
    if tags != run.tags:
        write_run_json(folder, tags=tags)
    return tags


def started(folder: Path, record: Mapping[str, Any]) -> datetime:
    """When a run was first started, by its `run.json`, or else when its settings were written."""
    try:
        return datetime.fromisoformat(str(record.get("started"))).astimezone()
    except (ValueError, OverflowError, OSError):  # no date, or one of the year 1
        return datetime.fromtimestamp((folder / CONFIG_FILE).stat().st_mtime).astimezone()


def number(value: Any) -> float | None:
    """The value, if it is a number, finite and not as large as only damage makes it."""
    known = isinstance(value, int | float) and -_LARGEST < value < _LARGEST
    return float(value) if known else None


_ENTRIES: Mapping[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("command", "started", "git_commit", "notes"), lambda value: isinstance(value, str)),
    **dict.fromkeys(
        ("planned_steps", "steps", "tokens_seen", "seconds"), lambda value: number(value) is not None
    ),
    **dict.fromkeys(
        ("parameters", "peak_memory_bytes"),
        lambda value: isinstance(value, int) and number(value) is not None,
    ),
    **dict.fromkeys(
        ("versions", "hardware", "data", "tokenizer", "start", "metrics"),
        lambda value: isinstance(value, dict),
    ),
    "resumed": lambda value: isinstance(value, list) and all(isinstance(each, dict) for each in value),
    "tags": lambda value: isinstance(value, list),
}
"""What `run.json` may hold, and what each entry must be to count; how a run ended counts in any form."""


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run, as far as one may look into it."""
    try:
        return (folder / CONFIG_FILE).is_file()
    except PermissionError:
        return False


def find_runs(folder: Path, *, depth: int = 99) -> list[Path]:
    """The folder, if it is a run's, or else all runs up to `depth` folders below it, by path.

    Links are not followed; hidden folders are left out, as those of runs that are being removed, and, with a
    warning, those that may not be read.
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
    """Reads a run. Raises RunError where the folder is none, or one of its files is damaged."""
    return RunRecord(
        path=folder,
        config=read_config(folder),
        record=read_run_json(folder),
        rows=_rows(folder / METRICS_FILE),
        recorded=_recorded(folder / EVALUATIONS_FILE),
    )


def read_config(folder: Path, *, needs: Collection[str] = ()) -> dict[str, Any]:
    """The settings of a run. Raises RunError for a folder without a run, and for damage.

    `needs` are sections such as `trainer`: without one the file counts as damaged, its end may be lost.
    """
    if not is_run(folder):
        raise RunError(f"{folder} is no run folder (it has no {CONFIG_FILE}): give one that gptpl train made")
    config: dict[str, Any] = with_current_names(read_mapping(folder / CONFIG_FILE, parse_yaml))
    for section in needs:
        if not isinstance(config.get(section), dict):
            raise RunError(f"{folder / CONFIG_FILE} is damaged (it has no section {section}): restore it")
    return config


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """`config.yaml`: every setting with its value, without interpolations."""
    text = yaml.dump(
        dict(config), Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False
    )
    write_atomically(folder / CONFIG_FILE, text)


def read_run_json(folder: Path) -> dict[str, Any]:
    """What `run.json` holds, known entries only where they have their type. Raises RunError for damage."""
    raw = _raw_run_json(folder).items()
    return {name: value for name, value in raw if name not in _ENTRIES or _ENTRIES[name](value)}


def write_run_json(folder: Path, *, remove: Collection[str] = (), **entries: Any) -> None:
    """Changes entries of `run.json`, of which a reader sees all or none. Raises RunError for damage."""
    kept = {name: value for name, value in _raw_run_json(folder).items() if name not in remove}
    write_atomically(folder / RUN_FILE, json.dumps(kept | entries, indent=2) + "\n")


def _raw_run_json(folder: Path) -> dict[str, Any]:
    path = folder / RUN_FILE
    return read_mapping(path, json.loads) if path.is_file() else {}


def parse_yaml(text: str) -> Any:
    """Plain data from YAML, by libyaml where that is there: ten times faster, which a list of runs feels.

    As OmegaConf has it, 1e-3 is a number and 2026-01-01 a text. Raises ValueError or RecursionError for text
    that nests too deep: libyaml, which would end the process, only gets what cannot.
    """
    shallow = sum(map(text.count, "[{-?")) < _SHALLOW and len(text) < _SHALLOW**2
    if not shallow and max(accumulate(_BRACKETS.get(letter, 0) for letter in text)) > _SHALLOW // 10:
        raise ValueError("too many brackets are open")  # over which Python takes seconds
    return yaml.load(text, Loader=_FastSafeLoader if shallow else _SafeLoader)  # noqa: S506 - both are safe


class _SafeLoader(yaml.SafeLoader):  # type: ignore[misc]
    pass


class _FastSafeLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    pass


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    def ignore_aliases(self, data: Any) -> bool:
        return True


for _class in (_SafeLoader, _FastSafeLoader, _Dumper):
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
    """The mapping in a file, by `parse_yaml` or `json.loads`. Raises RunError where there is none.

    Damaged is also what is deeper or larger than any file of a run: YAML can be both in a few bytes.
    """
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except (*_UNREADABLE, yaml.YAMLError):
        value = None
    if not isinstance(value, dict) or not _is_modest(value):
        raise RunError(f"{path} is damaged: restore it, or leave this run out")
    return {str(name): entry for name, entry in value.items()}


def _is_modest(value: Any) -> bool:
    seen, waiting = 0, [(value, 0)]
    while waiting:
        value, depth = waiting.pop()
        seen += 1
        if depth > _DEEPEST or seen > _MOST_ENTRIES:
            return False
        if isinstance(value, dict | list):
            inner = value.values() if isinstance(value, dict) else value
            waiting += [(each, depth + 1) for each in inner]
    return True


def _rows(path: Path) -> list[dict[str, float]]:
    if not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            cells = [row.items() for row in csv.DictReader(file, strict=True)]
        rows = [{name: float(cell) for name, cell in row if cell} for row in cells]
    except (OSError, ValueError, TypeError, AttributeError, csv.Error):
        rows = [{}]
    if not all("step" in row for row in rows):
        raise RunError(f"{path} is no whole table of numbers: restore it, or leave this run out")
    return rows


def read_evaluations(folder: Path) -> list[Evaluation]:
    """A run's evaluations alone, by step. Raises RunError where a file is damaged."""
    return _evaluations(_rows(folder / METRICS_FILE), _recorded(folder / EVALUATIONS_FILE))


def _evaluations(rows: Sequence[Mapping[str, float]], recorded: Sequence[Evaluation]) -> list[Evaluation]:
    """Those of the run's own record, and those of `metrics.csv` from before gptpl wrote one."""
    known = [(row["step"], row["train/tokens_seen"]) for row in rows if "train/tokens_seen" in row]
    per_step = known[-1][1] / known[-1][0] if known and known[-1][0] else 0.0
    every = {}
    for row in rows:
        if LOSS in row:
            metrics = {name: value for name, value in row.items() if name != "step"}
            step, tokens_seen = int(row["step"]), row.get("train/tokens_seen", row["step"] * per_step)
            every[step] = _evaluation(step, round(tokens_seen), metrics)
    every |= {each.step: each for each in recorded}
    return [every[step] for step in sorted(every)]


def _recorded(path: Path) -> list[Evaluation]:
    """The evaluations in a file of them; a last line that is torn, or is being written, is left out."""
    if not path.is_file():
        return []
    try:
        *lines, _ = path.read_bytes().decode("utf-8").split("\n")
        found = []
        for record in map(json.loads, lines):
            metrics = {str(name): float(value) for name, value in record["metrics"].items()}
            found.append(_evaluation(int(record["step"]), int(record["tokens_seen"]), metrics))
        return found
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise RunError(f"{path} is damaged: restore it, or leave this run out") from None


def _evaluation(step: int, tokens_seen: int, metrics: Mapping[str, float]) -> Evaluation:
    return Evaluation(
        step=step,
        tokens_seen=tokens_seen,
        train_loss=metrics.get("eval/train_loss", math.nan),
        val_loss=metrics.get(LOSS, math.nan),
        metrics=metrics,
    )
