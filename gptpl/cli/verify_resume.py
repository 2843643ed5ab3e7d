"""`gptpl verify-resume`: does a run that is stopped and resumed on this set-up end with the same bits?"""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from omegaconf import DictConfig

from gptpl.callbacks.stopping import SIGNALS
from gptpl.cli.hydra_app import run_under_hydra
from gptpl.cli.quoting import quoted
from gptpl.cli.schema_outputs import LastCheckpointConf
from gptpl.cli.verify_report import TRACE_FILE, compare, last_step, report
from gptpl.errors import InputError
from gptpl.training.checkpoint_files import LAST

DEFAULT_STEPS = 12
DEFAULT_STOPS = 3
EXIT_DIFFERENT = 1
OWN_KEYS = ("verify.steps", "verify.stops", "verify.seed", "verify.keep")
NO_CHECKPOINT = (
    "the run keeps no checkpoint to resume from: add checkpoint_last to callbacks, or callbacks=default"
)
LAST_LINES = 15
"""Of a part's log, shown when it fails."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to verify: the runs' settings, how far they go, and after which steps the second one stops."""

    overrides: list[str]
    steps: int
    given_stops: list[int] | None
    """None: random ones."""
    seed: int
    """Of the random stops."""
    keep: Path | None

    def stops(self, last_step: int) -> list[int]:
        """The steps to stop after in a run that ends at `last_step`, ascending.

        Raises InputError where the run is too short to be stopped there: nothing would be verified.
        """
        if last_step < 2:
            raise InputError(f"the run ends at step {last_step}: train 2 steps or more to stop in between")
        if self.given_stops is None:
            count = min(DEFAULT_STOPS, last_step - 1)
            return sorted(random.Random(self.seed).sample(range(1, last_step), count))
        if self.given_stops[-1] >= last_step:
            raise InputError(
                f"verify.stops={self.given_stops} cannot be: the run ends at step {last_step}, give steps"
                f" from 1 to {last_step - 1}"
            )
        return self.given_stops


@dataclass(frozen=True, kw_only=True)
class Part:
    """One process: what it does, in which run's folder, with which overrides, up to which step."""

    name: str
    run_dir: Path
    overrides: list[str]
    step: int


def run(arguments: list[str]) -> int:
    """Trains, compares, prints; returns the exit status."""
    plan = parse(arguments)
    _check_settings(plan.overrides)
    with _signals_unwind(), _folder(plan.keep) as folder:
        straight, stopped = folder / "straight", folder / "stopped"
        if not _train_all([_first("straight", straight, plan, plan.steps)], folder, first=1):
            return EXIT_DIFFERENT
        stops = plan.stops(last_step(straight))
        parts = [_first("stopped", stopped, plan, stops[0])]
        for step in (*stops[1:], plan.steps):
            parts.append(Part(name="resumed", run_dir=stopped, overrides=[f"resume={stopped}"], step=step))
        if not _train_all(parts, folder, first=2):
            return EXIT_DIFFERENT
        comparison = compare(straight, stopped, steps=plan.steps, stops=stops)
    print("\n".join(report(comparison)))
    if plan.keep:
        _say(f"both runs: {plan.keep}")
    return 0 if comparison.same else EXIT_DIFFERENT


def parse(arguments: Sequence[str]) -> Plan:
    """The plan that the arguments ask for. Raises InputError for what cannot be verified."""
    own = {key: value for key, value in map(_pair, arguments) if _is_own(key)}
    overrides = [argument for argument in arguments if not _is_own(_pair(argument)[0])]
    for key in own:
        if key not in OWN_KEYS:
            raise InputError(f"{key} is no key of gptpl verify-resume: see gptpl verify-resume --help")
    for key, _ in map(_pair, overrides):
        if key.lstrip("~") in ("run_dir", "resume", "trainer.stop_at_step", "-m", "--multirun"):
            raise InputError(f"{key} is set by verify-resume itself: leave it out")
        if key.startswith("-") and key not in ("-cd", "--config-dir"):
            raise InputError(f"{key} only shows settings: leave it out, or give it to gptpl train")
    steps = _number("verify.steps", own.get("verify.steps", str(DEFAULT_STEPS)), least=2)
    stops = _stops(own.get("verify.stops", "null"), steps)
    seed = _number("verify.seed", own.get("verify.seed", "0"), least=0)
    keep = own.get("verify.keep", "null")
    folder = None if keep == "null" else Path(keep).expanduser().absolute()
    if folder is not None and folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise InputError(f"verify.keep={folder} is there already, and not empty: give a new folder")
    return Plan(overrides=overrides, steps=steps, given_stops=stops, seed=seed, keep=folder)


