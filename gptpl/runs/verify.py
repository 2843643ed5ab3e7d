"""Does a run that is stopped and resumed on this machine end with the same bits?"""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from types import FrameType
from typing import Any

import lightning as L
import torch

from gptpl.callbacks.stopping import SIGNALS
from gptpl.checkpoints.format import HEADER_KEY, read_checkpoint
from gptpl.checkpoints.resume_state import RESUME_KEY, state_digest
from gptpl.config.compose import Config, composed
from gptpl.config.groups import Folder
from gptpl.config.overrides import key_of, quoted
from gptpl.errors import SIGNAL_STATUS, InputError
from gptpl.files.run_record import CHECKPOINT_FOLDER, LAST, read_run_json
from gptpl.text import table
from gptpl.training.processes import find_launcher
from gptpl.training.run_log import is_first_process

DEFAULT_STEPS = 12
DEFAULT_STOPS = 3
SET_HERE = ("run_dir", "resume", "trainer.stop_at_step")
NO_CHECKPOINT = (
    "the run keeps no checkpoint to resume from: add checkpoint_last to callbacks, or callbacks=default"
)
TRACE_FILE = "steps.jsonl"
"""Written by `gptpl.callbacks.records.StepTrace` in both runs."""
LOG_LINES = 15
"""Last lines of a part's log, shown when it fails."""

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to verify: the runs' settings, how far they train, and after which steps the second one stops.

    `stops` None: 3 random steps, drawn from `seed`. `kill`: it does not stop, but in the step after each of
    them a "process", or all of a "node", is killed, drawn from `seed`. Raises InputError for settings that
    cannot be.
    """

    overrides: Sequence[str]
    steps: int = DEFAULT_STEPS
    stops: Sequence[int] | None = None
    seed: int = 0
    kill: str | None = None
    config_dir: Folder | None = None

    def __post_init__(self) -> None:
        for key in map(key_of, self.overrides):
            if key in SET_HERE:
                raise InputError(f"{key} is set by verify-resume itself: leave it out")
        for name, value, least in (("steps", self.steps, 2), ("seed", self.seed, 0)):
            if value < least:
                raise InputError(f"verify.{name} must be {least} or more, got {value}")
        if self.kill not in (None, *KILLS):
            raise InputError(f"verify.kill must be null, {' or '.join(KILLS)}, got {self.kill}")
        if self.stops is not None:
            self._check_stops(self.stops, self.steps)

    def stops_before(self, last_step: int) -> list[int]:
        """The steps to stop after in a run that ends at `last_step`; InputError where it is too short."""
        least = self._first_stop + 1
        if last_step < least:
            raise InputError(
                f"the run ends at step {last_step}: train {least} steps or more to stop in between"
            )
        if self.stops is None:
            steps = range(self._first_stop, last_step)
            return sorted(random.Random(self.seed).sample(steps, min(DEFAULT_STOPS, len(steps))))
        self._check_stops(self.stops, last_step)
        return sorted(set(self.stops))

    @property
    def _first_stop(self) -> int:
        return 2 if self.kill else 1  # a kill may come while the step before it is being written

    def _check_stops(self, stops: Sequence[int], end: int) -> None:
        if not (len(stops) and all(self._first_stop <= stop < end for stop in stops)):
            raise InputError(
                f"verify.stops must be steps from {self._first_stop} to {end - 1}, before the run's end, got"
                f" {list(stops)}"
            )


def verify_resume(
    *overrides: str,
    steps: int = DEFAULT_STEPS,
    stops: Sequence[int] | None = None,
    seed: int = 0,
    kill: str | None = None,
    keep: str | Path | None = None,
    config_dir: Folder | None = None,
    say: Say = lambda text: None,
) -> "Comparison | None":
    """Train straight, train again with interruptions, and compare the two bit by bit.

    Every part is a process of its own. The first `steps` of the run's schedule are trained; `stops` are the
    steps to stop after, None: 3 random ones, drawn from `seed`; for `kill` see `Plan`. Both runs are left in
    the new folder `keep`, if one is given. `say` gets the progress.

    A launcher, such as torchrun, starts this once for each process of the runs: each starts its own process
    of every part, and these meet. They need a `keep` that all share.

    Returns None, having said why, where a part failed. Raises InputError for what cannot be verified.
    """
    plan = Plan(overrides=overrides, steps=steps, stops=stops, seed=seed, kill=kill, config_dir=config_dir)
    check_keeps_checkpoints(composed(overrides, config_dir=config_dir).cfg)
    with _signals_unwind(), _folder(keep) as folder:
        straight, stopped = folder / "straight", folder / "stopped"
        if not _train_all([("straight", plan.steps)], folder, plan, first=1, say=say):
            return None
        ends = plan.stops_before(int(_last_checkpoint(straight)[RESUME_KEY]["step"]))
        names = ["stopped", *("resumed" for _ in ends)]
        parts = list(zip(names, (*ends, plan.steps), strict=True))
        if not _train_all(parts, folder, plan, first=2, say=say):
            return None
        return compare(
            straight, stopped, steps=plan.steps, stops=ends, how="killed" if plan.kill else "stopped"
        )


def check_keeps_checkpoints(cfg: Config) -> None:
    """Raises InputError for a run that could not be resumed, as no callback keeps checkpoints."""
    targets = [str(callback.get("_target_")) for callback in cfg.callbacks.values() if callback]
    # Whether a callback of the user's own keeps them shows when it has run.
    if not any(each.endswith(".LastCheckpoint") or not each.startswith("gptpl.") for each in targets):
        raise InputError(NO_CHECKPOINT)


# --- the parts ------------------------------------------------------------------------------------------


def _train_all(parts: Sequence[tuple[str, int]], folder: Path, plan: Plan, *, first: int, say: Say) -> bool:
    """Train the parts in turn, each up to its step; returns whether all succeeded."""
    for number, (name, step) in enumerate(parts, start=first):
        say(f"part {number}{f'/{len(parts) + 1}' if first > 1 else ''}: {name}, to step {step} ...")
        began_seconds = time.monotonic()
        run_dir = folder / ("stopped" if name == "resumed" else name)
        kills = plan.kill if name != "straight" and step != plan.steps else None
        settings = [f"resume={run_dir}"]
        if name != "resumed":  # a new run: it writes which batches every step saw, and no clock ends it
            settings = [
                f"run_dir={run_dir}",
                "+callbacks.step_trace._target_=gptpl.callbacks.records.StepTrace",
                f"+callbacks.step_trace.path={quoted(str(run_dir / TRACE_FILE))}",
                *plan.overrides,
                "trainer.max_time=null",
                *(_KILLING if plan.kill else ()),
            ]
        if plan.kill:
            settings += [
                f"callbacks.kill_at.step={step if kills else 'null'}",
                f"callbacks.kill_at.kind={plan.kill}",
                f"callbacks.kill_at.seed={plan.seed + number}",
            ]
        if kills is None:
            settings.append(f"trainer.stop_at_step={step}")
        if not _train(settings, folder / f"part_{number}.log", plan, say, killed=kills is not None):
            return False
        if kills and is_first_process() and not (run_dir / KillAt.mark(step)).exists():
            say("  failed, and not because a process was killed: see its log with verify.keep=FOLDER")
            return False
        say(f"  {time.monotonic() - began_seconds:.0f} s{' until it was killed' if kills else ''}")
        if kills is None:
            _wait_for_the_first(run_dir)
        if not (run_dir / CHECKPOINT_FOLDER / LAST).exists():
            raise InputError(NO_CHECKPOINT)
    return True


def _train(overrides: list[str], log: Path, plan: Plan, say: Say, *, killed: bool) -> bool:
    """Train one part in a process of its own; returns whether it ended as it should, and says why if not."""
    own = ["--config-dir", str(plan.config_dir)] if plan.config_dir else []
    command = [sys.executable, "-m", "gptpl", "train", *own, *overrides]
    with log.open("w+b") if is_first_process() else tempfile.TemporaryFile() as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
        file.seek(0)
        lines = file.read().decode(errors="replace").splitlines()
    as_expected = bool(status) == killed
    if not as_expected:
        say("  ended, and should have been killed:" if killed else f"  failed with exit status {status}:")
        say("\n".join(f"  {line}" for line in lines[-LOG_LINES:]))
    return as_expected


_MOST_SECONDS = 600
"""How long the first process may take to end after the others."""


def _wait_for_the_first(run_dir: Path) -> None:
    """Wait until the run's first process, which may be on another machine, has recorded how it ended."""
    deadline = time.monotonic() + _MOST_SECONDS
    while not is_first_process() and not {"finished", "stopped"} & read_run_json(run_dir).keys():
        if time.monotonic() > deadline:
            raise InputError(f"{run_dir} is not there, or does not change: give a verify.keep that all share")
        time.sleep(0.1)


