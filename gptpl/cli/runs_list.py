"""`gptpl runs list`: the runs on disk, a line each."""

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptpl.cli.plain_arguments import parse
from gptpl.cli.readable import bytes_text, count_text, loss_text, near, time_text
from gptpl.cli.text_table import table
from gptpl.errors import InputError
from gptpl.records.disk import DiskUse, disk_use
from gptpl.records.removal import rest_of, rests_below
from gptpl.records.run_record import RunError, RunRecord, find_runs, read_run
from gptpl.records.sweep_folder import is_sweep, trial_order

DEFAULT_FOLDER = Path("runs")
HEADER = ["run", "state", "started", "steps", "val loss", "tokens", "size", "checkpoints"]
NUMBERS = range(3, len(HEADER))
SORTS = ("date", "loss", "size")


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A run with its size; `record` is None where `damage` says why it cannot be read."""

    path: Path
    use: DiskUse
    record: RunRecord | None
    damage: str = ""

    @property
    def started_seconds(self) -> float:
        """Since 1970; of a damaged run, when it was last written."""
        return self.record.started.timestamp() if self.record else self.use.newest

    @property
    def best_loss(self) -> float:
        """The lowest validation loss, infinite where there is none."""
        return self.record.best.val_loss if self.record and self.record.best else float("inf")


def run(arguments: list[str]) -> int:
    """Prints the table, or a JSON object a line; returns the exit status."""
    given = parse("runs list", arguments, flags=["--json"], settings={"sort": SORTS})
    folders = given.paths or [DEFAULT_FOLDER]
    for folder in given.paths:
        if not folder.is_dir():
            raise InputError(
                f"{folder} is no folder: give one with runs in it, or none for {DEFAULT_FOLDER}/"
            )
    runs = _sorted(list(_listed(folders)), given.settings.get("sort", "date"))
    if "--json" in given.flags:
        print("".join(json.dumps(_entry(each)) + "\n" for each in runs), end="")
        return 0
    lines = _lines(runs, grouped=given.settings.get("sort", "date") == "date") if runs else []
    print("\n".join([*lines, *_total(runs, folders), *_notes(runs, folders)]))
    return 0


def _listed(folders: Sequence[Path]) -> Iterator[Listed]:
    paths = [path for folder in folders if folder.is_dir() for path in find_runs(folder)]
    for path in {path.resolve(): path for path in paths}.values():
        use = disk_use(path)
        try:
            yield Listed(path=path, use=use, record=read_run(path))
        except RunError as error:
            if use.files:  # otherwise it was removed while we looked
                yield Listed(path=path, use=use, record=None, damage=str(error))


def _sorted(runs: list[Listed], by: str) -> list[Listed]:
    """By loss the best first, by size the largest, by date the newest: there a sweep counts as one."""
    if by == "loss":
        return sorted(runs, key=lambda each: (each.best_loss, -each.started_seconds))
    if by == "size":
        return sorted(runs, key=lambda each: -each.use.total)
    newest: dict[Path, float] = {}
    for each in runs:
        newest[_group(each)] = max(newest.get(_group(each), 0.0), each.started_seconds)
    return sorted(runs, key=lambda each: (-newest[_group(each)], _group(each), trial_order(each.path)))


def _group(each: Listed) -> Path:
    return each.path.parent if is_sweep(each.path.parent) else each.path


def _lines(runs: list[Listed], *, grouped: bool) -> list[str]:
    rows, group = [HEADER], None
    for each in runs:
        sweep = _group(each) if grouped and _group(each) != each.path else None
        if sweep is not None and sweep != group:
            rows.append(_sweep_row(sweep, [other for other in runs if other.path.parent == sweep]))
        group = sweep
        rows.append(_row(each, f"  {each.path.name}" if sweep else near(each.path)))
    return table(rows, right=NUMBERS)


def _row(each: Listed, name: str) -> list[str]:
    size = bytes_text(each.use.total)
    checkpoints = bytes_text(sum(each.use.checkpoints.values()))
    record = each.record
    if record is None:
        return [name, "damaged", "-", "-", "-", "-", size, checkpoints]
    plan = "" if record.planned_steps is None else f"/{record.planned_steps:,}"
    return [
        name,
        record.state,
        time_text(record.started),
        f"{record.steps:,}{plan}",
        loss_text(record.best.val_loss if record.best else None),
        f"{record.tokens_seen:,}",
        size,
        checkpoints,
    ]


def _sweep_row(sweep: Path, trials: list[Listed]) -> list[str]:
    name = f"{near(sweep)}: sweep of {count_text(len(trials), 'run')}"
    return [name, *[""] * (len(HEADER) - 1)]


def _total(runs: Sequence[Listed], folders: Sequence[Path]) -> list[str]:
    if not runs:
        where = ", ".join(str(folder) for folder in folders)
        return [f"no runs in {where}: gptpl train makes one (gptpl train experiment=quick, in seconds)"]
    total = sum(each.use.total for each in runs)
    checkpoints = sum(sum(each.use.checkpoints.values()) for each in runs)
    return [
        f"{count_text(len(runs), 'run')}, {bytes_text(total)}, of which checkpoints {bytes_text(checkpoints)}"
    ]


def _notes(runs: Sequence[Listed], folders: Sequence[Path]) -> Iterator[str]:
    """What is wrong, a line each."""
    for each in runs:
        if each.damage:
            yield f"damaged: {each.damage}"
    for removed in {path for folder in folders if folder.is_dir() for path in rests_below(folder)}:
        size, name = bytes_text(disk_use(rest_of(removed)).total), near(removed)
        yield f"half removed: {name} ({size}): gptpl runs rm {shlex.quote(name)} removes the rest"


def _entry(each: Listed) -> dict[str, Any]:
    entry: dict[str, Any] = {"run": near(each.path), "state": "damaged", "error": each.damage}
    record = each.record
    if record is not None:
        best = record.best
        entry = {
            "run": near(each.path),
            "state": record.state,
            "started": record.started.isoformat(timespec="seconds"),
            "steps": record.steps,
            "planned_steps": record.planned_steps,
            "best_val_loss": best.val_loss if best else None,
            "best_step": best.step if best else None,
            "tokens_seen": record.tokens_seen,
        }
    sizes = {"bytes": each.use.total, "checkpoint_bytes": sum(each.use.checkpoints.values())}
    return entry | {"sweep": near(_group(each)) if _group(each) != each.path else None} | sizes
