"""A report as one HTML document, as Markdown with its pictures, and as lines of a terminal."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template

from gptpl.errors import InputError
from gptpl.files.whole import write_atomically
from gptpl.records.run_record import RunError, RunRecord, has_tags, parse_yaml, read_mapping
from gptpl.records.sweep_folder import SWEEP_FILE
from gptpl.reports.contents import LEFT_OUT, Contents, Section, SharedPrompt, contents
from gptpl.reports.drawing import Picture
from gptpl.reports.finding import Failure, find
from gptpl.reports.ranking import BY_LOSS, Criterion, Entry
from gptpl.reports.texts import for_html, for_markdown, markdown_block
from gptpl.text import one_line, shortened

PAGE_FILE, MARKDOWN_FILE = "report.html", "report.md"


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


def write_report_of(
    folders: Sequence[Path],
    output: Path | None = None,
    *,
    by: Criterion | None = None,
    tags: Sequence[str] = (),
) -> Written:
    """Compares all runs in folders or below them, failed trials of sweeps included.

    Args:
        folders: of runs, or with runs in them.
        output: where the report goes; None: a single folder itself, or for several the present one.
        by: what runs are ranked by; None: what the folders' sweeps say, or else the validation loss.
        tags: only runs that have all of these.

    Raises InputError for a folder without runs, and where `output` is a file.
    """
    if not folders:
        raise InputError("no run is given: give a run's folder, or one with runs in it")
    if output is None:
        output = folders[0] if len(folders) == 1 else Path()
    if output.exists() and not output.is_dir():
        raise InputError(f"output={output} is a file: give a folder")
    found = find(folders)
    records = [record for record in found.records if has_tags(record, tags)]
    if tags and not records:
        raise InputError(f"no run has tag={','.join(tags)}: give others, see gptpl runs list")
    path = folders[0].resolve()
    title = f"{path.parent.name}/{path.name}"
    return write_report(
        records,
        found.failures,
        output,
        title if len(folders) == 1 else f"{len(folders)} folders of runs compared",
        problems=found.problems,
        by=by or _criterion(folders),
    )


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

    Args:
        records: runs in any state, as `read_run` reads them; also none at all.
        failures: what sweeps tell of failed trials, with or without a run, as `find_failures` finds it.
        folder: where the files go; made where it is not there. Each file appears or is replaced in one move.
        title: heading.
        problems: what could not be read, a line each.
        by: what runs are ranked by.
    """
    report = contents(records, failures, title=title, problems=problems, by=by)
    folder.mkdir(parents=True, exist_ok=True)
    for section in report.sections:
        for picture in (section.curves, section.parallel, section.importance_bars):
            if picture is not None:
                write_atomically(folder / f"{picture.name}.png", picture.png)
    page, markdown = folder / PAGE_FILE, folder / MARKDOWN_FILE
    write_atomically(markdown, as_markdown(report))
    write_atomically(page, as_html(report))
    return Written(page=page, markdown=markdown, contents=report)


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


# --- HTML: no network, no script, no other file ---------------------------------------------------------

LONG_COLUMNS = ("overrides", "error")
LONG = 24
"""Longer texts are wrapped."""


BLANK = '<div class="faint">(nothing but white space)</div>'


def as_html(report: Contents) -> str:
    """The document. Whatever characters come from the runs, they are shown and never act as HTML."""
    page = resources.files("gptpl.reports").joinpath("page.html").read_text(encoding="utf-8")
    return Template(page).substitute(
        title=for_html(report.title),
        facts="".join(
            f"<div><dt>{for_html(name)}</dt><dd>{for_html(value)}</dd></div>"
            for name, value in report.facts.items()
        ),
        body="\n".join(_page_body(report)),
    )


def _page_body(report: Contents) -> Iterator[str]:
    yield from (f'<p class="note">{for_html(note)}</p>' for note in report.notes)
    if report.problems:
        items = "".join(f"<li>{for_html(problem)}</li>" for problem in report.problems)
        yield f'<h2>Runs that could not be read</h2><ul class="errors">{items}</ul>'
    for section in report.sections:
        yield from _page_section(section)
    if report.samples:
        yield "<h2>The same prompt, continued by each run</h2>"
    yield from map(_page_prompt, report.samples)


def _page_section(section: Section) -> Iterator[str]:
    yield f"<h2>{for_html(section.group.title or 'Ranking')}</h2>"
    yield _page_table(section)
    yield from (f'<p class="faint">{for_html(note)}</p>' for note in section.notes)
    if section.curves is not None:
        yield "<h3>Learning curves</h3>" + _figure(section.curves)
    if section.parallel is not None:
        yield "<h3>Settings and losses</h3>" + _figure(section.parallel)
        if section.parallel_note:
            yield f'<p class="faint">{for_html(section.parallel_note)}</p>'
    if len(section.group.runs) > 1:
        yield "<h3>Importance of the settings</h3>"
        if section.importance_bars is not None:
            yield _figure(section.importance_bars)
        yield f'<p class="faint">{for_html(section.importance.note)}</p>'


