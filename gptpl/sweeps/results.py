"""`results.csv`: a row a trial, the best first."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gptpl.files.whole import write_atomically
from gptpl.records.run_record import RunError, read_run
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
        best, last = result.loss, math.nan
        try:
            run = read_run(folder / result.folder)
        except RunError as error:  # its row says at least how it ended
            if result.state == "finished":
                result = replace(result, error=str(error))
        else:
            best = best if run.best is None else run.best.val_loss
            last = last if run.last is None else run.last.val_loss
        found.append(Row(result=result, best_val_loss=best, val_loss=last))
    return sorted(found, key=lambda row: row.rank)


def write_results(folder: Path, table: Sequence[Row]) -> Path:
    """Writes the file, in one move; returns its path."""
    path = folder / RESULTS_FILE
    text = io.StringIO(newline="")
    csv.writer(text).writerows([HEADER, *(row.cells() for row in table)])
    write_atomically(path, text.getvalue())
    return path


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"
