"""One run at a glance.

usage: gptpl runs show RUN [--json]

examples:
  gptpl runs show latest                         # the newest
  gptpl runs show quick/latest                   # the newest of runs/quick
  gptpl runs show runs/tale/2026-11-21_14-51-09  # by its folder; 2026-11-21_14 does, if no other begins so
  gptpl runs show latest --json                  # with all of run.json

State, command, data, model, first weights, steps, time, memory, losses, resumptions, the last sample, files
with their sizes, and the commands that resume it or use its model.
"""

import json
import shlex
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from gptpl.cli import run_facts
from gptpl.cli.arguments import parse_plain as parse
from gptpl.errors import InputError
from gptpl.files.run_record import RunRecord, read_run
from gptpl.runs.listing import CHECKPOINT_FOLDER, DiskUse, disk_use, find_run
from gptpl.text import bytes_text, loss_text, near, one_line, printable, shortened, table, time_text

LAST = f"{CHECKPOINT_FOLDER}/last.ckpt"
BEST = f"{CHECKPOINT_FOLDER}/best.ckpt"
SAMPLE_CHARACTERS = 300
DEFAULT_EXAMPLE = ("generate", "prompt='Every effort moves you'")
EXAMPLES = {
    "ClassificationModule": ("classify", "text='See you at six'"),
    "InstructionModule": ("respond", "instruction='Name a synonym of happy.'"),
}
"""How the models of older runs are used, by the class of the task; a newer run's record says it (`use`)."""


def run(arguments: list[str]) -> int:
    """Prints what is known of the run; returns the exit status."""
    given = parse("runs show", arguments, flags=["--json"])
    if len(given.paths) != 1:
        raise InputError(
            f"gptpl runs show takes one run, not {len(given.paths)}: give it a folder or a"
            " name that gptpl runs list shows, or latest"
        )
    path = find_run(given.paths[0])
    record, use = read_run(path), disk_use(path)
    if "--json" in given.flags:
        print(json.dumps(_entry(record, use), indent=2))
        return 0
    width = 12
    facts = [f"{name:<{width}}{one_line(text)}" for name, text in _facts(record, use) if text != "-"]
    lines = [one_line(near(path)), "", *facts, "", *_files(record, use), "", *map(printable, _next(record))]
    print("\n".join(lines))
    return 0


def _facts(run: RunRecord, use: DiskUse) -> Iterator[tuple[str, str]]:
    """Names with what is to be said; `-` where it is not known."""
    yield "state", run_facts.state_text(run)
    if run.state == "unfinished":
        yield "", f"last written {time_text(datetime.fromtimestamp(use.newest).astimezone())}"
    yield "tags", ", ".join(run.tags) or "-"
    yield "notes", run.notes or "-"
    yield "command", run.record.get("command", "-")
    yield "started", time_text(run.started)
    yield "data", run_facts.data_text(run)
    yield "tokenizer", run_facts.tokenizer_text(run)
    yield "model", run_facts.model_text(run)
    yield "weights", f"began with {run_facts.start_text(run)}"
    yield "steps", f"{run_facts.steps_text(run)}; {run.tokens_seen:,} tokens"
    yield "time", run_facts.time_text(run)
    yield "speed", f"{run_facts.speed_text(run)} tokens per second"
    yield "peak memory", run_facts.memory_text(run)
    first = run.evaluations[0] if run.evaluations else None
    yield "val loss", f"lowest {run_facts.evaluation_text(run.best)}"
    for name, evaluation in (("first", first), ("last", run.last)):
        yield "", f"{name:<6} {run_facts.evaluation_text(evaluation)}"
    yield "train loss", f"last {loss_text(run.last.train_loss if run.last else None)}, in evaluation mode"
    for each in run.record.get("resumed", []):
        given = each.get("changes")
        changes = (
            ", ".join(f"{key}={value}" for key, value in given.items()) if isinstance(given, dict) else ""
        )
        yield "resumed", f"at step {each.get('step')}{f' with {changes}' if changes else ''}"
    yield from _last_sample(run)


