"""Does a run that is stopped and resumed on this set-up end with the same bits?"""

import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from gptpl.callbacks.stopping import SIGNALS
from gptpl.config.compose import composed
from gptpl.config.groups import Folder
from gptpl.config.overrides import quoted
from gptpl.errors import InputError
from gptpl.runs.verify_report import TRACE_FILE, Comparison, compare, last_step
from gptpl.training.checkpoint_files import LAST

DEFAULT_STEPS = 12
DEFAULT_STOPS = 3
SET_HERE = ("run_dir", "resume", "trainer.stop_at_step")
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
    config_dir: Folder | None = None

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


def verify_resume(
    *overrides: str,
    steps: int = DEFAULT_STEPS,
    stops: Sequence[int] | None = None,
    seed: int = 0,
    keep: str | Path | None = None,
    config_dir: Folder | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Comparison | None:
    """Trains straight, trains again with interruptions, and compares the two bit by bit.

    Every part is a process of its own.

    Args:
        overrides: of `gptpl train`.
        steps: optimizer steps to compare, 2 or more; the schedule stays that of the whole run.
        stops: steps to stop after; None: 3 random ones.
        seed: of the random stops.
        keep: a new folder to leave both runs in; None: a temporary one, then removed.
        config_dir: the user's own config folder.
        say: is told how far it is.

    Returns None where a part failed, having said why. Raises InputError for what cannot be verified.
    """
    plan = check(overrides, steps=steps, stops=stops, seed=seed, config_dir=config_dir)
    with _signals_unwind(), _folder(_checked_keep(keep)) as folder:
        straight, stopped = folder / "straight", folder / "stopped"
        if not _train_all([_first("straight", straight, plan, plan.steps)], folder, plan, first=1, say=say):
            return None
        ends = plan.stops(last_step(straight))
        parts = [_first("stopped", stopped, plan, ends[0])]
        for step in (*ends[1:], plan.steps):
            parts.append(Part(name="resumed", run_dir=stopped, overrides=[f"resume={stopped}"], step=step))
        if not _train_all(parts, folder, plan, first=2, say=say):
            return None
        return compare(straight, stopped, steps=plan.steps, stops=ends)


def check(
    overrides: Sequence[str],
    *,
    steps: int = DEFAULT_STEPS,
    stops: Sequence[int] | None = None,
    seed: int = 0,
    config_dir: Folder | None = None,
) -> Plan:
    """The plan. Raises InputError at once for what would fail only after the first part."""
    for key in (override.lstrip("+~").partition("=")[0] for override in overrides):
        if key in SET_HERE:
            raise InputError(f"{key} is set by verify-resume itself: leave it out")
    if steps < 2:
        raise InputError(f"verify.steps={steps} cannot be: give a whole number of 2 or more")
    if seed < 0:
        raise InputError(f"verify.seed={seed} cannot be: give a whole number of 0 or more")
    if stops is not None and not (len(stops) and all(1 <= stop < steps for stop in stops)):
        raise InputError(
            f"verify.stops={list(stops)} cannot be: give steps from 1 to {steps - 1}, such as [1,{steps - 1}]"
        )
    cfg = composed(overrides, config_dir=config_dir).cfg
    targets = [str(callback.get("_target_")) for callback in cfg.callbacks.values() if callback]
    # A callback of the user's own may keep checkpoints too: that shows when it has run.
    if not any(each.endswith(".LastCheckpoint") or not each.startswith("gptpl.") for each in targets):
        raise InputError(NO_CHECKPOINT)
    given = None if stops is None else sorted(set(stops))
    return Plan(overrides=list(overrides), steps=steps, given_stops=given, seed=seed, config_dir=config_dir)


def _checked_keep(keep: str | Path | None) -> Path | None:
    folder = None if keep is None else Path(keep).expanduser().absolute()
    if folder is not None and folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise InputError(f"verify.keep={folder} is there already, and not empty: give a new folder")
    return folder


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


def _train_all(
    parts: Sequence[Part], folder: Path, plan: Plan, *, first: int, say: Callable[[str], None]
) -> bool:
    """Trains one part after the other, saying how far it is; whether all succeeded.

    Raises InputError where a run keeps no checkpoint.
    """
    longest_seconds = 0.0
    for number, part in enumerate(parts):
        # The number of parts is known once the straight run has shown where it ends.
        of = f"/{len(parts) + 1}" if first > 1 else ""
        say(f"part {first + number}{of}: {part.name}, to step {part.step} ...")
        began = time.monotonic()
        overrides = [*part.overrides, f"trainer.stop_at_step={part.step}"]
        if not _train(overrides, folder / f"part_{first + number}.log", plan, say):
            return False
        seconds = time.monotonic() - began
        longest_seconds = max(longest_seconds, seconds)
        left = len(parts) - number - 1
        say(f"  {seconds:.0f} s" + (f", about {left * longest_seconds:.0f} s left" if left else ""))
        if not (part.run_dir / "checkpoints" / LAST).exists():
            raise InputError(NO_CHECKPOINT)
    return True


def _train(overrides: list[str], log: Path, plan: Plan, say: Callable[[str], None]) -> bool:
    """One part in a process of its own; whether it succeeded, having shown the end of its log if not."""
    with log.open("w", encoding="utf-8") as file:
        own = ["--config-dir", str(plan.config_dir)] if plan.config_dir else []
        command = [sys.executable, "-m", "gptpl", "train", *own, *overrides]
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        say(f"  failed with exit status {done.returncode}:")
        say("\n".join(f"  {line}" for line in lines[-LAST_LINES:]))
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
