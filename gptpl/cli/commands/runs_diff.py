"""Compare settings and results of runs.

usage: gptpl runs diff RUN1 RUN2 [RUN3]...

examples:
  gptpl runs diff quick/2026-11-21_14-51-09 quick/latest                     # two runs by name
  gptpl runs diff runs/sweeps/quick_1a2b3c4d/0 runs/sweeps/quick_1a2b3c4d/1  # or by folder
  gptpl runs diff runs/sweeps/quick_1a2b3c4d/*/                              # all trials of a sweep

Prints side by side the settings that differ; other differences (data, versions, git commit, first weights,
hardware); the results. Exit status 0 with and without differences.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from gptpl.cli.arguments import parse_plain
from gptpl.cli.run_facts import facts
from gptpl.errors import InputError
from gptpl.files.run_record import read_run
from gptpl.files.run_settings import Differences, Setting, differing_beside, differing_settings
from gptpl.runs.listing import find_run
from gptpl.text import near, one_line, setting_text, table

WIDEST = 40
"""Characters of a value in a column; longer values are printed below one another."""
RESULTS = (
    *("state", "steps", "tokens", "lowest val loss", "last val loss"),
    *("time", "tokens per second", "peak memory"),
)


def run(arguments: list[str]) -> int:
    """Prints the differences and the results; returns the exit status."""
    paths = parse_plain("runs diff", arguments).paths
    if len(paths) < 2:
        raise InputError(
            f"gptpl runs diff takes two runs or more, got {len(paths)}: give folders or names that gptpl runs"
            " list shows"
        )
    paths = [find_run(path) for path in paths]
    runs = [read_run(path) for path in paths]
    names = _names(paths)
    settings, beside = differing_settings(runs), differing_beside(runs)
    lines = _section("settings", names, settings) if settings else ["the same settings"]
    if beside:
        lines += ["", *_section("other differences", names, beside)]
    known = [facts(run) for run in runs]
    results = ([name, *(each[name] for each in known)] for name in RESULTS)
    print("\n".join([*lines, "", *table([["results", *names], *results])]))
    return 0


def _names(paths: Sequence[Path]) -> list[str]:
    """The runs' folders without their common beginning."""
    full = [str(path.resolve()) for path in paths]
    if len(set(full)) < len(full):
        return [near(path) for path in paths]
    names = [os.path.relpath(path, os.path.commonpath(full)) for path in full]
    return [one_line(near(path) if name == "." else name) for path, name in zip(paths, names, strict=True)]


def _section(title: str, names: Sequence[str], differences: Differences) -> list[str]:
    """A table of short values, and below it the long ones."""
    texts = {name: [_text(value) for value in values] for name, values in differences.items()}
    short = {name: row for name, row in texts.items() if max(map(len, row)) <= WIDEST}
    lines = table([[title, *names], *([name, *row] for name, row in short.items())])
    width = max(map(len, names))
    for name in texts.keys() - short.keys():
        values = zip(names, texts[name], strict=True)
        lines += [one_line(name), *(f"  {run:<{width}}  {value}" for run, value in values)]
    return lines


def _text(value: Setting | None) -> str:
    if isinstance(value, str) and value.startswith(os.sep):
        return one_line(near(Path(value)))
    return one_line(setting_text(value, exact=True))
