"""A report as one HTML document, as Markdown with its pictures, and as lines of a terminal."""

import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from gptpl.errors import InputError
from gptpl.files.durable import write_atomically
from gptpl.files.run_record import RunError, RunRecord, parse_yaml, read_mapping
from gptpl.reports.contents import Contents, contents
from gptpl.reports.ranking import BY_LOSS, Criterion, Failure, find
from gptpl.runs.listing import SWEEP_FILE, find_run
from gptpl.text import nearest, one_line, printable, shortened, table


@dataclass(frozen=True, kw_only=True)
class Written:
    """A report and its files."""

    page: Path
    markdown: Path
    contents: Contents


def report(
    *runs: str | Path, output: str | Path | None = None, by: Criterion | None = None, tags: Sequence[str] = ()
) -> Written:
    """Compare runs, failed trials of sweeps included, as a web page and as Markdown.

    Args:
        runs: runs by folder or name (`quick/latest`), or folders with runs in them.
        output: folder of the files; None: that of a single run, or else the current one.
        by: the metric of the ranking; None: that of the folders' sweeps, or else the validation loss.
        tags: only the runs that have all of these.

    Raises InputError if there is no run, and if `output` is a file.
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
    if by is not None and not any(math.isfinite(by.best(record)) for record in records):
        measured = {name for record in records for each in record.evaluations for name in each.metrics}
        known = f"; they have {', '.join(sorted(measured))}" if measured else ""
        raise InputError(f"by={by.metric}: no run has it{nearest(by.metric, measured)}{known}")
    by = by or _criterion(folders)
    return write_report(records, failures, folder, title, problems=problems, by=by)


def _criterion(folders: Sequence[Path]) -> Criterion:
    """The metric of the sweeps in these folders, if they agree."""
    found = set()
    for folder in folders:
        try:
            sweep = read_mapping(folder / SWEEP_FILE, parse_yaml)
        except RunError:  # not the folder of a sweep
            sweep = {}
        is_known = sweep.get("mode") in ("min", "max")
        found.add(Criterion(metric=str(sweep.get("metric")), mode=sweep["mode"]) if is_known else BY_LOSS)
    return found.pop() if len(found) == 1 else BY_LOSS


def write_report(
    records: Sequence[RunRecord],
    failures: Sequence[Failure],
    folder: Path,
    title: str,
    *,
    problems: Sequence[str] = (),
    by: Criterion = BY_LOSS,
) -> Written:
    """Compare runs in `report.html`, and in `report.md` with its pictures `report-*.png`.

    The runs may be in any state; `problems` are the errors of those that could not be read. The folder is
    created if needed, and each file is replaced atomically.
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


# --- HTML and Markdown: the page needs no network, no script, no other file -----------------------------


def _filled(name: str, report: Contents, shown: Callable[[str], str], *, autoescape: bool = False) -> str:
    """Fill a template, where every value that is not marked as `safe` passes through `shown`.

    Text from the runs is displayed and never interpreted.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gptpl", "."),
        undefined=jinja2.StrictUndefined,
        autoescape=autoescape,
        finalize=lambda value: value if hasattr(value, "__html__") else shown(str(value)),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"printable": printable, "markdown": as_markdown, "block": _block}
    return environment.get_template(f"reports/{name}").render(report=report)


def as_markdown(text: str) -> str:
    """The text on one line, escaped so that Markdown shows it as it is, also in a table."""
    escaped = one_line(text).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", escaped)


def _block(text: str) -> str:
    """A block of code, indented rather than fenced: a text can contain a fence."""
    return "\n".join("    " + line for line in (printable(text).split("\n") or [""]))


# --- terminal -------------------------------------------------------------------------------------------

FIRST = ("validation loss", "perplexity", "tokens", "time", "state")
NOT_IN_TERMINAL = ("bits per byte", "last loss", "tokens/s", "peak memory", "parameters")
"""Columns of the page for which the terminal has no room."""
MOST_ROWS = 20


def terminal_lines(report: Contents) -> list[str]:
    """A table for each group, at most as wide as the terminal."""
    width = shutil.get_terminal_size((120, 24)).columns
    lines = [f"damaged: {one_line(problem)}" for problem in report.problems]
    lines += [one_line(note) for note in report.notes]
    for section in report.sections:
        if section.group.title:
            lines += ["", one_line(section.group.title)]
        names = list(section.columns)
        first = list(dict.fromkeys([0, *(names.index(name) for name in FIRST)]))  # 0: the ranking's metric
        others = [place for place, name in enumerate(names) if name not in (*FIRST, *NOT_IN_TERMINAL)]
        kept = list(dict.fromkeys([*first, *others]))
        rows = [["#", "run", *(names[place].rpartition(".")[2] for place in kept)]]
        for entry, cells in section.rows[:MOST_ROWS]:
            texts = (shortened(cells[place], 40) for place in kept)
            rows.append([entry.label, shortened(entry.name, 30), *texts])
        for line in table(rows):
            lines.append(line if len(line) <= width else line[: width - 1] + "\N{HORIZONTAL ELLIPSIS}")
        if len(section.rows) > MOST_ROWS:
            lines.append(f"... and {len(section.rows) - MOST_ROWS} more in the report")
    return lines
