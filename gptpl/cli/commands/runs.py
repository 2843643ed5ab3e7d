"""The commands on runs that are on disk: list, show, compare, tag, note, remove, report."""

import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from gptpl.cli.arguments import parse_plain
from gptpl.cli.run_facts import LAST_PATH, entry, facts, resume_command, state, use_command
from gptpl.errors import InputError
from gptpl.files.run_record import BEST, RunRecord, change_tags, read_run, write_run_json
from gptpl.files.run_settings import Differences, Setting, differing_beside, differing_settings
from gptpl.runs.listing import SORTS, DiskUse, Listed, disk_use, find_run, list_runs, runs_folder
from gptpl.runs.removal import Removal, plan_removal, rest_of, rests_below, warnings
from gptpl.text import (
    NONE,
    bytes_text,
    count_text,
    loss_text,
    near,
    one_line,
    printable,
    setting_text,
    shortened,
    some,
    table,
    time_text,
)

# --- gptpl runs list ------------------------------------------------------------------------------------


HEADER = ["run", "state", "started", "steps", "val loss", "tokens", "size", "checkpoints"]


def runs_list(arguments: list[str]) -> int:
    """List the runs on disk with their losses, tags and sizes.

    usage: gptpl runs list [FOLDER]... [sort=date|loss|size] [tag=WORD] [--json]

    examples:
      gptpl runs list                        # all in runs/, the newest first, trials under their sweep
      gptpl runs list runs/sweeps sort=loss  # the lowest loss first
      gptpl runs list sort=size              # the largest first
      gptpl runs list tag=paper              # with a tag; several: tag=a tag=b
      gptpl runs list --json | jq .run       # a JSON object on each line

    `state` is running, finished, stopped (from outside, or by the settings), failed, unfinished (killed) or
    damaged; `steps` are completed/planned; `val loss` is the lowest, in nats per token; `size` is that of all
    files, `checkpoints` is included in it.
    """
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
            state(run) if run else "damaged",
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


# --- gptpl runs show ------------------------------------------------------------------------------------


def runs_show(arguments: list[str]) -> int:
    """Show one run at a glance.

    usage: gptpl runs show RUN [--json]

    examples:
      gptpl runs show latest                         # the newest
      gptpl runs show quick/latest                   # the newest of runs/quick
      gptpl runs show runs/tale/2026-11-21_14-51-09  # by its folder; 2026-11-21_14 will do if it is unique
      gptpl runs show latest --json                  # with all of run.json

    Prints state, command, data, model, first weights, steps, time, memory, losses, when it was resumed, the last
    sample, files with their sizes, and the commands that resume it or use its model.
    """
    given = parse_plain("runs show", arguments, flags=["--json"])
    if len(given.paths) != 1:
        raise InputError(
            f"gptpl runs show takes one run, got {len(given.paths)}: give a folder or a name that gptpl runs"
            " list shows, or latest"
        )
    path = find_run(given.paths[0])
    record, use = read_run(path), disk_use(path)
    if given.flags:
        print(json.dumps(_entry(record, use), indent=2))
        return 0
    rows = [[name, one_line(text)] for name, text in _facts(record, use) if text != NONE]
    known = table(rows)
    print("\n".join([one_line(near(path)), "", *known, "", *_files(record, use), "", *_next(record)]))
    return 0


def _facts(run: RunRecord, use: DiskUse) -> Iterator[tuple[str, str]]:
    yield from facts(run).items()
    if run.state == "unfinished":
        yield "last written", time_text(datetime.fromtimestamp(use.newest).astimezone())
    for each in run.record.get("resumed", []):
        changes = each.get("changes")
        given = ", ".join(f"{k}={v}" for k, v in changes.items()) if isinstance(changes, dict) else ""
        yield "resumed", f"at step {each.get('step')}{f' with {given}' if given else ''}"
    for sample in run.samples()[-1:]:
        text = shortened(f"[{sample.get('prompt')}]{sample.get('continuation')}", 300)
        yield "sample", f"at step {sample.get('step')}: {text}"


