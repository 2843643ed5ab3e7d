"""Runs whose losses can be compared, ranked, and what each reached and cost."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptpl.files.figures import GREY, colour
from gptpl.records.run_record import LOSS, Mode, RunRecord
from gptpl.records.settings import Setting, differing
from gptpl.reports.finding import Failure
from gptpl.reports.texts import digits, gigabytes, whole
from gptpl.text import NONE, duration_text

ORDER = ("init", "model", "task", "optimizer", "scheduler", "data", "tokenizer", "seed", "trainer")
"""Settings of these parts come first, in this order: what is learned before how long and how watched."""
SPLIT_SETTINGS = (
    "train_ratio",
    "train_share",
    "val_share",
    "test_share",
    "shuffle",
    "split_seed",
    "stratified",
    "balance",
    "duplicates",
    "mask_instruction",
    "too_long",
)
"""Of `data`: with another one, other tokens are validated with."""
NOT_SETTINGS = ("name",)
"""Labels, by which nothing is learnt otherwise."""


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """The metric of an evaluation by whose best value runs are ranked."""

    metric: str = LOSS
    mode: Mode = "min"

    @property
    def title(self) -> str:
        """What the reader calls the metric."""
        return "validation loss" if self.metric == LOSS else self.metric

    @property
    def sign(self) -> int:
        """What makes a lower value the better one."""
        return 1 if self.mode == "min" else -1

    def best(self, run: RunRecord) -> float:
        """The run's best value after the first step; NaN where none was measured."""
        found = run.best_by(self.metric, self.mode)
        return math.nan if found is None else found.metrics[self.metric]


BY_LOSS = Criterion()


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A run, or a trial that left none.

    Attributes:
        label: its rank, with its group's letter where there are several groups; empty without a value.
        name: its folder, as short as it can be among the others.
        run: None for a trial that left no run.
        value: best of the metric that runs are ranked by; NaN where there is none.
        colour: of its curve; grey beyond the best ones and without a value.
        state: how it ended.
        error: what went wrong, if that is known.
        overrides: of a trial that left no run, by which it differs from the others.
    """

    label: str
    name: str
    run: RunRecord | None
    value: float
    colour: str
    state: str
    error: str
    overrides: str = ""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Entries with the same text, split and tokenizer, the best first, those without a value last.

    Attributes:
        title: text and tokenizer; empty where all entries are of one group.
        entries: the ranking.
        settings: names of those that differ between the runs of the group.
        by: what the ranking is by.
    """

    title: str
    entries: Sequence[Entry]
    settings: Sequence[str]
    by: Criterion

    @property
    def ranked(self) -> list[Entry]:
        """Those with a value."""
        return [entry for entry in self.entries if math.isfinite(entry.value)]

    @property
    def runs(self) -> list[RunRecord]:
        """Of all entries that have one, in their order."""
        return [entry.run for entry in self.entries if entry.run is not None]

    def differing_settings(self, entry: Entry) -> dict[str, Setting | None]:
        """Those of an entry; None where it has no such setting."""
        found = entry.run.settings if entry.run is not None else {}
        return {name: found.get(name) for name in self.settings}


def groups(records: Sequence[RunRecord], failures: Sequence[Failure], by: Criterion = BY_LOSS) -> list[Group]:
    """Everything in groups; the group with the most runs first.

    What has no value and does not tell its data either, is with the others where those are of one group.
    """
    names = _names([*(run.path for run in records), *(failure.folder for failure in failures)])
    errors = {failure.folder.absolute(): failure for failure in failures}
    by_data: dict[str, list[RunRecord]] = {}
    for run in records:
        by_data.setdefault(_data_key(run), []).append(run)
    unknown = by_data.pop("", [])
    kinds = sorted(by_data.values(), key=lambda runs: -len(runs))
    known = {run.path.absolute() for run in records}
    left = [failure for failure in failures if failure.folder.absolute() not in known]
    if len(kinds) <= 1 and not (kinds and any(math.isfinite(by.best(run)) for run in unknown)):
        everything = [*(kinds[0] if kinds else []), *unknown]
        one = _group("", "", everything, left, names=names, errors=errors, by=by)
        return [one] if one.entries else []
    letters = [chr(ord("A") + place) if place < 26 else f"Z{place}-" for place in range(len(kinds))]
    made = [
        _group(f"Group {letter}: {_data_title(runs[0])}", letter, runs, [], names=names, errors=errors, by=by)
        for letter, runs in zip(letters, kinds, strict=True)
    ]
    if unknown or left:
        made.append(
            _group(
                "Data not known: this order may mean nothing",
                "?",
                unknown,
                left,
                names=names,
                errors=errors,
                by=by,
            )
        )
    return made


def _group(
    title: str,
    letter: str,
    runs: Sequence[RunRecord],
    left: Sequence[Failure],
    *,
    names: dict[Path, str],
    errors: dict[Path, Failure],
    by: Criterion,
) -> Group:
    values = {run.path: by.best(run) for run in runs}

    def rank(run: RunRecord) -> tuple[bool, float, str]:
        value = values[run.path]
        missing = math.isnan(value)
        return missing, 0.0 if missing else by.sign * value, run.path.as_posix()

    order = sorted(runs, key=rank)
    entries = [
        _entry(run, values[run.path], place, letter, names[run.path], errors.get(run.path.absolute()))
        for place, run in enumerate(order)
    ]
    entries += [
        Entry(
            label="",
            name=names[failure.folder],
            run=None,
            value=math.nan,
            colour=GREY,
            state=failure.state,
            error=failure.error,
            overrides=failure.overrides,
        )
        for failure in left
    ]
    return Group(title=title, entries=entries, settings=_settings(order), by=by)


