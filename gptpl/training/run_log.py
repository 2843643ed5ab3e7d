"""The log file in a run's folder: everything logged while the run is built and trained."""

import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

from gptpl.errors import InputError

LOG_FILE = "train.log"
WARNINGS = "py.warnings"
"""The name of the logger of Python warnings, as in `logging.captureWarnings`."""
IGNORED_WARNINGS = (
    ".*does not have many workers.*",  # a batch is a slice of an array: worker processes would not help
    r".*treespec, LeafSpec.*",  # Lightning 2.6 calls a deprecated function of torch
    ".*Checkpoint directory .* exists and is not empty.*",  # gptpl's callbacks clean up after themselves
)


RANKED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")
"""What torchrun, and others that set the same, tell every process."""
SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_NUM_NODES", "SLURM_NODEID")
"""What srun tells every process."""


def further_process() -> str:
    """Which process of a run this is, such as "rank 3"; empty for the first.

    By the variables that torchrun, SLURM or Lightning set.
    """
    environ = os.environ
    of_srun = {*SLURM} <= environ.keys() and not {*RANKED} <= environ.keys()  # RANK is left from elsewhere
    ranks = [] if of_srun else [environ.get("RANK", "")]
    if (of_srun or "LOCAL_RANK" not in environ) and "SLURM_NTASKS" in environ:
        ranks.append(environ.get("SLURM_PROCID", ""))
    if (rank := next(filter(str.isdecimal, ranks), None)) is not None:
        return f"rank {int(rank)}" if int(rank) else ""
    places = {"node": environ.get("NODE_RANK"), "local rank": environ.get("LOCAL_RANK")}
    return ", ".join(f"{name} {value}" for name, value in places.items() if value not in (None, "", "0"))


def is_first_process() -> bool:
    """Whether this is rank 0."""
    return not further_process()


class RunLogFile(logging.StreamHandler[TextIO]):
    """Writes what is logged within its context to the run's `train.log`, and shows nothing.

    Until `open` the lines are kept in memory: a run that is refused leaves nothing behind. The context may be
    entered again: a run is built first and trained later. On exit, levels, handlers and the display of
    warnings are restored; meanwhile other handlers get the same records as before. With `whole_process` it
    listens to the root logger, else to the loggers of gptpl and Lightning and to Python's warnings.
    """

    def __init__(self, *, whole_process: bool = False) -> None:
        super().__init__(io.StringIO())
        self.whole_process = whole_process
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
        self.addFilter(lambda record: record.levelno >= logging.WARNING or record.name[:10] != "lightning.")
        self._stack = ExitStack()

    def open(self, folder: Path) -> None:
        """Append the lines so far to the folder's `train.log`, and all that follow; on rank 0 only.

        Raises InputError where the name is taken by anything but a file: a link could lead out of the folder.
        """
        if not is_first_process() or not isinstance(self.stream, io.StringIO):
            return
        path = folder / LOG_FILE
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise InputError(f"{path} must be a plain file, not a link, folder or device: move it away")
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
        file = os.fdopen(os.open(path, flags, 0o666), "a", encoding="utf-8")
        file.write(self.stream.getvalue())
        self.setStream(file)

    def __enter__(self) -> "RunLogFile":
        with ExitStack() as stack:
            if self.whole_process:
                stack.enter_context(_heard("", self))
            else:
                stack.enter_context(_heard("gptpl", self, level=logging.INFO))
                for name in ("lightning.pytorch", "lightning.fabric"):
                    stack.enter_context(_heard(name, self))
                stack.enter_context(_warnings_heard(self))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        if not isinstance(file := self.stream, io.StringIO):
            self.setStream(io.StringIO())
            file.close()


class _Above(logging.Handler):
    """Passes on to the parent loggers only records above the level that a logger had before."""

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__(logger.getEffectiveLevel())
        self._above = logger.parent or logging.root

    def emit(self, record: logging.LogRecord) -> None:
        self._above.callHandlers(record)


@contextmanager
def _heard(name: str, handler: logging.Handler, *, level: int | None = None) -> Iterator[None]:
    """Add the handler to a logger; it gets records from `level` on, whatever the level of the logger."""
    logger = logging.getLogger(name)
    level_before, propagate_before = logger.level, logger.propagate
    above = _Above(logger) if logger.propagate and logger.parent else None
    logger.addHandler(handler)
    if above is not None:
        logger.addHandler(above)
        logger.propagate = False
    if level is not None and logger.getEffectiveLevel() > level:
        logger.setLevel(level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        if above is not None:
            logger.removeHandler(above)
            logger.propagate = propagate_before
        logger.setLevel(level_before)


@contextmanager
def _warnings_heard(handler: logging.Handler) -> Iterator[None]:
    """Show warnings as before, and pass them to the handler, too."""
    with warnings.catch_warnings():
        ignore_known_warnings()
        shown_before = warnings.showwarning

        def show(message: Any, category: Any, filename: str, lineno: int, *more: Any) -> None:
            text = warnings.formatwarning(message, category, filename, lineno)
            warning = {"name": WARNINGS, "levelno": logging.WARNING, "levelname": "WARNING", "msg": text}
            handler.handle(logging.makeLogRecord(warning))
            shown_before(message, category, filename, lineno, *more)

        warnings.showwarning = show  # type: ignore[assignment]  # mypy wants all names
        yield


def ignore_known_warnings() -> None:
    """Hide warnings that the user can do nothing about."""
    for message in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
