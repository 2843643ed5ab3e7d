"""What a command shows of the log: lines on standard error."""

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
"""Loggers of which only warnings concern the user of a command."""
ASKED_FOR = "lightning.pytorch.profilers"
"""But the report of `trainer.profiler=simple` does."""


class _PlainFormatter(logging.Formatter):
    """The bare message; warnings and errors say what they are, but not in which line of which package."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.name == WARNINGS:
            text = re.sub(r"^.*?:\d+: (?:\w*Warning: )?", "", text).partition("\n")[0]
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


@contextmanager
def console() -> Iterator[None]:
    """Shows on standard error what all loggers say from INFO on, and warnings, until it ends.

    Lines come above an open progress bar. Of other processes than the first only errors are shown. At its end
    logging is as it was. A terminal that lacks a character shows a question mark, on standard output too.
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
            # Lightning, imported before there are handlers, adds some of its own.
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