KILLS = ("process", "node")
"""What `verify.kill` can be."""
_KILLING = (
    "callbacks.checkpoint_last.every_n_steps=1",
    "+callbacks.kill_at._target_=gptpl.runs.verify.KillAt",
)
"""What a run needs whose processes are going to be killed."""


class KillAt(L.Callback):
    """Kills a process of the run, or all of a node, in the step after `step`, before the weights change."""

    def __init__(self, *, step: int | None, kind: str = "process", seed: int = 0) -> None:
        super().__init__()
        self.step = step
        self.kind = kind
        self.seed = seed

    @staticmethod
    def mark(step: int) -> str:
        """The name of the file that is left in the run's folder."""
        return f"killed_after_{step}"

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Kill this process, if it is one of them."""
        if self.step is None or trainer.global_step < self.step:
            return
        by_node = self.kind == "node"
        doomed = random.Random(self.seed).randrange(trainer.num_nodes if by_node else trainer.world_size)
        if (trainer.node_rank if by_node else trainer.global_rank) == doomed:
            (Path(trainer.default_root_dir) / self.mark(self.step)).touch()
            os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def _signals_unwind() -> Iterator[None]:
    """Make signals raise SystemExit here, so that the part that is running ends too, and its files go."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(SIGNAL_STATUS + number)

    with ExitStack() as stack:
        for number in SIGNALS:
            if number != signal.SIGINT and signal.getsignal(number) == signal.SIG_DFL:
                stack.callback(signal.signal, number, signal.signal(number, leave))
        yield


