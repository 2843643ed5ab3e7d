"""Compare runs: ranking, curves, settings and samples, as a web page and in Markdown.

usage: gptpl report RUN_OR_FOLDER... [output=FOLDER] [tag=WORD] [by=METRIC]

examples:
  gptpl report runs/sweeps/quick_1a2b3c4d   # all trials of a sweep
  gptpl report runs/quick                   # all runs below a folder
  gptpl report RUN_A RUN_B output=compared  # two runs; without output= the files go to this folder
  gptpl report latest                       # one run
  gptpl report runs tag=paper               # only the runs with a tag
  gptpl report runs by=val/bits_per_byte    # different tokenizers on the same text, ranked together

settings:
  output: null    # folder of the files; null: the given folder, or the current one if several are given
  tag: null       # only runs with this tag; several: tag=a,b
  by: null        # metric of the ranking; null: val/loss, or that of the sweep
  mode: min       # with by: max where its best value is the highest

Writes report.html, which needs no other file and no network, report.md and its pictures report-*.png, and
prints the ranking. Runs are ranked by their lowest validation loss, those of a sweep by its sweep.metric.
Runs with different texts, splits or tokenizers are ranked separately: their losses cannot be compared (bits
per byte can, between tokenizers). The importance of settings is estimated from 10 finished runs on.
Exit status: 0, 1 (some runs are damaged; the others are reported), 2 bad input.
"""

from pathlib import Path

from gptpl.cli.arguments import parse_plain
from gptpl.errors import InputError
from gptpl.reports import report
from gptpl.reports.ranking import Criterion
from gptpl.reports.writing import terminal_lines

EXIT_DAMAGED = 1


def run(arguments: list[str]) -> int:
    """Writes the report, prints the ranking; returns the exit status."""
    given = parse_plain("report", arguments, settings=["output", "tag", "by", "mode"])
    output = given.settings.get("output")
    if output == "":
        raise InputError("output= is empty: give a folder")
    if not given.paths:
        raise InputError("no run is given: give gptpl report a run's folder, or a folder of runs")
    tags = [tag for tag in given.settings.get("tag", "").split(",") if tag]
    by, mode = given.settings.get("by"), given.settings.get("mode", "min")
    if mode not in ("min", "max"):
        raise InputError(f"mode={mode} is unknown: choose one of min, max")
    if by is None and "mode" in given.settings:
        raise InputError(f"mode={mode} has no metric: give by=METRIC, too")
    criterion = None if by is None else Criterion(metric=by, mode="max" if mode == "max" else "min")
    folder = None if output is None else Path(output)
    written = report(*given.paths, output=folder, tags=tags, by=criterion)
    where = ["", f"page      {written.page}", f"markdown  {written.markdown}"]
    print("\n".join([*terminal_lines(written.contents), *where]))
    return EXIT_DAMAGED if written.contents.problems else 0
