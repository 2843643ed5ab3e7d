"""Runs side by side: a ranking, their curves, what settings did, what they say to the same prompt."""

from collections.abc import Sequence
from pathlib import Path

from gptpl.records.listing import find_run
from gptpl.reports.finding import Failure, find_failures
from gptpl.reports.ranking import Criterion
from gptpl.reports.writing import Written, write_report, write_report_of

__all__ = ["Criterion", "Failure", "Written", "find_failures", "report", "write_report", "write_report_of"]


def report(
    *runs: str | Path, output: str | Path | None = None, by: Criterion | None = None, tags: Sequence[str] = ()
) -> Written:
    """Compares runs, as a web page and as Markdown.

    Args:
        runs: runs by folder or name (`quick/latest`), or folders with runs in them.
        output: folder of the files; None: that of a single run, or else the present one.
        by: what runs are ranked by; None: what a sweep says, or else the validation loss.
        tags: only the runs that have all of these.
    """
    folders = [path if (path := Path(run).expanduser()).is_dir() else find_run(run) for run in runs]
    return write_report_of(folders, None if output is None else Path(output).expanduser(), by=by, tags=tags)
