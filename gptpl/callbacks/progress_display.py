"""Two ways to show progress: a bar at the foot of a terminal, and log lines for everything else."""

import logging
import math
import os
import sys
import time
from typing import Any, Protocol, TextIO

from tqdm import tqdm
from tqdm.contrib import DummyTqdmFile

log = logging.getLogger(__name__)

REDRAW_SECONDS = 0.2


class Display(Protocol):
    """Shows how far a count has come."""

    def due(self) -> bool:
        """Whether it is time to `show` again; asked first, it saves the work of preparing the text."""

    def show(self, done: int, text: str) -> None:
        """Show the count and the text beside it, due or not."""

    def write(self, text: str) -> None:
        """Put text on standard output, exactly as given."""

    def close(self) -> None:
        """Leave the last state standing and give the terminal back."""


def open_display(unit: str, *, total: int | None, initial: int = 0, log_every_seconds: float) -> Display:
    """The display that suits standard error.

    Args:
        unit: what is counted, such as "step".
        total: how far the count goes, None where it is not known.
        initial: where the count starts.
        log_every_seconds: pause between log lines, where standard error is no terminal.
    """
    if _is_terminal(sys.stderr):
        return TerminalBar(unit, total=total, initial=initial)
    return LogLines(unit, total=total, every_seconds=log_every_seconds)


class TerminalBar:
    """One bar, redrawn in place on standard error.

    While it is open, the log handlers that write to the terminal write above it.
    """

    def __init__(self, unit: str, *, total: int | None, initial: int) -> None:
        self._bar = tqdm(
            total=total,
            initial=initial,
            file=sys.stderr,
            bar_format=unit + " {n_fmt}/{total_fmt} |{bar}| {desc}",
            dynamic_ncols=True,
        )
        self._shown_at = -math.inf
        self._streams = [(handler, handler.stream) for handler in _terminal_handlers()]
        for handler, stream in self._streams:
            handler.setStream(DummyTqdmFile(stream))

    def due(self) -> bool:
        """True a few times a second."""
        return time.monotonic() - self._shown_at >= REDRAW_SECONDS

    def show(self, done: int, text: str) -> None:
        """Redraw the bar."""
        self._bar.n = done
        self._bar.set_description_str(text, refresh=False)
        self._bar.refresh()
        self._shown_at = time.monotonic()

    def write(self, text: str) -> None:
        """Write above the bar."""
        tqdm.write(text, file=sys.stdout, end="")

    def close(self) -> None:
        """End the bar's line and let the log handlers write as before."""
        self._bar.close()
        for handler, stream in self._streams:
            handler.setStream(stream)


class LogLines:
    """A log line now and then, without control characters: for files and pipes."""

    def __init__(self, unit: str, *, total: int | None, every_seconds: float) -> None:
        self._unit = unit
        self._total = "?" if total is None else total
        self._every_seconds = every_seconds
        self._shown_at = time.monotonic()

    def due(self) -> bool:
        """True once every `every_seconds`."""
        return time.monotonic() - self._shown_at >= self._every_seconds

    def show(self, done: int, text: str) -> None:
        """Log one line."""
        log.info("%s %d/%s %s", self._unit, done, self._total, text)
        self._shown_at = time.monotonic()

    def write(self, text: str) -> None:
        """Write as if there were no display."""
        sys.stdout.write(text)

    def close(self) -> None:
        """Nothing is open."""


def _is_terminal(stream: TextIO) -> bool:
    """Whether a bar can be drawn: some terminals, such as those of build servers, have no width."""
    if not stream.isatty():
        return False
    try:
        return os.get_terminal_size(stream.fileno()).columns > 0
    except (OSError, ValueError):  # no real file behind it, as in some development environments
        return True


def _terminal_handlers() -> list["logging.StreamHandler[Any]"]:
    """Handlers of any logger that write to this process's standard output or error."""
    loggers = [logging.root, *(known for known in logging.root.manager.loggerDict.values())]
    return [
        handler
        for logger in loggers
        if isinstance(logger, logging.Logger)
        for handler in logger.handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream in (sys.stdout, sys.stderr)
    ]
