"""List the runs on disk with their losses, tags and sizes.

usage: gptpl runs list [FOLDER]... [sort=date|loss|size] [tag=WORD] [--json]

examples:
  gptpl runs list                        # all in runs/, the newest first, trials under their sweep
  gptpl runs list runs/sweeps sort=loss  # the lowest loss first
  gptpl runs list sort=size              # the largest first
  gptpl runs list tag=paper              # with a tag; several: tag=a tag=b
  gptpl runs list --json | jq .run       # a JSON object on each line

`state` is finished, stopped (from outside, or by the settings), failed, unfinished (running, or killed) or
damaged; `steps` are completed/planned; `val loss` is the lowest, in nats per token; `size` is that of all
files, `checkpoints` is included in it.
"""

import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from gptpl.cli.arguments import parse_plain
from gptpl.cli.run_facts import entry
from gptpl.errors import InputError
from gptpl.runs.listing import SORTS, Listed, disk_use, list_runs, runs_folder
from gptpl.runs.removal import rest_of, rests_below
from gptpl.text import bytes_text, count_text, loss_text, near, one_line, shortened, table, time_text

HEADER = ["run", "state", "started", "steps", "val loss", "tokens", "size", "checkpoints"]


def run(arguments: list[str]) -> int:
    """Prints the table, or JSON lines; returns the exit status."""
    tags = [argument.removeprefix("tag=") for argument in arguments if argument.startswith("tag=")]
    given = parse_plain("runs list", arguments, flags=["--json"], settings=["sort", "tag"])
    folders = given.paths or [runs_folder()]
    for folder in given.paths:
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder: give one, or none for {near(runs_folder())}/")
    by = given.settings.get("sort", "date")
    if by not in SORTS:
        raise InputError(f"sort={by} is unknown: choose one of {', '.join(SORTS)}")
    runs = list_runs(folders, by=by, tags=tags)
    if given.flags:
        print("".join(f"{_json(each)}\n" for each in runs), end="")
        return 0
    lines = _lines(runs, grouped=by == "date") if runs else []
    print("\n".join([*lines, _total(runs, folders, tags), *map(one_line, _notes(runs, folders))]))
    return 0


def _lines(runs: list[Listed], *, grouped: bool) -> list[str]:
    tagged = any(each.record and each.record.tags for each in runs)
    rows, group = [[*HEADER, *(["tags"] if tagged else [])]], None
    for each in runs:
        sweep = each.sweep if grouped else None
        if sweep is not None and sweep != group:
            name = f"{near(sweep)}: sweep of {count_text(sum(other.sweep == sweep for other in runs), 'run')}"
            rows.append([name, *[""] * (len(rows[0]) - 1)])
        group = sweep
        run = each.record
        plan = "" if run is None or run.planned_steps is None else f"/{run.planned_steps:,}"
        row = [
            f"  {each.path.name}" if sweep else near(each.path),
            run.state if run else "damaged",
            time_text(run.started) if run else "-",
            f"{run.steps:,}{plan}" if run else "-",
            loss_text(run.best.val_loss if run and run.best else None),
            f"{run.tokens_seen:,}" if run else "-",
            bytes_text(each.use.total),
            bytes_text(sum(each.use.checkpoints.values())),
            shortened(", ".join(run.tags), 40) if run else "",
        ]
        rows.append(row[: len(rows[0])])
    return table(rows, right=range(3, len(HEADER)))


def _total(runs: Sequence[Listed], folders: Sequence[Path], tags: Sequence[str]) -> str:
    if not runs:
        where = ", ".join(map(str, folders))
        if tags:
            return one_line(f"no runs in {where} with {' and '.join(f'tag={tag}' for tag in tags)}")
        return f"no runs in {where}: gptpl train experiment=quick makes one in seconds"
    total = bytes_text(sum(each.use.total for each in runs))
    checkpoints = bytes_text(sum(sum(each.use.checkpoints.values()) for each in runs))
    return f"{count_text(len(runs), 'run')}, {total}, of which checkpoints {checkpoints}"


def _notes(runs: Sequence[Listed], folders: Sequence[Path]) -> Iterator[str]:
    """Lines about damaged and half removed runs."""
    for each in runs:
        if each.damage:
            yield f"damaged: {each.damage}"
    for removed in {path for folder in folders if folder.is_dir() for path in rests_below(folder)}:
        size, name = bytes_text(disk_use(rest_of(removed)).total), near(removed)
        yield f"half removed: {name} ({size}): gptpl runs rm {shlex.quote(name)} removes the rest"


def _json(each: Listed) -> str:
    run, sweep = each.record, near(each.sweep) if each.sweep else None
    if run is None:
        sizes = {"bytes": each.use.total, "checkpoint_bytes": sum(each.use.checkpoints.values())}
        known = {"run": near(each.path), "state": "damaged", "error": each.damage, **sizes}
    else:
        best = {"best_val_loss": run.best.val_loss, "best_step": run.best.step} if run.best else {}
        known = {**entry(run, each.use), "best_val_loss": None, "best_step": None, **best}
    return json.dumps({**known, "sweep": sweep})