def _last_sample(run: RunRecord) -> Iterator[tuple[str, str]]:
    samples = run.samples()
    if samples:
        sample = samples[-1]
        text = shortened(f"[{sample.get('prompt')}]{sample.get('continuation')}", SAMPLE_CHARACTERS)
        yield "sample", f"at step {sample.get('step')}: {text}"


def _files(run: RunRecord, use: DiskUse) -> list[str]:
    """The files with their sizes, those of TensorBoard as one."""
    sizes: dict[str, int] = {}
    for name, size in use.files.items():
        shown = "tensorboard/" if name.startswith("tensorboard/") else name
        sizes[shown] = sizes.get(shown, 0) + size
    link = run.path / LAST
    notes = {LAST: f"-> {link.readlink()}"} if link.is_symlink() else {}
    rows = [
        [name, notes.get(name) or bytes_text(size)] for name, size in sizes.items() if size or name in notes
    ]
    share = bytes_text(sum(use.checkpoints.values()))
    head = f"files, {bytes_text(use.total)}, of which checkpoints {share}:"
    return [head, *(f"  {line}" for line in table(rows, right=[1]))]


def _next(run: RunRecord) -> list[str]:
    """What to do with it."""
    resume = _resume_command(run)
    lines = (
        [f"to train longer: {resume}" if run.state == "finished" else f"to go on: {resume}"] if resume else []
    )
    lines += [f"to {use.split()[1]}: {use}"] if (use := _use_command(run)) else []
    return lines or ["no checkpoint: it can neither be resumed nor used"]


def _resume_command(run: RunRecord) -> str | None:
    """None without a checkpoint to go on from. A run that has finished needs more steps to go on."""
    if not (run.path / LAST).is_file():
        return None
    return " ".join(["gptpl train", shlex.quote(f"resume={near(run.path)}"), *_more(run)])


def _more(run: RunRecord) -> list[str]:
    if run.state != "finished":
        return []
    trainer = run.config.get("trainer")
    settings = trainer if isinstance(trainer, dict) else {}
    steps, epochs = settings.get("max_steps"), settings.get("max_epochs")
    if isinstance(steps, int) and run.steps >= steps > 0:
        return [f"trainer.max_steps={2 * steps}"]
    return [f"trainer.max_epochs={2 * epochs}"] if isinstance(epochs, int) else []


def _use_command(run: RunRecord) -> str | None:
    """None where there are no weights."""
    if not any((run.path / name).is_file() for name in (LAST, BEST)):
        return None
    task = run.config.get("task")
    target = str(task.get("_target_")) if isinstance(task, dict) else ""
    verb, example = run.record.get("use") or EXAMPLES.get(target.rpartition(".")[2], DEFAULT_EXAMPLE)
    return f"gptpl {verb} {shlex.quote(f'checkpoint={near(run.path)}')} {example}"


def _entry(run: RunRecord, use: DiskUse) -> dict[str, Any]:
    """What `--json` prints: the record itself, and what is not in it."""
    evaluations = {
        "first": run.evaluations[0] if run.evaluations else None,
        "lowest": run.best,
        "last": run.last,
    }
    samples = run.samples()
    return {
        "run": near(run.path),
        "state": run.state,
        "started": run.started.isoformat(timespec="seconds"),
        "steps": run.steps,
        "planned_steps": run.planned_steps,
        "tokens_seen": run.tokens_seen,
        "tags": run.tags,
        "notes": run.notes,
        "losses": {name: vars(each) if each else None for name, each in evaluations.items()},
        "last_sample": samples[-1] if samples else None,
        "files": dict(use.files),
        "bytes": use.total,
        "checkpoint_bytes": sum(use.checkpoints.values()),
        "resume": _resume_command(run),
        "generate": _use_command(run),
        "record": dict(run.record),
    }
