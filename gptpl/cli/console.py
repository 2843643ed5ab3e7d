"""The log of a command on standard error, and a pause of the garbage collector."""

import gc
import io
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm.contrib import DummyTqdmFile

from gptpl.training.run_log import WARNINGS, ignore_known_warnings, is_first_process

QUIET = ("lightning", "lightning.pytorch", "lightning.fabric", "matplotlib", "urllib3", "hydra")
"""Loggers whose warnings alone are shown."""
ASKED_FOR = "lightning.pytorch.profilers"
"""Shown nevertheless: the report of `trainer.profiler=simple`."""


class _PlainFormatter(logging.Formatter):
    """The message, after the level of warnings and errors; Python warnings without their file and line."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.name == WARNINGS:
            text = re.sub(r"^.*?:\d+: (?:\w*Warning: )?", "", text).partition("\n")[0]
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


@contextmanager
def collector_paused() -> Iterator[None]:
    """Look for no reference cycles meanwhile, and later for none in what has been imported.

    That takes a sixth of the time until the first step. Where torch has been imported before, the process may
    be another program's, whose objects stay as they are.
    """
    is_own = "torch" not in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if is_own:
            gc.freeze()
        gc.enable()


@contextmanager
def console() -> Iterator[None]:
    """Show log messages from INFO on, and Python warnings, on standard error; restore logging at the end.

    Lines are printed above an open progress bar. Processes other than the first show errors only. A character
    that the terminal lacks is printed as a question mark, on standard output too.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    handler = logging.StreamHandler(DummyTqdmFile(sys.stderr))
    handler.setFormatter(_PlainFormatter("%(message)s"))
    handler.setLevel(logging.INFO if is_first_process() else logging.ERROR)
    loggers = [logging.root, *map(logging.getLogger, (*QUIET, ASKED_FOR))]
    before = [(logger, logger.level, list(logger.handlers), logger.propagate) for logger in loggers]
    with warnings.catch_warnings():
        logging.captureWarnings(True)
        ignore_known_warnings()
        logging.root.addHandler(handler)
        logging.root.setLevel(logging.INFO)
        for quiet in map(logging.getLogger, QUIET):
            # Lightning, imported before, has added handlers of its own.
            quiet.handlers, quiet.propagate = [], True
            quiet.setLevel(logging.WARNING)
        logging.getLogger(ASKED_FOR).setLevel(logging.INFO)
        try:
            yield
        finally:
            logging.captureWarnings(False)
            for logger, level, handlers, propagate in before:
                logger.setLevel(level)
                logger.handlers, logger.propagate = handlers, propagate
