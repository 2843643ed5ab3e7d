"""Runs whose losses can be compared, ranked by the best validation loss."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptpl.records.run_record import RunRecord
from gptpl.records.settings import Setting, differing
from gptpl.report.failures import Failure
from gptpl.report.palette import GREY, colour

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
class Entry:
    """A run, or a trial that left none.

    Attributes:
        label: its rank, with its group's letter where there are several groups; empty without a loss.
        name: its folder, as short as it can be among the others.
        run: None for a trial that left no run.
        loss: best validation loss in nats per token; NaN where there is none.
        colour: of its curve; grey beyond the best ones and without a loss.
        state: how it ended.
        error: what went wrong, if that is known.
        overrides: of a trial that left no run, by which it differs from the others.
    """

    label: str
    name: str
    run: RunRecord | None
    loss: float
    colour: str
    state: str
    error: str
    overrides: str = ""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Entries with the same text, split and tokenizer, the best first, those without a loss last.

    Attributes:
        title: text and tokenizer; empty where all entries are of one group.
        entries: the ranking.
        settings: names of those that differ between the runs of the group.
    """

    title: str
    entries: Sequence[Entry]
    settings: Sequence[str]

    @property
    def ranked(self) -> list[Entry]:
        """Those with a loss."""
        return [entry for entry in self.entries if math.isfinite(entry.loss)]

    @property
    def runs(self) -> list[RunRecord]:
        """Of all entries that have one, in their order."""
        return [entry.run for entry in self.entries if entry.run is not None]

    def differing_settings(self, entry: Entry) -> dict[str, Setting | None]:
        """Those of an entry; None where it has no such setting."""
        found = entry.run.settings if entry.run is not None else {}
        return {name: found.get(name) for name in self.settings}


def groups(records: Sequence[RunRecord], failures: Sequence[Failure]) -> list[Group]:
    """Everything in groups; the group with the most runs first.

    What has no loss and does not tell its data either, is with the others where those are of one group.
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
    if len(kinds) <= 1 and not (kinds and any(run.best is not None for run in unknown)):
        everything = [*(kinds[0] if kinds else []), *unknown]
        return [_group("", "", everything, left, names=names, errors=errors)] if everything or left else []
    letters = [chr(ord("A") + place) if place < 26 else f"Z{place}-" for place in range(len(kinds))]
    made = [
        _group(f"Group {letter}: {_data_title(runs[0])}", letter, runs, [], names=names, errors=errors)
        for letter, runs in zip(letters, kinds, strict=True)
    ]
    if unknown or left:
        made.append(
            _group(
                "Data not known: this order may mean nothing", "?", unknown, left, names=names, errors=errors
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
) -> Group:
    order = sorted(runs, key=lambda run: (run.best is None, best_loss(run), run.path.as_posix()))
    entries = [
        _entry(run, place, letter, names[run.path], errors.get(run.path.absolute()))
        for place, run in enumerate(order)
    ]
    entries += [
        Entry(
            label="",
            name=names[failure.folder],
            run=None,
            loss=math.nan,
            colour=GREY,
            state=failure.state,
            error=failure.error,
            overrides=failure.overrides,
        )
        for failure in left
    ]
    return Group(title=title, entries=entries, settings=_settings(order))


def _entry(run: RunRecord, place: int, letter: str, name: str, failure: Failure | None) -> Entry:
    loss = best_loss(run)
    ranked = math.isfinite(loss)
    return Entry(
        label=f"{letter}{place + 1}" if ranked else "",
        name=name,
        run=run,
        loss=loss,
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


def best_loss(run: RunRecord) -> float:
    """Nats per token; NaN where none was measured."""
    return math.nan if run.best is None else run.best.val_loss


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