def _files(run: RunRecord, use: DiskUse) -> list[str]:
    """The files with their sizes, TensorBoard's as one."""
    sizes: dict[str, int] = {}
    for name, size in use.files.items():
        shown = "tensorboard/" if name.startswith("tensorboard/") else name
        sizes[shown] = sizes.get(shown, 0) + size
    rows = [[name, bytes_text(size)] for name, size in sizes.items() if size]
    if (link := run.path / LAST_PATH).is_symlink():
        rows.append([LAST_PATH, f"-> {link.readlink()}"])
        rows.sort()
    checkpoints = bytes_text(sum(use.checkpoints.values()))
    lines = [f"  {line}" for line in table(rows, right=[1])]
    return [f"files, {bytes_text(use.total)}, of which checkpoints {checkpoints}:", *lines]


def _next(run: RunRecord) -> list[str]:
    """The commands to continue with."""
    resume, use = resume_command(run), use_command(run)
    lines = [f"to {'train longer' if run.state == 'finished' else 'resume'}: {resume}"] if resume else []
    lines += [f"to {use.split()[1]}: {use}"] if use else []
    return [printable(line) for line in lines] or ["no checkpoint: it can neither be resumed nor used"]


def _entry(run: RunRecord, use: DiskUse) -> dict[str, Any]:
    """What `--json` prints: the record, and what follows from other files."""
    first = run.evaluations[0] if run.evaluations else None
    losses = {"first": first, "lowest": run.best, "last": run.last}
    return {
        **entry(run, use),
        "losses": {
            name: each and {"step": each.step, "val_loss": each.val_loss, "train_loss": each.train_loss}
            for name, each in losses.items()
        },
        "last_sample": next(reversed(run.samples()), None),
        "files": dict(use.files),
        "resume": resume_command(run),
        "generate": use_command(run),
        "record": dict(run.record),
    }


# --- gptpl runs diff ------------------------------------------------------------------------------------


WIDEST = 40
"""Characters of a value in a column; longer values are printed below one another."""
RESULTS = (
    *("state", "steps", "tokens", "lowest val loss", "last val loss"),
    *("time", "tokens per second", "peak memory"),
)


def runs_diff(arguments: list[str]) -> int:
    """Compare settings and results of runs.

    usage: gptpl runs diff RUN1 RUN2 [RUN3]...

    examples:
      gptpl runs diff quick/2026-11-21_14-51-09 quick/latest                     # two runs by name
      gptpl runs diff runs/sweeps/quick_1a2b3c4d/0 runs/sweeps/quick_1a2b3c4d/1  # or by folder
      gptpl runs diff runs/sweeps/quick_1a2b3c4d/*/                              # all trials of a sweep

    Prints side by side the settings that differ; other differences (data, versions, git commit, first weights,
    hardware); the results. Exit status 0 with and without differences.
    """
    paths = parse_plain("runs diff", arguments).paths
    if len(paths) < 2:
        raise InputError(
            f"gptpl runs diff takes two runs or more, got {len(paths)}: give folders or names that gptpl runs"
            " list shows"
        )
    paths = [find_run(path) for path in paths]
    runs = [read_run(path) for path in paths]
    names = _names(paths)
    settings, beside = differing_settings(runs), differing_beside(runs)
    lines = _section("settings", names, settings) if settings else ["the same settings"]
    if beside:
        lines += ["", *_section("other differences", names, beside)]
    known = [facts(run) for run in runs]
    results = ([name, *(each[name] for each in known)] for name in RESULTS)
    print("\n".join([*lines, "", *table([["results", *names], *results])]))
    return 0


def _names(paths: Sequence[Path]) -> list[str]:
    """The runs' folders without their common beginning."""
    full = [str(path.resolve()) for path in paths]
    if len(set(full)) < len(full):
        return [near(path) for path in paths]
    names = [os.path.relpath(path, os.path.commonpath(full)) for path in full]
    return [one_line(near(path) if name == "." else name) for path, name in zip(paths, names, strict=True)]


def _section(title: str, names: Sequence[str], differences: Differences) -> list[str]:
    """A table of short values, and below it the long ones."""
    texts = {name: [_text(value) for value in values] for name, values in differences.items()}
    short = {name: row for name, row in texts.items() if max(map(len, row)) <= WIDEST}
    lines = table([[title, *names], *([name, *row] for name, row in short.items())])
    width = max(map(len, names))
    for name in texts.keys() - short.keys():
        values = zip(names, texts[name], strict=True)
        lines += [one_line(name), *(f"  {run:<{width}}  {value}" for run, value in values)]
    return lines


