"""A report of any set of runs, as files in a folder."""

from collections.abc import Sequence
from pathlib import Path

from gptpl.files.whole import write_atomically
from gptpl.records.run_record import RunRecord
from gptpl.report.contents import Contents, contents
from gptpl.report.failures import Failure
from gptpl.report.markdown import as_markdown
from gptpl.report.page import as_html

PAGE_FILE, MARKDOWN_FILE = "report.html", "report.md"


def write_report(
    records: Sequence[RunRecord],
    failures: Sequence[Failure],
    folder: Path,
    title: str,
    *,
    problems: Sequence[str] = (),
) -> tuple[Path, Path]:
    """Compares runs in `report.html`, and in `report.md` with its pictures `report-*.png`.

    Args:
        records: runs in any state, as `read_run` reads them; also none at all.
        failures: what sweeps tell of failed trials, with or without a run, as `find_failures` finds it.
        folder: where the files go; made where it is not there. Each file appears or is replaced in one move.
        title: heading.
        problems: what could not be read, a line each.

    Returns the paths of the page and of the Markdown.
    """
    return write_contents(contents(records, failures, title=title, problems=problems), folder)


def write_contents(report: Contents, folder: Path) -> tuple[Path, Path]:
    """The files of a report that is made already; see `write_report`."""
    folder.mkdir(parents=True, exist_ok=True)
    for section in report.sections:
        for picture in (section.curves, section.parallel, section.importance_bars):
            if picture is not None:
                write_atomically(folder / f"{picture.name}.png", picture.png)
    page, markdown = folder / PAGE_FILE, folder / MARKDOWN_FILE
    write_atomically(markdown, as_markdown(report))
    write_atomically(page, as_html(report))
    return page, markdown
