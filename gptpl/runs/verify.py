"""Does a run that is stopped and resumed on this set-up end with the same bits?"""

import csv
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from types import FrameType
from typing import Any

import torch

from gptpl.callbacks.stopping import SIGNALS
from gptpl.checkpoints.files import LAST
from gptpl.checkpoints.format import HEADER_KEY, read_checkpoint
from gptpl.checkpoints.resume_state import RESUME_KEY, state_digest
from gptpl.config.compose import composed
from gptpl.config.groups import Folder
from gptpl.config.overrides import quoted
from gptpl.errors import InputError
from gptpl.text import table

DEFAULT_STEPS = 12
DEFAULT_STOPS = 3
SET_HERE = ("run_dir", "resume", "trainer.stop_at_step")
NO_CHECKPOINT = (
    "the run keeps no checkpoint to resume from: add checkpoint_last to callbacks, or callbacks=default"
)
TRACE_FILE = "steps.jsonl"
"""Where `gptpl.callbacks.step_trace.StepTrace` writes in both runs."""
LAST_LINES = 15
"""Of a part's log, shown when it fails."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to verify: the runs' settings, how far they go, and after which steps the second one stops."""

    overrides: list[str]
    steps: int
    given_stops: list[int] | None
    """None: random ones, drawn from `seed`."""
    seed: int
    config_dir: Folder | None = None

    def stops(self, last_step: int) -> list[int]:
        """The steps to stop after in a run that ends at `last_step`; InputError where it is too short."""
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


