"""What is sent to a run's loggers, and the loggers that write into its folder: `tensorboard/`, `metrics.csv`.

Numbers go through Lightning's own `log_metrics`; texts, pictures, tables and settings through the functions
here, which know TensorBoard, Weights & Biases and MLflow. Our loggers can return to their state at a
checkpoint, so that a resumed run logs no point twice and loses none.
"""

import csv
import io
import logging
import os
import time
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from gptpl.errors import InputError
from gptpl.files.durable import sync_folder, write_atomically
from gptpl.training.lightning_internals import leave_tensorflow_alone

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)

Pixels = npt.NDArray[np.uint8]
"""(height, width, 3) RGB."""
Texts = Sequence[str]
Rows = Sequence[Texts]

# --- what is sent ---------------------------------------------------------------------------------------


@rank_zero_only
def log_text(loggers: Iterable[Logger], name: str, text: str, step: int) -> None:
    """Show a text in Markdown; a user's logger gets it by its method `log_text(name, text, step)`, if any."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(name, text, global_step=step)
        elif isinstance(logger, WandbLogger):
            logger.log_text(name, columns=["text"], data=[[text]], step=step)
        elif isinstance(logger, MLFlowLogger):
            mlflow_text(logger, name, text, step)
        elif method := getattr(logger, "log_text", None):
            method(name, text, step)


@rank_zero_only
def log_image(loggers: Iterable[Logger], name: str, pixels: Pixels, step: int) -> None:
    """Show a picture; a user's logger gets it by its method `log_image(name, pixels, step)`, if any."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, pixels, step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, [pixels], step)
        elif isinstance(logger, MLFlowLogger):
            mlflow_image(logger, name, pixels, step)
        elif method := getattr(logger, "log_image", None):
            method(name, pixels, step)


@rank_zero_only
def log_table(loggers: Iterable[Logger], name: str, columns: Texts, rows: Rows, step: int) -> None:
    """Show rows of texts with any characters; a user's logger has `log_table(name, columns, rows, step)`."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(name, _in_markdown(columns, rows), global_step=step)
        elif isinstance(logger, WandbLogger):
            logger.log_table(name, list(columns), [list(row) for row in rows], step=step)
        elif isinstance(logger, MLFlowLogger):
            mlflow_table(logger, name, columns, rows, step)
        elif method := getattr(logger, "log_table", None):
            method(name, columns, rows, step)


@rank_zero_only
def log_hyperparameters(
    loggers: Iterable[Logger], settings: Mapping[str, Any], metrics: Mapping[str, float], step: int
) -> None:
    """Show settings, and the metrics reached with them; empty `settings` have been shown before."""
    for logger in loggers:
        if isinstance(logger, MetricsCSVLogger):
            continue  # config.yaml has them
        if settings and isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(dict(settings), dict(metrics), step)
        else:
            if settings:
                logger.log_hyperparams(dict(settings))
            logger.log_metrics(dict(metrics), step)


def _in_markdown(columns: Texts, rows: Rows) -> str:
    """Cells under the names of their columns.

    They are indented rather than fenced, so that no character acts as Markdown or HTML: a text can hold a
    fence, but cannot leave its indentation.
    """
    parts = []
    for row in rows:
        for column, cell in zip(columns, row, strict=True):
            parts += [f"**{column}**", "\n".join(f"    {line}" for line in cell.splitlines() or [""])]
    return "\n\n".join(parts)


def mlflow_text(logger: Any, name: str, text: str, step: int, *, ending: str = "md") -> None:
    """A text as the artifact `<name>/step-<step>.md`; `experiment` of the logger is MLflow's client."""
    logger.experiment.log_text(logger.version, text, f"{name}/step-{step:08d}.{ending}")


def mlflow_image(logger: Any, name: str, pixels: Pixels, step: int) -> None:
    """A picture as MLflow's own image."""
    logger.experiment.log_image(logger.version, pixels, key=name, step=step)