def _text(value: Setting | None) -> str:
    if isinstance(value, str) and value.startswith(os.sep):
        return one_line(near(Path(value)))
    return one_line(setting_text(value, exact=True))


# --- gptpl runs tag, gptpl runs note --------------------------------------------------------------------


def runs_tag(arguments: list[str]) -> int:
    """Add tags to a run, or remove them.

    usage: gptpl runs tag RUN [+TAG]... [-TAG]...

    examples:
      gptpl runs tag latest +good                # then: gptpl runs list tag=good
      gptpl runs tag quick/latest +paper -draft  # add one, remove one
      gptpl runs tag latest                      # print them

    gptpl train tags=[a,b] adds them from the start. Prints the run's tags.
    """
    add = [argument[1:] for argument in arguments if argument.startswith("+")]
    remove = [argument[1:] for argument in arguments if argument.startswith("-")]
    names = [argument for argument in arguments if argument[:1] not in ("+", "-")]
    if len(names) != 1:
        raise InputError(f"gptpl runs tag takes one run, got {len(names)}: give RUN +TAG, or RUN -TAG")
    folder = find_run(names[0])
    tags = change_tags(folder, add=add, remove=remove)
    print(one_line(f"{near(folder)}: {', '.join(tags) or 'no tags'}"))
    return 0


def runs_note(arguments: list[str]) -> int:
    """Write a note on a run, or read it.

    usage: gptpl runs note RUN [TEXT]

    examples:
      gptpl runs note latest 'warm-up too short'  # replaces an earlier note
      gptpl runs note quick/latest                # print it; gptpl runs show prints it, too
      gptpl runs note latest ''                   # remove it

    gptpl train notes=TEXT writes one from the start.
    """
    if len(arguments) not in (1, 2):
        raise InputError("gptpl runs note takes a run and a text, as in gptpl runs note latest 'too slow'")
    folder = find_run(arguments[0])
    record = read_run(folder)
    if len(arguments) == 2:
        write_run_json(folder, notes=arguments[1])
        record = read_run(folder)
    print(one_line(f"{near(folder)}: {record.notes or 'no note'}"))
    return 0


# --- gptpl runs rm --------------------------------------------------------------------------------------


def runs_rm(arguments: list[str]) -> int:
    """Remove runs, or only their checkpoints, after asking.

    usage: gptpl runs rm RUN... [--checkpoints] [--yes]

    examples:
      gptpl runs rm quick/2026-11-21_14-51-09         # a run, by name or folder
      gptpl runs rm runs/sweeps/quick_1a2b3c4d --yes  # a whole sweep, without asking
      gptpl runs rm RUN --checkpoints                 # keep best.ckpt, and with it the model

    flags:
      --checkpoints   remove what is needed to resume, most of the size; best.ckpt and everything else stay
      --yes, -y       do not ask; needed where there is no terminal

    Only folders of runs and sweeps are removed. Their sizes are shown first, with warnings about files that gptpl
    did not write, other runs that started from these weights, and runs that may still be running. Links are
    removed, not what they point at. The same command completes an interrupted removal.
    """
    given = parse_plain("runs rm", arguments, flags=["--yes", "-y", "--checkpoints"])
    if not given.paths:
        raise InputError("no run is given: give gptpl runs rm folders, or names that gptpl runs list shows")
    checkpoints_only = "--checkpoints" in given.flags
    removals = plan_removal([_meant(path) for path in given.paths], checkpoints_only=checkpoints_only)
    sure = bool({"--yes", "-y"} & given.flags)
    for each in removals if sure else ():  # nobody is asked
        if each.foreign:
            raise InputError(
                f"{near(each.path)} holds files that gptpl did not write ({some(each.foreign)}): move them"
                " away, or leave out --yes and answer"
            )
    if not sure and (sys.stdin is None or not sys.stdin.isatty()):
        raise InputError("gptpl runs rm asks first, and there is no terminal to ask on: add --yes to remove")
    rows = [[near(each.path), each.kind, bytes_text(each.bytes)] for each in removals]
    notes = [one_line(f"warning: {warning}") for warning in warnings(removals)]
    print("\n".join([*table(rows, right=[2]), *notes]), flush=True)
    size = sum(each.bytes for each in removals)
    if checkpoints_only and not size:
        print("nothing to remove")
        return 0
    if checkpoints_only:
        print("without these checkpoints the runs cannot be resumed", flush=True)
    if not sure and not _agreed(removals, size):
        print("nothing was removed")
        return 0
    for each in removals:
        each.remove()
    print(f"removed {bytes_text(size)}")
    return 0


