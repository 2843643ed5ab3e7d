"""Compares a run that was stopped and resumed with one that was not, and says what it found."""

import csv
import json
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from gptpl.text import table
from gptpl.training.checkpoint import HEADER_KEY, read_checkpoint
from gptpl.training.checkpoint_files import LAST
from gptpl.training.resume_state import RESUME_KEY
from gptpl.training.state_digest import state_digest

TRACE_FILE = "steps.jsonl"
"""Where `gptpl.callbacks.step_trace.StepTrace` writes in both runs."""
_SHOWN = 12
"""Digits shown of a hash."""


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
        steps = bool(self.steps) and all(one == other for one, other in self.steps)
        return steps and not self.columns and all(one == other for one, other in self.digests.values())


def compare(straight: Path, stopped: Path, *, steps: int, stops: list[int]) -> Comparison:
    """Reads what the two runs left in their folders."""
    ours, theirs = _trace(straight), _trace(stopped)
    numbers = sorted(ours.keys() | theirs.keys())
    one, other = (read_checkpoint((run / "checkpoints" / LAST).resolve()) for run in (straight, stopped))
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
    return int(read_checkpoint((run / "checkpoints" / LAST).resolve())[RESUME_KEY]["step"])


def _trace(run: Path) -> dict[int, dict[str, Any]]:
    lines = (run / TRACE_FILE).read_text(encoding="utf-8").splitlines()
    return {record["step"]: record for record in map(json.loads, lines)}


def _different_columns(straight: Path, stopped: Path) -> list[str]:
    """Columns with other texts in some row; what is measured by the clock is none of them."""
    if not straight.exists() and not stopped.exists():  # no such logger
        return []
    ours, theirs = _rows(straight), _rows(stopped)
    names = dict.fromkeys(name for row in (*ours, *theirs) for name in row)
    none: dict[str, str] = {}
    pairs = list(zip_longest(ours, theirs, fillvalue=none))
    differ = [name for name in names if any(one.get(name) != other.get(name) for one, other in pairs)]
    return [name for name in differ if not name.endswith(("tokens_per_second", "mfu"))]


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def report(comparison: Comparison) -> list[str]:
    """Lines: a table of the steps, one of the hashes, and the verdict."""
    rows = [["step", "batches", "loss straight", "loss stopped", ""]]
    rows += [_step_row(one, other, comparison.stops) for one, other in comparison.steps]
    hashes = [["state after the last step", "straight", "stopped", ""]]
    for part, (one, other) in comparison.digests.items():
        hashes.append([part, one[:_SHOWN], other[:_SHOWN], _word(one == other)])
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
    if _may_be_undetermined(comparison.config):
        lines.append("some GPU kernels add in no fixed order: try deterministic=true")
    return lines


def _may_be_undetermined(config: dict[str, Any]) -> bool:
    """Whether the run was on a GPU, without the kernels that give the same bits every time."""
    on_cpu = config.get("trainer", {}).get("accelerator") == "cpu"
    return torch.cuda.is_available() and not on_cpu and not config.get("deterministic")


def _step_row(one: dict[str, Any], other: dict[str, Any], stops: list[int]) -> list[str]:
    step = one.get("step", other.get("step"))
    same = one == other
    where = f"{_word(same)}, then stopped" if step in stops else _word(same)
    batches = _word(one.get("batches") == other.get("batches"))
    return [str(step), batches, _loss(one), _loss(other), where]


def _loss(record: dict[str, Any]) -> str:
    """The mean over the micro-batches, to all the digits that a double has."""
    if not record:
        return "no such step"
    return repr(fmean(float.fromhex(loss) for loss in record["losses"]))


def _word(same: bool) -> str:
    return "same" if same else "DIFFERENT"