@contextmanager
def _folder(keep: str | Path | None) -> Iterator[Path]:
    if keep is None and (launcher := find_launcher()) is not None and launcher.world_size > 1:
        raise InputError(f"verify.keep is not set: {launcher} need a folder that all share, a new one")
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="gptpl-verify-", ignore_cleanup_errors=True) as temporary:
            yield Path(temporary)
        return
    folder = Path(keep).expanduser().absolute()
    if not is_first_process():  # which makes it
        yield folder
        return
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise InputError(f"verify.keep={folder} exists and is not empty: give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    yield folder


# --- the comparison -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What the two runs left, side by side.

    Attributes:
        steps: each step's trace in the straight run and in the other; {} where a run has none.
        digests: hashes of each part of the last checkpoint.
        columns: columns of metrics.csv that differ.
        last_step: of the straight run, which was to train `wanted_step` steps.
        stops: steps after which the other run stopped, or was killed.
        how: which of the two.
        config: the settings of the straight run.
    """

    steps: list[tuple[dict[str, Any], dict[str, Any]]]
    digests: dict[str, tuple[str, str]]
    columns: list[str]
    last_step: int
    wanted_step: int
    stops: list[int]
    config: dict[str, Any]
    how: str = "stopped"

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        pairs = (*self.steps, *self.digests.values())
        return bool(self.steps) and not self.columns and all(one == other for one, other in pairs)


def compare(
    straight: Path, stopped: Path, *, steps: int, stops: list[int], how: str = "stopped"
) -> Comparison:
    """Read what the two runs left in their folders."""

    def trace(run: Path) -> dict[int, dict[str, Any]]:
        lines = (run / TRACE_FILE).read_text(encoding="utf-8").splitlines()
        return {record["step"]: record for record in map(json.loads, lines)}

    ours, theirs = trace(straight), trace(stopped)
    one, other = _last_checkpoint(straight), _last_checkpoint(stopped)
    digests, others = state_digest(one), state_digest(other)
    return Comparison(
        steps=[(ours.get(step, {}), theirs.get(step, {})) for step in sorted(ours.keys() | theirs.keys())],
        digests={part: (digests[part], others[part]) for part in digests},
        columns=_different_columns(straight / "metrics.csv", stopped / "metrics.csv"),
        last_step=int(one[RESUME_KEY]["step"]),
        wanted_step=steps,
        stops=stops,
        how=how,
        config=one[HEADER_KEY]["config"],
    )


def _last_checkpoint(run: Path) -> dict[str, Any]:
    return read_checkpoint((run / CHECKPOINT_FOLDER / LAST).resolve())


def _different_columns(straight: Path, stopped: Path) -> list[str]:
    """Columns that differ in some row, without those measured by the clock."""

    def rows(path: Path) -> list[dict[str, str]]:
        if not path.exists():  # no such logger
            return []
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    pairs = list(zip_longest(rows(straight), rows(stopped), fillvalue=dict[str, str]()))
    names = dict.fromkeys(name for pair in pairs for row in pair for name in row)
    differ = [name for name in names if any(one.get(name) != other.get(name) for one, other in pairs)]
    return [name for name in differ if not name.endswith(("tokens_per_second", "mfu"))]


def report(comparison: Comparison) -> list[str]:
    """Lines: a table of the steps, one of the hashes, and the verdict."""

    def word(same: bool) -> str:
        return "same" if same else "DIFFERENT"

    def loss(record: dict[str, Any]) -> str:  # the mean over the micro-batches, with all digits of a double
        return repr(fmean(map(float.fromhex, record["losses"]))) if record else "no such step"

    rows = [["step", "batches", "loss straight", "loss stopped", ""]]
    for one, other in comparison.steps:
        step = one.get("step", other.get("step"))
        end = f"{word(one == other)}{f', then {comparison.how}' if step in comparison.stops else ''}"
        rows.append(
            [str(step), word(one.get("batches") == other.get("batches")), loss(one), loss(other), end]
        )
    hashes = [["state after the last step", "straight", "stopped", ""]]
    for part, (ours, theirs) in comparison.digests.items():
        hashes.append([part, ours[:12], theirs[:12], word(ours == theirs)])
    lines = [*table(rows), "", *table(hashes), ""]
    if comparison.columns:
        lines.append(f"metrics.csv differs in {', '.join(comparison.columns)}")
    if comparison.last_step < comparison.wanted_step:
        lines.append(
            f"the run ends at step {comparison.last_step}, before verify.steps={comparison.wanted_step}"
        )
    stops, how = ", ".join(map(str, comparison.stops)), comparison.how
    if comparison.same:
        return [
            *lines,
            f"identical: {how} after step {stops} and resumed, the run has the same bits",
        ]
    lines.append(f"DIFFERENT: {how} after step {stops} and resumed, the run has other bits")
    on_cpu = comparison.config.get("trainer", {}).get("accelerator") == "cpu"
    if torch.cuda.is_available() and not on_cpu and not comparison.config.get("deterministic"):
        lines.append("some GPU kernels add in no fixed order: try deterministic=true")
    return lines