def _page_table(section: Section) -> str:
    """The columns of words, which are long, are rows of their own below those that have any."""
    kept = [place for place, name in enumerate(section.columns) if name not in LONG_COLUMNS]
    heads = "".join(f"<th>{_breakable(name)}</th>" for name in ("run", *(section.columns[i] for i in kept)))
    rows = []
    for entry, cells in section.rows:
        texts = "".join(_cell(cells[i]) for i in kept)
        rows.append(f'<tr><th scope="row">{_who(entry)}</th>{texts}</tr>')
        said = ": ".join(for_html(text) for text in (entry.overrides, entry.error) if text)
        if said:
            rows.append(f'<tr class="said"><td colspan="{len(kept) + 1}"><div>{said}</div></td></tr>')
    body = f"<thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="wide"><table>{body}</table></div>'


def _cell(text: str) -> str:
    long = ' class="long"' if len(text) > LONG else ""
    return f"<td{long}>{for_html(text)}</td>"


def _breakable(name: str) -> str:
    return for_html(name).replace(".", ".<wbr>").replace("_", "_<wbr>")


def _who(entry: Entry) -> str:
    """Colour, rank and name."""
    swatch = f'<i class="swatch" style="background:{entry.colour}"></i>' if entry.label else ""
    return f"{swatch}<b>{for_html(entry.label)}</b> {for_html(entry.name)}"


def _figure(picture: Picture) -> str:
    parts = [
        f'<div class="{shape}-figure" role="img" aria-label="{for_html(picture.alt)}">{svg}</div>'
        for shape, svg in (("wide", picture.wide), ("narrow", picture.narrow))
    ]
    return f"<figure>{''.join(parts)}</figure>"


def _page_prompt(shared: SharedPrompt) -> str:
    cards = "".join(
        f'<div class="card"><div>{_who(entry)} <span class="faint">{for_html(when)}</span></div>'
        f'<pre><span class="faint">{for_html(shared.prompt)}</span>{for_html(text)}</pre>'
        f"{'' if text.strip() else BLANK}</div>"
        for entry, when, text in shared.texts
    )
    rest = f'<p class="faint">{LEFT_OUT.format(shared.left_out)}</p>' if shared.left_out else ""
    return f'<h3>{for_html(shared.strategy or "sampled")}</h3><div class="cards">{cards}</div>{rest}'


# --- Markdown -------------------------------------------------------------------------------------------


def as_markdown(report: Contents) -> str:
    """The text; a blank line between any two parts."""
    return "\n\n".join(_parts(report)) + "\n"


def _parts(report: Contents) -> Iterator[str]:
    yield f"# {for_markdown(report.title)}"
    yield ", ".join(f"{name}: {for_markdown(value)}" for name, value in report.facts.items())
    yield from (f"**{for_markdown(note)}**" for note in report.notes)
    if report.problems:
        yield "## Runs that could not be read"
        yield "\n".join(f"- {for_markdown(problem)}" for problem in report.problems)
    for section in report.sections:
        yield from _section(section)
    if report.samples:
        yield "## The same prompt, continued by each run"
    for shared in report.samples:
        yield from _prompt(shared)


def _section(section: Section) -> Iterator[str]:
    yield f"## {for_markdown(section.group.title or 'Ranking')}"
    yield _table(section)
    yield from map(for_markdown, section.notes)
    if section.curves is not None:
        yield "### Learning curves"
        yield _image(section.curves)
    if section.parallel is not None:
        yield "### Settings and losses"
        yield _image(section.parallel)
        if section.parallel_note:
            yield for_markdown(section.parallel_note)
    if len(section.group.runs) > 1:
        yield "### Importance of the settings"
        if section.importance_bars is not None:
            yield _image(section.importance_bars)
        yield for_markdown(section.importance.note)


def _table(section: Section) -> str:
    rows = [["#", "run", *section.columns]]
    rows += [[entry.label, entry.name, *cells] for entry, cells in section.rows]
    lines = ["| " + " | ".join(map(for_markdown, row)) + " |" for row in rows]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    return "\n".join(lines)


def _image(picture: Picture) -> str:
    return f"![{for_markdown(picture.alt)}]({picture.name}.png)"


def _prompt(shared: SharedPrompt) -> Iterator[str]:
    how = f" ({for_markdown(shared.strategy)})" if shared.strategy else ""
    yield f"### Prompt{how}"
    yield markdown_block(shared.prompt)
    for entry, when, text in shared.texts:
        yield f"**{for_markdown(' '.join(filter(None, (entry.label, entry.name))))}**" + (
            f", {when}" if when else ""
        )
        yield markdown_block(text)
    if shared.left_out:
        yield LEFT_OUT.format(shared.left_out)


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
        lines += [shortened_line(line, width) for line in _terminal_table(section)]
        if len(section.rows) > MOST_ROWS:
            lines.append(f"... and {len(section.rows) - MOST_ROWS} more in the report")
    return lines


def shortened_line(line: str, width: int) -> str:
    """The line with its spaces, cut where it would wrap."""
    return line if len(line) <= width else line[: width - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _terminal_table(section: Section) -> list[str]:
    names = list(section.columns)
    first = list(dict.fromkeys([0, *(names.index(name) for name in FIRST)]))  # 0: what they are ranked by
    kept = [*first, *(i for i, name in enumerate(names) if i and name not in (*FIRST, *NOT_IN_TERMINAL))]
    rows = [["#", "run", *(section.columns[place].rpartition(".")[2] for place in kept)]]
    for entry, cells in section.rows[:MOST_ROWS]:
        rows.append(
            [entry.label, shortened(entry.name, 30), *(shortened(cells[place], 40) for place in kept)]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
