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

import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from gptpl.cli.arguments import parse_plain
from gptpl.cli.run_facts import LAST_PATH, entry, facts, resume_command, use_command
from gptpl.errors import InputError
from gptpl.files.run_record import RunRecord, read_run
from gptpl.runs.listing import DiskUse, disk_use, find_run
from gptpl.text import NONE, bytes_text, near, one_line, printable, shortened, table, time_text


def run(arguments: list[str]) -> int:
    """Prints the run; returns the exit status."""
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