def _entry(
    run: RunRecord, value: float, place: int, letter: str, name: str, failure: Failure | None
) -> Entry:
    ranked = math.isfinite(value)
    return Entry(
        label=f"{letter}{place + 1}" if ranked else "",
        name=name,
        run=run,
        value=value,
        colour=colour(place) if ranked else GREY,
        state="failed" if failure is not None and run.state == "unfinished" else run.state,
        error=_error(run) or (failure.error if failure is not None else ""),
    )


def _settings(runs: Sequence[RunRecord]) -> list[str]:
    """Names of those that differ, ordered by their parts."""

    def part(name: str) -> int:
        first = name.partition(".")[0]
        return ORDER.index(first) if first in ORDER else len(ORDER)

    names = differing([run.settings for run in runs])
    return sorted((name for name in names if name not in NOT_SETTINGS), key=part)


def _part(run: RunRecord, name: str) -> dict[str, Any]:
    part = run.record.get(name)
    return part if isinstance(part, dict) else {}


def _data_key(run: RunRecord) -> str:
    """The same for runs that validate with the same tokens; empty where the run does not tell."""
    data, tokenizer = _part(run, "data").get("sha256"), _part(run, "tokenizer").get("sha256")
    return repr((data, tokenizer, _split_settings(run))) if data or tokenizer else ""


def _split_settings(run: RunRecord) -> dict[str, Any]:
    """What decides, beside the text, which tokens are validated with; as far as the run's data have it."""
    found = {name: run.settings.get(f"data.{name}") for name in SPLIT_SETTINGS}
    return {name: value for name, value in found.items() if value is not None}


def _data_title(run: RunRecord) -> str:
    data, tokenizer = _part(run, "data"), _part(run, "tokenizer")
    sha = str(data.get("sha256", "?"))[:8]
    settings = _split_settings(run) or {"train_ratio": "?"}
    split = "".join(f", {name} {value}" for name, value in settings.items())
    tokens = tokenizer.get("vocab_size", "?")
    return (
        f"text {data.get('name', '?')} ({sha}), tokenizer {tokenizer.get('name', '?')} of {tokens} tokens"
        f"{split}"
    )


def _error(run: RunRecord) -> str:
    for state, key in (("failed", "error"), ("stopped", "reason")):
        if run.state == state:
            part = _part(run, state)
            at = f" (after step {part['step']})" if "step" in part else ""
            return f"{part.get(key, '')}{at}".strip()
    return ""


def _names(folders: Sequence[Path]) -> dict[Path, str]:
    """Each folder by what comes after what all have in common; a single one with the folder around it."""
    absolute = {folder: folder.absolute() for folder in folders}
    around = [set(path.parents) for path in absolute.values()]
    common = max(set.intersection(*around), key=lambda path: len(path.parts)) if around else Path()
    if len(set(absolute.values())) == 1:
        common = common.parent
    names = {folder: path.relative_to(common).as_posix() for folder, path in absolute.items()}
    return {folder: f"run {name}" if name.isdecimal() else name for folder, name in names.items()}


# --- what a run reached and cost ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Measures:
    """Of one run.

    Attributes:
        loss: best validation loss, nats per token.
        last_loss: the last validation loss.
        tokens: seen in training.
        seconds: of training; of a resumed run without the parts that were killed.
        resumed: whether it was resumed.
        tokens_per_second: the median over the logged steps.
        peak_memory_bytes: of the process or the CUDA device.
        parameters: of the model.
    """

    loss: float
    last_loss: float
    tokens: float
    seconds: float
    resumed: bool
    tokens_per_second: float
    peak_memory_bytes: float
    parameters: float

    @property
    def perplexity(self) -> float:
        """Of the best validation loss."""
        return math.exp(self.loss) if self.loss < 700 else math.nan

    def cells(self) -> dict[str, str]:
        """Column -> text."""
        return {
            "validation loss": digits(self.loss),
            "perplexity": digits(self.perplexity),
            "last loss": digits(self.last_loss),
            "tokens": whole(self.tokens),
            "time": duration_text(self.seconds)
            + ("*" if self.resumed and math.isfinite(self.seconds) else ""),
            "tokens/s": digits(self.tokens_per_second),
            "peak memory": gigabytes(self.peak_memory_bytes),
            "parameters": whole(self.parameters),
        }


NO_CELLS = dict.fromkeys(
    (
        "validation loss",
        "perplexity",
        "last loss",
        "tokens",
        "time",
        "tokens/s",
        "peak memory",
        "parameters",
    ),
    NONE,
)
"""The columns, for what left no run."""


def measures(run: RunRecord) -> Measures:
    """Reads them from the run's files."""
    speeds = [row["train/tokens_per_second"] for row in run.rows if "train/tokens_per_second" in row]
    tokens = [row["train/tokens_seen"] for row in run.rows if "train/tokens_seen" in row]
    seen = max([*tokens, *(each.tokens_seen for each in run.evaluations)], default=math.nan)
    return Measures(
        loss=BY_LOSS.best(run),
        last_loss=math.nan if run.last is None else run.last.val_loss,
        tokens=_recorded(run, "tokens_seen") if "tokens_seen" in run.record else seen,
        seconds=_recorded(run, "seconds"),
        resumed=bool(run.record.get("resumed")),
        tokens_per_second=statistics.median(speeds) if speeds else math.nan,
        peak_memory_bytes=_recorded(run, "peak_memory_bytes"),
        parameters=_recorded(run, "parameters"),
    )


def _recorded(run: RunRecord, name: str) -> float:
    value = run.record.get(name)
    return float(value) if isinstance(value, int | float) else math.nan
