"""What a sweep (`gptpl train -m`) leaves behind: a table of its trials, sorted by validation loss."""

import csv
import logging
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

from gptpl.callbacks.stopping import RunStopped
from gptpl.errors import InputError

log = logging.getLogger(__name__)

RESULTS_FILE = "results.csv"
HEADER = ["trial", "overrides", "best_val_loss", "val_loss", "error"]


class SweepError(InputError):
    """Bad input that concerns the whole sweep and not one trial of it."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial: its overrides, and its losses or what went wrong."""

    number: int
    overrides: tuple[str, ...]
    val_loss: float
    best_val_loss: float
    error: str

    def row(self, *, without: frozenset[str] = frozenset()) -> list[str]:
        """The trial as a row of the table, some of its overrides left out."""
        return [
            str(self.number),
            " ".join(override for override in self.overrides if override not in without),
            _number(self.best_val_loss),
            _number(self.val_loss),
            self.error,
        ]


TRIAL_FAILURES = (
    ArithmeticError,
    HydraException,
    MisconfigurationException,
    OmegaConfBaseException,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What may go wrong in one trial without ending the sweep."""


class SweepTable:
    """Collects trials in a folder; a trial that fails is a row of its own, and the sweep goes on."""

    def __init__(self, folder: Path) -> None:
        self.trials: list[Trial] = []
        self._folder = folder

    def trial(self, train: Callable[[], dict[str, float]]) -> None:
        """Runs one trial and keeps its result; Ctrl-C ends the sweep after writing what there is."""
        hydra = HydraConfig.get()
        self._folder = Path(hydra.sweep.dir)  # the user's, where one was given
        metrics: dict[str, float] = {}
        failure = ""
        try:
            metrics = train()
        except SweepError:
            raise
        except TRIAL_FAILURES as error:
            lines = str(error).strip().splitlines()
            failure = f"{type(error).__name__}: {lines[0] if lines else ''}"
            log.warning("trial %s failed: %s", hydra.job.num, failure)
            _remove_if_empty(Path(hydra.runtime.output_dir))
        except (KeyboardInterrupt, RunStopped):
            self._write()
            raise
        self.trials.append(
            Trial(
                number=int(hydra.job.num),
                overrides=tuple(hydra.overrides.task),
                val_loss=metrics.get("val/loss", math.nan),
                best_val_loss=metrics.get("best_val/loss", metrics.get("val/loss", math.nan)),
                error=failure,
            )
        )
        self._write()

    def finish(self) -> int:
        """Prints the table of a sweep; the exit status is 1 if a trial failed, 0 otherwise."""
        if not self.trials:
            return 0
        # What all trials have in common says nothing about their order.
        common = frozenset.intersection(*(frozenset(trial.overrides) for trial in self.trials))
        without = common if len(self.trials) > 1 else frozenset()
        print("\n".join(table([HEADER, *(trial.row(without=without) for trial in self._sorted())])))
        print(f"\n{self._folder.absolute() / RESULTS_FILE}")
        return 1 if any(trial.error for trial in self.trials) else 0

    def discard_unused_folder(self) -> None:
        """Removes what Hydra made for a sweep that was refused before its first trial."""
        if not self.trials:
            (self._folder / "multirun.yaml").unlink(missing_ok=True)
            _remove_if_empty(*self._folder.glob("*"), self._folder, *self._folder.parents)

    def _sorted(self) -> list[Trial]:
        return sorted(self.trials, key=lambda t: (math.isnan(t.best_val_loss), t.best_val_loss))

    def _write(self) -> None:
        if not self.trials:
            return
        with (self._folder / RESULTS_FILE).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([HEADER, *(trial.row() for trial in self._sorted())])


def _remove_if_empty(*folders: Path) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def table(rows: list[list[str]]) -> list[str]:
    """Rows of equal length as lines with aligned columns."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"
