"""A report as one HTML document, as Markdown with its pictures, and as lines of a terminal."""

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from gptpl.errors import InputError
from gptpl.files.durable import write_atomically
from gptpl.files.run_record import RunError, RunRecord, parse_yaml, read_mapping
from gptpl.reports.contents import Contents, Section, contents
from gptpl.reports.ranking import BY_LOSS, Criterion, Failure, find
from gptpl.runs.listing import SWEEP_FILE, find_run
from gptpl.text import one_line, printable, shortened, table


@dataclass(frozen=True, kw_only=True)
class Written:
    """A report and where it is."""

    page: Path
    markdown: Path
    contents: Contents

    @property
    def problems(self) -> Sequence[str]:
        """What could not be read, a line each."""
        return self.contents.problems


def report(
    *runs: str | Path, output: str | Path | None = None, by: Criterion | None = None, tags: Sequence[str] = ()
) -> Written:
    """Compares runs, failed trials of sweeps included, as a web page and as Markdown.

    Args:
        runs: runs by folder or name (`quick/latest`), or folders with runs in them.
        output: folder of the files; None: that of a single run, or else the present one.
        by: what runs are ranked by; None: what the folders' sweeps say, or else the validation loss.
        tags: only the runs that have all of these.

    Raises InputError where there is no run, and where `output` is a file.
    """
    if not runs:
        raise InputError("no run is given: give a run's folder, or one with runs in it")
    folders = [path if (path := Path(run).expanduser()).is_dir() else find_run(run) for run in runs]
    alone = folders[0].resolve() if len(folders) == 1 else None
    folder = Path(output).expanduser() if output is not None else folders[0] if alone else Path()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output={folder} is a file: give a folder")
    records, failures, problems = find(folders)
    records = [record for record in records if set(tags) <= set(record.tags)]
    if tags and not records:
        raise InputError(f"no run has tag={','.join(tags)}: give others, see gptpl runs list")
    title = f"{alone.parent.name}/{alone.name}" if alone else f"{len(folders)} folders of runs compared"
    by = by or _criterion(folders)
    return write_report(records, failures, folder, title, problems=problems, by=by)


def _criterion(folders: Sequence[Path]) -> Criterion:
    """What the sweeps in these folders compare their trials by, where they agree."""
    said = set()
    for folder in folders:
        try:
            sweep = read_mapping(folder / SWEEP_FILE, parse_yaml)
        except RunError:  # no sweep's
            sweep = {}
        if sweep.get("mode") in ("min", "max"):
            said.add(Criterion(metric=str(sweep.get("metric")), mode=sweep["mode"]))
        else:
            said.add(BY_LOSS)
    return said.pop() if len(said) == 1 else BY_LOSS


def write_report(
    records: Sequence[RunRecord],
    failures: Sequence[Failure],
    folder: Path,
    title: str,
    *,
    problems: Sequence[str] = (),
    by: Criterion = BY_LOSS,
) -> Written:
    """Compares runs in `report.html`, and in `report.md` with its pictures `report-*.png`.

    The runs may be in any state, or none at all; `problems` is what could not be read. The folder is made
    where it is not there; each file appears or is replaced in one move.
    """
    report = contents(records, failures, title=title, problems=problems, by=by)
    folder.mkdir(parents=True, exist_ok=True)
    for section in report.sections:
        for picture in section.pictures:
            write_atomically(folder / f"{picture.name}.png", picture.png)
    page, markdown = folder / "report.html", folder / "report.md"
    write_atomically(markdown, _filled("report.md", report, as_markdown))
    write_atomically(page, _filled("report.html", report, printable, autoescape=True))
    return Written(page=page, markdown=markdown, contents=report)


# --- HTML and Markdown: the page needs no network, no script, no other file ----------------------------


def _filled(name: str, report: Contents, shown: Callable[[str], str], *, autoescape: bool = False) -> str:
    """A template, in which every value that is not marked as `safe` passes through `shown`.

    Whatever characters come from the runs, they are shown and never act.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gptpl.reports", "."),
        undefined=jinja2.StrictUndefined,
        autoescape=autoescape,
        finalize=lambda value: value if hasattr(value, "__html__") else shown(str(value)),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"printable": printable, "markdown": as_markdown, "block": _block}
    return environment.get_template(name).render(report=report)


def as_markdown(text: str) -> str:
    """The text on one line of Markdown, also in a cell of a table: none of it acts."""
    escaped = one_line(text).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", escaped)


def _block(text: str) -> str:
    """A block of code in Markdown.

    Indented rather than fenced: a text can hold a fence, but cannot leave its indentation.
    """
    return "\n".join("    " + line for line in (printable(text).split("\n") or [""]))


# --- terminal -------------------------------------------------------------------------------------------

FIRST = ("validation loss", "perplexity", "tokens", "time", "state")
NOT_IN_TERMINAL = ("last loss", "tokens/s", "peak memory", "parameters")
"""Columns of the page that the terminal has no room for."""
MOST_ROWS = 20


def terminal_lines(report: Contents) -> list[str]:
    """A table for each group, as wide as the terminal at most."""
    width = shutil.get_terminal_size((120, 24)).columns
    lines = [f"damaged: {one_line(problem)}" for problem in report.problems]
    lines += [one_line(note) for note in report.notes]
    for section in report.sections:
        lines += ["", one_line(section.group.title)] if section.group.title else []
        for line in _terminal_table(section):
            lines.append(line if len(line) <= width else line[: width - 1] + "\N{HORIZONTAL ELLIPSIS}")
        if len(section.rows) > MOST_ROWS:
            lines.append(f"... and {len(section.rows) - MOST_ROWS} more in the report")
    return lines


def _terminal_table(section: Section) -> list[str]:
    names = list(section.columns)
    first = list(dict.fromkeys([0, *(names.index(name) for name in FIRST)]))  # 0: what they are ranked by
    kept = [*first, *(i for i, name in enumerate(names) if i and name not in (*FIRST, *NOT_IN_TERMINAL))]
    rows = [["#", "run", *(names[place].rpartition(".")[2] for place in kept)]]
    for entry, cells in section.rows[:MOST_ROWS]:
        rows.append(
            [entry.label, shortened(entry.name, 30), *(shortened(cells[place], 40) for place in kept)]
        )
    return table(rows)