def verify_resume(
    *overrides: str,
    steps: int = DEFAULT_STEPS,
    stops: Sequence[int] | None = None,
    seed: int = 0,
    keep: str | Path | None = None,
    config_dir: Folder | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> "Comparison | None":
    """Trains straight, trains again with interruptions, and compares the two bit by bit.

    Every part is a process of its own. `steps` are compared, 2 or more, of a schedule that stays that of the
    whole run; `stops` are the steps to stop after, None: 3 random ones, drawn from `seed`. Both runs are left
    in the new folder `keep`, if there is one. `say` is told how far it is.

    Returns None where a part failed, having said why. Raises InputError for what cannot be verified.
    """
    plan = check(overrides, steps=steps, stops=stops, seed=seed, config_dir=config_dir)
    with _signals_unwind(), _folder(keep) as folder:
        straight, stopped = folder / "straight", folder / "stopped"
        if not _train_all([("straight", plan.steps)], folder, plan, first=1, say=say):
            return None
        ends = plan.stops(last_step(straight))
        parts = [("stopped", ends[0]), *(("resumed", step) for step in (*ends[1:], plan.steps))]
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
    for name, value, least in (("steps", steps, 2), ("seed", seed, 0)):
        if value < least:
            raise InputError(f"verify.{name}={value} cannot be: give a whole number of {least} or more")
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


# --- the parts ------------------------------------------------------------------------------------------


def _train_all(
    parts: Sequence[tuple[str, int]], folder: Path, plan: Plan, *, first: int, say: Callable[[str], None]
) -> bool:
    """Trains one part after the other, up to its step, saying how far it is; whether all succeeded."""
    longest_seconds = 0.0
    for number, (name, step) in enumerate(parts):
        # The number of parts is known once the straight run has shown where it ends.
        of = f"/{len(parts) + 1}" if first > 1 else ""
        say(f"part {first + number}{of}: {name}, to step {step} ...")
        began = time.monotonic()
        run_dir = folder / ("stopped" if name == "resumed" else name)
        overrides = [f"resume={run_dir}"] if name == "resumed" else _of_a_new_run(run_dir, plan)
        log = folder / f"part_{first + number}.log"
        if not _train([*overrides, f"trainer.stop_at_step={step}"], log, plan, say):
            return False
        seconds = time.monotonic() - began
        longest_seconds = max(longest_seconds, seconds)
        left = len(parts) - number - 1
        say(f"  {seconds:.0f} s" + (f", about {left * longest_seconds:.0f} s left" if left else ""))
        if not (run_dir / "checkpoints" / LAST).exists():
            raise InputError(NO_CHECKPOINT)
    return True


def _of_a_new_run(run_dir: Path, plan: Plan) -> list[str]:
    """It writes which batches every step saw, and no clock ends it."""
    return [
        f"run_dir={run_dir}",
        "+callbacks.step_trace._target_=gptpl.callbacks.step_trace.StepTrace",
        f"+callbacks.step_trace.path={quoted(str(run_dir / TRACE_FILE))}",
        *plan.overrides,
        "trainer.max_time=null",
    ]


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
def _folder(keep: str | Path | None) -> Iterator[Path]:
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="gptpl-verify-", ignore_cleanup_errors=True) as temporary:
            yield Path(temporary)
        return
    folder = Path(keep).expanduser().absolute()
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise InputError(f"verify.keep={folder} is there already, and not empty: give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    yield folder


# --- what the runs left, compared -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Both runs, side by side."""

    steps: list[tuple[dict[str, Any], dict[str, Any]]]
    """Each step's trace in the straight run and in the other; empty where a run has none."""
    digests: dict[str, tuple[str, str]]
    """Each part of the last checkpoint: its hash in both."""
    columns: list[str]
    """Columns of metrics.csv that are not the same in both."""
    last_step: int
    """Of the straight run."""
    wanted_step: int
    stops: list[int]
    config: dict[str, Any]
    """The settings of the straight run."""

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        pairs = (*self.steps, *self.digests.values())
        return bool(self.steps) and not self.columns and all(one == other for one, other in pairs)


def compare(straight: Path, stopped: Path, *, steps: int, stops: list[int]) -> Comparison:
    """Reads what the two runs left in their folders."""
    ours, theirs = _trace(straight), _trace(stopped)
    numbers = sorted(ours.keys() | theirs.keys())
    one, other = (_last_checkpoint(run) for run in (straight, stopped))
    digests, others = state_digest(one), state_digest(other)
    return Comparison(
        steps=[(ours.get(step, {}), theirs.get(step, {})) for step in numbers],
        digests={part: (digests[part], others[part]) for part in digests},
        columns=_different_columns(straight / "metrics.csv", stopped / "metrics.csv"),
        last_step=int(one[RESUME_KEY]["step"]),
        wanted_step=steps,
        stops=stops,
        config=one[HEADER_KEY]["config"],
    )


def last_step(run: Path) -> int:
    """The step of a run's last checkpoint."""
    return int(_last_checkpoint(run)[RESUME_KEY]["step"])


def _last_checkpoint(run: Path) -> dict[str, Any]:
    return read_checkpoint((run / "checkpoints" / LAST).resolve())


def _trace(run: Path) -> dict[int, dict[str, Any]]:
    lines = (run / TRACE_FILE).read_text(encoding="utf-8").splitlines()
    return {record["step"]: record for record in map(json.loads, lines)}


def _different_columns(straight: Path, stopped: Path) -> list[str]:
    """Columns with other texts in some row; what is measured by the clock is none of them."""
    ours, theirs = _rows(straight), _rows(stopped)
    names = dict.fromkeys(name for row in (*ours, *theirs) for name in row)
    none: dict[str, str] = {}
    pairs = list(zip_longest(ours, theirs, fillvalue=none))
    differ = [name for name in names if any(one.get(name) != other.get(name) for one, other in pairs)]
    return [name for name in differ if not name.endswith(("tokens_per_second", "mfu"))]


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():  # no such logger
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def report(comparison: Comparison) -> list[str]:
    """Lines: a table of the steps, one of the hashes, and the verdict."""
    rows = [["step", "batches", "loss straight", "loss stopped", ""]]
    rows += [_step_row(one, other, comparison.stops) for one, other in comparison.steps]
    hashes = [["state after the last step", "straight", "stopped", ""]]
    for part, (one, other) in comparison.digests.items():
        hashes.append([part, one[:12], other[:12], _word(one == other)])
    lines = [*table(rows), "", *table(hashes), ""]
    if comparison.columns:
        lines.append(f"metrics.csv differs in {', '.join(comparison.columns)}")
    if comparison.last_step < comparison.wanted_step:
        lines.append(
            f"the run ends at step {comparison.last_step}, before verify.steps={comparison.wanted_step}"
        )
    stops = ", ".join(map(str, comparison.stops))
    if comparison.same:
        return [*lines, f"identical: stopped after step {stops} and resumed, the run has the same bits"]
    lines.append(f"DIFFERENT: stopped after step {stops} and resumed, the run is another one")
    on_cpu = comparison.config.get("trainer", {}).get("accelerator") == "cpu"
    if torch.cuda.is_available() and not on_cpu and not comparison.config.get("deterministic"):
        lines.append("some GPU kernels add in no fixed order: try deterministic=true")
    return lines


def _step_row(one: dict[str, Any], other: dict[str, Any], stops: list[int]) -> list[str]:
    step = one.get("step", other.get("step"))
    same = _word(one == other)
    where = f"{same}, then stopped" if step in stops else same
    batches = _word(one.get("batches") == other.get("batches"))
    return [str(step), batches, _loss(one), _loss(other), where]


def _loss(record: dict[str, Any]) -> str:
    """The mean over the micro-batches, to all the digits that a double has."""
    if not record:
        return "no such step"
    return repr(fmean(float.fromhex(loss) for loss in record["losses"]))


def _word(same: bool) -> str:
    return "same" if same else "DIFFERENT"
