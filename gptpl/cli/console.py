"""Where log lines go: the terminal (standard error) and the run's log file."""

import logging
import logging.handlers
import os
import re
import sys
import warnings
from pathlib import Path

LOG_FILE = "train.log"
_BUFFERED_RECORDS = 100_000


class _PlainFormatter(logging.Formatter):
    """The bare message; warnings and errors say what they are, but not in which line of which package."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.name == "py.warnings":
            text = re.sub(r"^.*?:\d+: (?:\w*Warning: )?", "", text).partition("\n")[0]
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


class _CurrentStderr(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to whatever `sys.stderr` is at the moment, as progress bars replace it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class RunLog:
    """Logging of one run: to standard error at once, to the run's log file as soon as there is a run folder.

    Until `open_file`, lines for the file are kept in memory, so that a run refused for bad input leaves
    nothing behind. On other ranks than the first only errors are shown and no file is written.
    """

    def __init__(self) -> None:
        self._root = logging.getLogger()
        self._level_before = self._root.level
        self._handlers_before = list(self._root.handlers)
        first = os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("NODE_RANK", "0") == "0"
        console = _CurrentStderr()
        console.setFormatter(_PlainFormatter("%(message)s"))
        console.setLevel(logging.INFO if first else logging.ERROR)
        self._buffer = logging.handlers.MemoryHandler(
            _BUFFERED_RECORDS, flushLevel=logging.CRITICAL + 1, flushOnClose=False
        )
        self._file: logging.FileHandler | None = None
        self._root.handlers = [*self._handlers_before, console, *([self._buffer] if first else [])]
        self._root.setLevel(logging.INFO)
        logging.captureWarnings(True)
        quiet_third_parties()

    def open_file(self, folder: Path) -> None:
        """Writes what was kept to `train.log` in the folder, and everything from now on."""
        if self._buffer not in self._root.handlers:
            return
        self._file = logging.FileHandler(folder / LOG_FILE, encoding="utf-8")
        self._file.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
        self._buffer.setTarget(self._file)
        self._buffer.flush()
        self._root.handlers = [
            self._file if handler is self._buffer else handler for handler in self._root.handlers
        ]

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Puts logging back as it was."""
        logging.captureWarnings(False)
        self._root.handlers = self._handlers_before
        self._root.setLevel(self._level_before)
        if self._file is not None:
            self._file.close()


def quiet_third_parties() -> None:
    """Leaves the terminal to what concerns the run."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "matplotlib", "urllib3", "hydra"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # A batch is a slice of an array: worker processes would only cost.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Lightning 2.6 asks torch about tree specs in the old way.
    warnings.filterwarnings("ignore", message=r".*treespec, LeafSpec.*")
    # gptpl's callbacks keep their own folder tidy.
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
