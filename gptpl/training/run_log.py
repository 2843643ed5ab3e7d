"""The log file of a run: what is said while the run is built and trained, in its folder."""

import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TextIO

from gptpl.errors import InputError

LOG_FILE = "train.log"
WARNINGS = "py.warnings"
"""The logger's name of records that are Python warnings, as `logging.captureWarnings` has it."""
IGNORED_WARNINGS = (
    ".*does not have many workers.*",  # a batch is a slice of an array: worker processes would only cost
    r".*treespec, LeafSpec.*",  # Lightning 2.6 asks torch about tree specs in the old way
    ".*Checkpoint directory .* exists and is not empty.*",  # gptpl's callbacks keep their own folder tidy
)


def is_first_process() -> bool:
    """Whether this process speaks for the run: by its environment, before torch.distributed is set up."""
    return all(os.environ.get(name, "0") == "0" for name in ("LOCAL_RANK", "NODE_RANK"))


class RunLogFile(logging.StreamHandler[TextIO]):
    """Writes to the run's `train.log` what is logged while it is entered, and shows nothing.

    Until `open` the lines are kept in memory: a run that is refused leaves nothing behind. It may be entered
    again, as by building a run and fitting it later. On exit, levels, handlers and the showing of warnings
    are as they were; meanwhile other handlers get what they got before. A run with the `whole_process` to
    itself hears the root logger; another gptpl's and Lightning's loggers and Python's warnings.
    """

    def __init__(self, *, whole_process: bool = False) -> None:
        super().__init__(io.StringIO())
        self.whole_process = whole_process
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
        self.addFilter(lambda record: record.levelno >= logging.WARNING or record.name[:10] != "lightning.")
        self._stack = ExitStack()

    def open(self, folder: Path) -> None:
        """Appends what was kept to the folder's `train.log`, and from now on what is heard.

        The first process of a run alone has a file. Raises InputError where the name is taken by anything but
        a file: a link could lead out of the folder.
        """
        if not is_first_process() or not isinstance(self.stream, io.StringIO):
            return
        file = _opened_to_append(folder / LOG_FILE)
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
    """Gives the loggers above a logger what they got of it before its level was lowered."""

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__(logger.getEffectiveLevel())
        self._above = logger.parent or logging.root

    def emit(self, record: logging.LogRecord) -> None:
        self._above.callHandlers(record)


@contextmanager
def _heard(name: str, handler: logging.Handler, *, level: int | None = None) -> Iterator[None]:
    """Adds the handler to a logger; records of `level` reach it, whatever the logger let through."""
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
    """Shows warnings as before, and gives them to the handler, too."""
    with warnings.catch_warnings():
        ignore_known_warnings()
        shown_before = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if file is None:
                text = warnings.formatwarning(message, category, filename, lineno, line)
                warning = {"name": WARNINGS, "levelno": logging.WARNING, "levelname": "WARNING", "msg": text}
                handler.handle(logging.makeLogRecord(warning))
            shown_before(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield


def ignore_known_warnings() -> None:
    """Leaves out warnings that ask nothing of the user."""
    for message in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def _opened_to_append(path: Path) -> TextIO:
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise InputError(f"{path} must be a plain file, not a link, folder or device: move it away")
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
    return os.fdopen(os.open(path, flags, 0o666), "a", encoding="utf-8")
