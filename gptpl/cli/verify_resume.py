"""`gptpl verify-resume`: does a run that is stopped and resumed on this set-up end with the same bits?"""

import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gptpl.cli.verify_report import TRACE_FILE, compare, report
from gptpl.errors import InputError
from gptpl.training.checkpoint_files import LAST

DEFAULT_STEPS = 12
DEFAULT_STOPS = 3
EXIT_DIFFERENT = 1
LAST_LINES = 15
"""Of a part's log, shown when it fails."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to verify: the runs' settings, how far they go, and after which steps the second one stops."""

    overrides: list[str]
    steps: int
    stops: list[int]
    keep: Path | None


def run(arguments: list[str]) -> int:
    """Trains, compares, prints; returns the exit status."""
    plan = parse(arguments)
    with _folder(plan.keep) as folder:
        straight, stopped = folder / "straight", folder / "stopped"
        parts = [("straight", [f"run_dir={straight}", *_traced(straight), *plan.overrides], plan.steps)]
        parts += [("stopped", [f"run_dir={stopped}", *_traced(stopped), *plan.overrides], plan.stops[0])]
        parts += [("resumed", [f"resume={stopped}"], step) for step in (*plan.stops[1:], plan.steps)]
        for number, (name, overrides, step) in enumerate(parts, start=1):
            _say(f"{number}/{len(parts)} {name}, to step {step} ...", end="")
            began = time.monotonic()
            if not _train([*overrides, f"trainer.stop_at_step={step}"], folder / f"part_{number}.log"):
                return EXIT_DIFFERENT
            _say(f" {time.monotonic() - began:.0f} s")
            if not (folder / overrides[0].partition("=")[2] / "checkpoints" / LAST).exists():
                raise InputError("the run keeps no checkpoint to resume from: add callbacks=default")
        comparison = compare(straight, stopped, steps=plan.steps, stops=plan.stops)
    print("\n".join(report(comparison)))
    if plan.keep:
        _say(f"both runs: {plan.keep}")
    return 0 if comparison.same else EXIT_DIFFERENT


def parse(arguments: Sequence[str]) -> Plan:
    """The plan that the arguments ask for. Raises InputError for what cannot be verified."""
    own = {key: value for key, value in _pairs(arguments) if key.startswith("verify.")}
    overrides = [argument for argument in arguments if not argument.startswith("verify.")]
    for key in own:
        if key not in ("verify.steps", "verify.stops", "verify.seed", "verify.keep"):
            raise InputError(f"{key} is no key of gptpl verify-resume: see gptpl verify-resume --help")
    for key, _ in _pairs(overrides):
        if key in ("run_dir", "resume", "trainer.stop_at_step", "-m", "--multirun"):
            raise InputError(f"{key} is set by verify-resume itself: leave it out")
    steps = _number("verify.steps", own.get("verify.steps", str(DEFAULT_STEPS)), least=2)
    stops = _stops(own.get("verify.stops", "null"), steps, seed=own.get("verify.seed", "0"))
    keep = own.get("verify.keep", "null")
    folder = None if keep == "null" else Path(keep).expanduser().absolute()
    if folder is not None and folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise InputError(f"verify.keep={folder} is there already, and not empty: give a new folder")
    return Plan(overrides=overrides, steps=steps, stops=stops, keep=folder)


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    for argument in arguments:
        key, _, value = argument.partition("=")
        yield key.lstrip("+~"), value


def _number(key: str, value: str, *, least: int) -> int:
    if not re.fullmatch(r"\d+", value) or int(value) < least:
        raise InputError(f"{key}={value} cannot be: give a whole number of {least} or more")
    return int(value)


def _stops(value: str, steps: int, *, seed: str) -> list[int]:
    """The steps to stop after, ascending."""
    if value == "null":
        draw = random.Random(_number("verify.seed", seed, least=0))
        return sorted(draw.sample(range(1, steps), min(DEFAULT_STOPS, steps - 1)))
    try:
        stops = json.loads(value)
    except json.JSONDecodeError:
        stops = None
    if isinstance(stops, list) and stops and all(type(s) is int and 1 <= s < steps for s in stops):
        return sorted(set(stops))
    raise InputError(
        f"verify.stops={value} cannot be: give steps from 1 to {steps - 1}, such as [1,{steps - 1}]"
    )


def _traced(run_dir: Path) -> list[str]:
    """Overrides that write which batches every step saw, and keep what a stopped run needs."""
    return [
        "+callbacks.step_trace._target_=gptpl.callbacks.step_trace.StepTrace",
        f"+callbacks.step_trace.path={run_dir / TRACE_FILE}",
    ]


def _train(overrides: list[str], log: Path) -> bool:
    """One part in a process of its own; whether it succeeded, having shown the end of its log if not."""
    with log.open("w", encoding="utf-8") as file:
        command = [sys.executable, "-m", "gptpl", "train", *overrides]
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        _say(f" failed with exit status {done.returncode}:")
        _say("\n".join(f"  {line}" for line in lines[-LAST_LINES:]))
    return done.returncode == 0


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    """Where the parts run; removed afterwards unless it is to be kept."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    folder = Path(tempfile.mkdtemp(prefix="gptpl-verify-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _say(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)
