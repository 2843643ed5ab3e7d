"""Loggers that write where a run's reader looks: `tensorboard/` and `metrics.csv` in the run folder."""

import csv
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only


class RunTensorBoardLogger(TensorBoardLogger):
    """Lightning's TensorBoard logger, writing to `<save_dir>/tensorboard`; a resumed run adds to it."""

    def __init__(self, *, save_dir: str) -> None:
        super().__init__(save_dir=save_dir, name="", version="tensorboard", default_hp_metric=False)


class MetricsCSVLogger(Logger):
    """`<save_dir>/metrics.csv`: one row an optimizer step, with everything that was logged at it.

    Lightning's CSVLogger deletes an existing file, so a resumed run would lose its past. This one keeps it:
    rows of the same step become one row, and new columns are added at the right. The file is replaced
    atomically: every `flush_every_n_steps` steps (in a long run every hundredth part of its steps, or it
    would be written thousands of times) and at the end, also of a run that is broken off.
    """

    def __init__(self, *, save_dir: str, flush_every_n_steps: int = 10) -> None:
        super().__init__()
        self._path = Path(save_dir) / "metrics.csv"
        self._flush_every_n_steps = flush_every_n_steps
        self._rows: dict[int, dict[str, str | float]] | None = None
        self._columns: list[str] = []
        self._unsaved_steps: set[int] = set()

    @property
    def name(self) -> str:
        """A fixed name: there is one such file a run."""
        return "csv"

    @property
    def version(self) -> str:
        """None are counted: the run folder is the version."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self._path.parent)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: they stand in `config.yaml`."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Adds numbers to the row of `step`."""
        row = self._loaded().setdefault(int(step or 0), {})
        row.update({name: value for name, value in metrics.items() if name != "epoch"})
        self._columns += [name for name in row if name not in self._columns]
        self._unsaved_steps.add(int(step or 0))

    def _loaded(self) -> dict[int, dict[str, str | float]]:
        if self._rows is None:
            self._rows = {}
            if self._path.is_file():
                with self._path.open(newline="", encoding="utf-8") as file:
                    reader = csv.DictReader(file)
                    self._columns = [name for name in reader.fieldnames or () if name != "step"]
                    for row in reader:
                        filled = {name: value for name, value in row.items() if name != "step" and value}
                        self._rows[int(row["step"])] = dict(filled)
        return self._rows

    @rank_zero_only
    def save(self) -> None:
        """Writes the file if enough has come together; Lightning asks after every step."""
        if len(self._unsaved_steps) >= max(self._flush_every_n_steps, len(self._loaded()) // 100):
            self._write()

    def _write(self) -> None:
        """Writes the file anew and puts it in the place of the old one."""
        rows = self._loaded()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".csv.tmp")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=["step", *self._columns])
            writer.writeheader()
            writer.writerows({"step": step, **rows[step]} for step in sorted(rows))
        temporary.replace(self._path)
        self._unsaved_steps.clear()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Writes what is left."""
        if self._unsaved_steps:
            self._write()
