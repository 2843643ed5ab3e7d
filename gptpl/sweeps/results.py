"""`results.csv`: a row a trial, the best first."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gptpl.records.run_record import RunError, is_run, read_run
from gptpl.records.sweep_folder import RESULTS_FILE
from gptpl.sweeps.study import TrialResult

HEADER = ("trial", "overrides", "state", "best_val_loss", "val_loss", "error")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A trial with its losses, in nats per token; NaN where there is none."""

    result: TrialResult
    best_val_loss: float
    val_loss: float

    @property
    def rank(self) -> tuple[bool, bool, float]:
        """What rows are sorted by: trials that have ended well first, then those with a loss."""
        ended = self.result.state == "finished"
        return not ended, math.isnan(self.best_val_loss), self.best_val_loss

    def cells(self) -> list[str]:
        """In the order of `HEADER`."""
        result = self.result
        losses = [_number(self.best_val_loss), _number(self.val_loss)]
        return [result.folder, " ".join(result.overrides), result.state, *losses, result.error]


def rows(folder: Path, results: Sequence[TrialResult]) -> list[Row]:
    """The trials of the sweep in a folder with what their runs measured, sorted."""
    found = []
    for result in results:
        best = last = math.nan
        try:
            run = read_run(folder / result.folder) if is_run(folder / result.folder) else None
        except RunError:
            run = None  # its row says at least how it ended
        if run is not None and run.best is not None and run.last is not None:
            best, last = run.best.val_loss, run.last.val_loss
        found.append(Row(result=result, best_val_loss=best, val_loss=last))
    return sorted(found, key=lambda row: row.rank)


def write_results(folder: Path, table: Sequence[Row]) -> Path:
    """Writes the file, in one move; returns its path."""
    path = folder / RESULTS_FILE
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([HEADER, *(row.cells() for row in table)])
    temporary.replace(path)
    return path


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"