def _pair(argument: str) -> tuple[str, str]:
    key, _, value = argument.partition("=")
    return key.lstrip("+"), value


def _is_own(key: str) -> bool:
    return key.lstrip("~").startswith("verify.")


def _number(key: str, value: str, *, least: int) -> int:
    if not re.fullmatch(r"\d+", value) or int(value) < least:
        raise InputError(f"{key}={value} cannot be: give a whole number of {least} or more")
    return int(value)


def _stops(value: str, steps: int) -> list[int] | None:
    """The steps to stop after, ascending; None: not given."""
    if value == "null":
        return None
    try:
        stops = json.loads(value)
    except json.JSONDecodeError:
        stops = None
    if isinstance(stops, list) and stops and all(type(s) is int and 1 <= s < steps for s in stops):
        return sorted(set(stops))
    raise InputError(
        f"verify.stops={value} cannot be: give steps from 1 to {steps - 1}, such as [1,{steps - 1}]"
    )


def _check_settings(overrides: list[str]) -> None:
    """Raises InputError at once for what would fail, or could not be resumed, only after the first part."""

    def check(cfg: DictConfig) -> None:
        targets = [str(callback.get("_target_")) for callback in cfg.callbacks.values() if callback]
        # A callback of the user's own may keep checkpoints too: that shows when it has run.
        if not any(t == LastCheckpointConf._target_ or not t.startswith("gptpl.") for t in targets):
            raise InputError(NO_CHECKPOINT)

    run_under_hydra("train", overrides, check)


def _first(name: str, run_dir: Path, plan: Plan, step: int) -> Part:
    """A part that starts a run: it writes which batches every step saw, and no clock ends it."""
    overrides = [
        f"run_dir={run_dir}",
        "+callbacks.step_trace._target_=gptpl.callbacks.step_trace.StepTrace",
        f"+callbacks.step_trace.path={quoted(str(run_dir / TRACE_FILE))}",
        *plan.overrides,
        "trainer.max_time=null",
    ]
    return Part(name=name, run_dir=run_dir, overrides=overrides, step=step)


def _train_all(parts: Sequence[Part], folder: Path, *, first: int) -> bool:
    """Trains one part after the other, saying how far it is; whether all succeeded.

    Raises InputError where a run keeps no checkpoint.
    """
    longest_seconds = 0.0
    for number, part in enumerate(parts):
        # The number of parts is known once the straight run has shown where it ends.
        of = f"/{len(parts) + 1}" if first > 1 else ""
        _say(f"part {first + number}{of}: {part.name}, to step {part.step} ...", end="")
        began = time.monotonic()
        if not _train(
            [*part.overrides, f"trainer.stop_at_step={part.step}"], folder / f"part_{first + number}.log"
        ):
            return False
        seconds = time.monotonic() - began
        longest_seconds = max(longest_seconds, seconds)
        left = len(parts) - number - 1
        _say(f" {seconds:.0f} s" + (f", about {left * longest_seconds:.0f} s left" if left else ""))
        if not (part.run_dir / "checkpoints" / LAST).exists():
            raise InputError(NO_CHECKPOINT)
    return True


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
def _signals_unwind() -> Iterator[None]:
    """Signals that would end this process at once unwind it, so that the part it waits for ends with it."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    taken = [n for n in SIGNALS if n != signal.SIGINT and signal.getsignal(n) == signal.SIG_DFL]
    for number in taken:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


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
