"""The runs on disk, with their losses, tags and sizes.

usage: gptpl runs list [FOLDER]... [sort=date|loss|size] [tag=WORD] [--json]

examples:
  gptpl runs list                        # all below runs/, the newest first, sweeps together
  gptpl runs list runs/sweeps sort=loss  # the best first
  gptpl runs list sort=size              # what to remove when the disk is full
  gptpl runs list tag=paper              # those with a tag
  gptpl runs list --json | jq .run       # a JSON object a line

`state` is finished, stopped (from outside, or by the settings), failed, unfinished (running, or killed) or
damaged; `steps` are those made of those planned; `val loss` is the lowest, in nats per token; `size` is
that of all files, `checkpoints` their part of it.
"""

import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gptpl.cli.arguments import parse_plain as parse
from gptpl.errors import InputError
from gptpl.runs.listing import DEFAULT_FOLDER, SORTS, Listed, disk_use, list_runs
from gptpl.runs.removal import rest_of, rests_below
from gptpl.text import bytes_text, count_text, loss_text, near, one_line, shortened, table, time_text

HEADER = ["run", "state", "started", "steps", "val loss", "tokens", "size", "checkpoints"]
NUMBERS = range(3, len(HEADER))
TAGS_WIDTH = 40


def run(arguments: list[str]) -> int:
    """Prints the table, or a JSON object a line; returns the exit status."""
    tags = [argument.removeprefix("tag=") for argument in arguments if argument.startswith("tag=")]
    given = parse("runs list", arguments, flags=["--json"], settings={"sort": SORTS, "tag": tags})
    folders = given.paths or [DEFAULT_FOLDER]
    for folder in given.paths:
        if not folder.is_dir():
            raise InputError(
                f"{folder} is no folder: give one with runs in it, or none for {DEFAULT_FOLDER}/"
            )
    by = given.settings.get("sort", "date")
    runs = list_runs(folders, by=by, tags=tags)
    if "--json" in given.flags:
        print("".join(json.dumps(_entry(each)) + "\n" for each in runs), end="")
        return 0
    lines = _lines(runs, grouped=by == "date") if runs else []
    print("\n".join([*lines, _total(runs, folders, tags), *map(one_line, _notes(runs, folders))]))
    return 0


def _lines(runs: list[Listed], *, grouped: bool) -> list[str]:
    tags = ["tags"] if any(each.record and each.record.tags for each in runs) else []
    rows, group = [[*HEADER, *tags]], None
    for each in runs:
        sweep = each.sweep if grouped else None
        if sweep is not None and sweep != group:
            name = f"{near(sweep)}: sweep of {count_text(sum(other.sweep == sweep for other in runs), 'run')}"
            rows.append([name, *[""] * (len(rows[0]) - 1)])
        group = sweep
        own = [shortened(", ".join(each.record.tags), TAGS_WIDTH) if each.record else ""] if tags else []
        rows.append([*_row(each, f"  {each.path.name}" if sweep else near(each.path)), *own])
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


def _total(runs: Sequence[Listed], folders: Sequence[Path], tags: Sequence[str]) -> str:
    if not runs:
        where = ", ".join(map(str, folders))
        if tags:
            return one_line(f"no runs in {where} with {' and '.join(f'tag={tag}' for tag in tags)}")
        return f"no runs in {where}: gptpl train makes one (gptpl train experiment=quick, in seconds)"
    total = sum(each.use.total for each in runs)
    checkpoints = sum(sum(each.use.checkpoints.values()) for each in runs)
    return (
        f"{count_text(len(runs), 'run')}, {bytes_text(total)}, of which checkpoints {bytes_text(checkpoints)}"
    )


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
            "tags": record.tags,
            "notes": record.notes,
        }
    sizes = {"bytes": each.use.total, "checkpoint_bytes": sum(each.use.checkpoints.values())}
    return entry | {"sweep": near(each.sweep) if each.sweep else None} | sizes