def _meant(path: Path) -> Path:
    """The folder, as given or below `runs/`, which may be a sweep's; else the run with that name."""
    for folder in (path, runs_folder() / path):
        if folder.is_symlink() or folder.exists() or rest_of(folder.absolute()).is_dir():
            return folder
    return find_run(path)


def _agreed(removals: Sequence[Removal], size: int) -> bool:
    runs = count_text(sum(max(len(each.runs), each.half_done) for each in removals), "run")
    what = f"all checkpoints but {BEST} of {runs}" if removals[0].checkpoints_only else runs
    print(f"remove {what}, {bytes_text(size)}? [y/N] ", end="", file=sys.stderr, flush=True)
    answer = sys.stdin.readline()
    if not answer.endswith("\n"):
        print(file=sys.stderr)  # after Ctrl-D
    return answer.strip().lower() in ("y", "yes")


# --- gptpl report ---------------------------------------------------------------------------------------


EXIT_DAMAGED = 1


def report(arguments: list[str]) -> int:
    """Compare runs: ranking, curves, settings and samples, as a web page and in Markdown.

    usage: gptpl report RUN_OR_FOLDER... [output=FOLDER] [tag=WORD] [by=METRIC]

    examples:
      gptpl report runs/sweeps/quick_1a2b3c4d   # all trials of a sweep
      gptpl report runs/quick                   # all runs below a folder
      gptpl report RUN_A RUN_B output=compared  # two runs; without output= the files go to this folder
      gptpl report latest                       # one run
      gptpl report runs tag=paper               # only the runs with a tag
      gptpl report runs by=val/bits_per_byte    # different tokenizers on the same text, ranked together

    settings:
      output: null    # folder of the files; null: the given folder, or the current one if several are given
      tag: null       # only runs with this tag; several: tag=a,b
      by: null        # metric of the ranking; null: val/loss, or that of the sweep
      mode: min       # with by: max where its best value is the highest

    Writes report.html, which needs no other file and no network, report.md and its pictures report-*.png, and
    prints the ranking. Runs are ranked by their lowest validation loss, those of a sweep by its sweep.metric.
    Runs with different texts, splits or tokenizers are ranked separately: their losses cannot be compared (bits
    per byte can, between tokenizers). The importance of settings is estimated from 10 finished runs on.
    Exit status: 0, 1 (some runs are damaged; the others are reported), 2 bad input.
    """
    from gptpl.reports import report
    from gptpl.reports.ranking import Criterion
    from gptpl.reports.writing import terminal_lines

    given = parse_plain("report", arguments, settings=["output", "tag", "by", "mode"])
    output = given.settings.get("output")
    if output == "":
        raise InputError("output= is empty: give a folder")
    if not given.paths:
        raise InputError("no run is given: give gptpl report a run's folder, or a folder of runs")
    tags = [tag for tag in given.settings.get("tag", "").split(",") if tag]
    by, mode = given.settings.get("by"), given.settings.get("mode", "min")
    if mode not in ("min", "max"):
        raise InputError(f"mode={mode} is unknown: choose one of min, max")
    if by is None and "mode" in given.settings:
        raise InputError(f"mode={mode} has no metric: give by=METRIC, too")
    criterion = None if by is None else Criterion(metric=by, mode="max" if mode == "max" else "min")
    folder = None if output is None else Path(output)
    written = report(*given.paths, output=folder, tags=tags, by=criterion)
    where = ["", f"page      {written.page}", f"markdown  {written.markdown}"]
    print("\n".join([*terminal_lines(written.contents), *where]))
    return EXIT_DAMAGED if written.contents.problems else 0