def mlflow_table(logger: Any, name: str, columns: Texts, rows: Rows, step: int) -> None:
    """Rows of texts as the artifact `<name>/step-<step>.csv`: MLflow's own log_table needs pandas."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([columns, *rows])
    mlflow_text(logger, name, text.getvalue(), step, ending="csv")


FLUSH_SECONDS = 1.0
"""How long events may wait in memory; a resumed run logs again what a killed one took with it."""

# --- loggers --------------------------------------------------------------------------------------------


@runtime_checkable
class ResumableLogger(Protocol):
    """A logger that can forget what was logged after a checkpoint."""

    def position(self) -> dict[str, Any]:
        """Where the log ends, as plain data for a checkpoint: cheap at every step, empty on ranks but 0."""

    def sync(self) -> None:
        """Bring everything logged so far to the disk, where it survives a power cut."""

    def return_to(self, position: dict[str, Any]) -> None:
        """Forget what was written after `position` was taken, if possible; before anything is logged.

        An empty one changes nothing. Log a warning where something from before it is missing.
        """


class RunTensorBoardLogger(TensorBoardLogger):
    """Lightning's TensorBoard logger, writing to `<save_dir>/tensorboard`.

    A resumed run cuts the event files back to their sizes at the checkpoint, and adds a file of its own.
    (SummaryWriter's own `purge_step` goes by whole steps: of the checkpoint's step it would drop the training
    loss, which is not logged again, or show the evaluation twice, which is.)
    """

    def __init__(self, *, save_dir: str) -> None:
        super().__init__(save_dir=save_dir, name="", version="tensorboard", default_hp_metric=False)
        self._sizes: dict[str, int] | None = None  # of the event files, at the last look into the folder
        self._saved_seconds = -FLUSH_SECONDS

    @property
    @rank_zero_experiment
    def experiment(self) -> "SummaryWriter":
        """torch's SummaryWriter, created when it is first used, with an event file of its own."""
        if self._experiment is None:
            leave_tensorflow_alone()
            # Here, because TensorBoard takes a while to import.
            from gptpl.training.event_file import OrderedSummaryWriter

            self._experiment = OrderedSummaryWriter(log_dir=self.log_dir)
        return self._experiment

    @rank_zero_only
    def log_hyperparams(
        self,
        params: dict[str, Any] | Namespace,
        metrics: dict[str, Any] | None = None,
        step: int | None = None,
    ) -> None:
        """Show settings on one level, and metrics next to them, in the HPARAMS tab.

        Lightning adds a summary of the experiment, and TensorBoard takes the first run's for that of all.
        Without one it shows the settings of all runs, those that differ first.
        """
        from torch.utils.tensorboard.summary import hparams

        given = vars(params) if isinstance(params, Namespace) else params
        self.hparams.update(given)
        if metrics:
            self.log_metrics(metrics, step)
            _, start, end = hparams(given, metrics)  # type: ignore[no-untyped-call]
            for summary in (start, end):
                self.experiment.file_writer.add_summary(summary, step)

    def position(self) -> dict[str, Any]:
        """`{"files": {...}}`: the size in bytes of every event file, by its path below the folder."""
        if not _is_rank_zero():
            return {}
        writer = getattr(self._experiment, "file_writer", None)  # None also of a closed one
        if self._sizes is None or writer is None:
            self._sizes = {name: path.stat().st_size for name, path in self._event_files().items()}
        if writer is not None:  # no other file grows
            own = writer.event_writer
            self._sizes[own.path.relative_to(self.log_dir).as_posix()] = own.size
        return {"files": dict(self._sizes)}

    @rank_zero_only
    def save(self) -> None:
        """Flush the events now and then; Lightning calls this after every step."""
        if time.monotonic() - self._saved_seconds >= FLUSH_SECONDS:
            super().save()
            self._saved_seconds = time.monotonic()

    @rank_zero_only
    def sync(self) -> None:
        """See `ResumableLogger`."""
        if self._experiment is not None:
            self._experiment.flush()
        self._sizes = None
        files = self._event_files().values()
        for path in files:
            with path.open("rb+") as file:  # Windows syncs only files that are open for writing
                os.fsync(file.fileno())
        for folder in {path.parent for path in files}:
            sync_folder(folder)

    @rank_zero_only
    def return_to(self, position: dict[str, Any]) -> None:
        """Cut the event files back to their sizes, and delete younger files."""
        if "files" not in position:
            return
        files = self._event_files()
        for name, path in files.items():
            size = position["files"].get(name)
            if size is None:
                path.unlink()
            elif size < path.stat().st_size:
                os.truncate(path, size)
        for name, size in position["files"].items():
            if name not in files or files[name].stat().st_size < size:
                lost = "shorter than it was" if name in files else "missing"
                path = Path(self.log_dir, name)
                log.warning("%s is %s: some points are lost, training is not affected", path, lost)

    def _event_files(self) -> dict[str, Path]:
        """The event files by their paths below the folder."""
        folder = Path(self.log_dir)
        paths = sorted(path for path in folder.rglob("*tfevents*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path for path in paths}


class MetricsCSVLogger(Logger):
    """`<save_dir>/metrics.csv`: one row for each optimizer step, with everything that was logged at it.

    Lightning's CSVLogger deletes an existing file, so a resumed run would lose its past. This one keeps it:
    rows of the same step become one row, and new columns are added at the right. The file is replaced
    atomically: every `flush_every_n_steps` steps (in a long run at each hundredth of its steps, or it would
    be written thousands of times), for a checkpoint, and at the end, also when the run is interrupted.
    """

    name, version, save_dir = "csv", "", ""

    def __init__(self, *, save_dir: str, flush_every_n_steps: int = 10) -> None:
        super().__init__()
        self.save_dir = save_dir
        self._path = Path(save_dir) / "metrics.csv"
        self._flush_every_n_steps = flush_every_n_steps
        self._rows: dict[int, dict[str, str | float]] | None = None
        self._columns: list[str] = []
        self._unsaved_steps: set[int] = set()
        self._last_step: int | None = None

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: `config.yaml` has them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add numbers to the row of `step`."""
        number = int(step or 0)
        row = self._loaded().setdefault(number, {})
        row.update({name: value for name, value in metrics.items() if name != "epoch"})
        self._columns += [name for name in row if name not in self._columns]
        self._unsaved_steps.add(number)
        self._last_step = number if self._last_step is None else max(number, self._last_step)

    def position(self) -> dict[str, Any]:
        """The number of rows, the columns, and the last row with its step, its numbers as in the file."""
        if not _is_rank_zero():
            return {}
        rows, step = self._loaded(), self._last_step
        last = {} if step is None else {name: str(value) for name, value in rows[step].items()}
        return {"step": step, "rows": len(rows), "row": last, "columns": list(self._columns)}

    @rank_zero_only
    def sync(self) -> None:
        """See `ResumableLogger`."""
        if self._unsaved_steps:
            self._write()

    @rank_zero_only
    def return_to(self, position: dict[str, Any]) -> None:
        """Drop the rows after the last of `position`, and what was added to that one."""
        before, columns = self._loaded(), list(self._columns)
        if not position:
            return
        last = -1 if position["step"] is None else position["step"]
        self._columns = list(position["columns"])
        self._rows = {
            step: {name: value for name, value in row.items() if name in self._columns}
            for step, row in before.items()
            if step <= last
        }
        self._last_step = position["step"]
        if position["step"] is not None:
            self._rows[last] = dict(position["row"])
        if (lost := position["rows"] - len(self._rows)) > 0:
            log.warning("%s lacks %d rows that it had: training is not affected", self._path, lost)
        if (before, columns) != (self._rows, self._columns):
            self._write()

    def _loaded(self) -> dict[int, dict[str, str | float]]:
        if self._rows is None:
            self._columns, self._rows = _table(self._path) if self._path.exists() else ([], {})
            self._last_step = max(self._rows, default=None)
        return self._rows

    @rank_zero_only
    def save(self) -> None:
        """Write the file if enough steps are unsaved; Lightning calls this after every step."""
        if len(self._unsaved_steps) >= max(self._flush_every_n_steps, len(self._loaded()) // 100):
            self._write()

    def _write(self) -> None:
        rows = self._loaded()
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=["step", *self._columns])
        writer.writeheader()
        writer.writerows({"step": step, **rows[step]} for step in sorted(rows))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path, text.getvalue(), durable=True)
        self._unsaved_steps.clear()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is left."""
        self.sync()


def _is_rank_zero() -> bool:
    return rank_zero_only.rank == 0  # type: ignore[attr-defined]


def _table(path: Path) -> tuple[list[str], dict[int, dict[str, str | float]]]:
    """Columns, and the cells of each step's row. Raises InputError for a file that is cut off or edited."""
    try:
        text = path.read_bytes().decode("utf-8")
        columns, *rows = csv.reader(io.StringIO(text, newline=""), strict=True)
        filled: dict[int, dict[str, str | float]] = {
            int(step): {name: cell for name, cell in zip(columns[1:], cells, strict=True) if cell}
            for step, *cells in rows
        }
        for row in filled.values():
            for cell in row.values():
                float(cell)
        if not text.endswith("\n") or columns[:1] != ["step"]:
            raise ValueError("cut off")
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(
            f"{path} is not a complete table of numbers: move it away to continue without its earlier rows"
        ) from error
    return columns[1:], filled
