"""The ranking as lines of a terminal: the losses, what differs, and how each run ended."""

import shutil

from gptpl.report.contents import Contents, Section
from gptpl.report.plain_text import one_line, shortened

FIRST = ("validation loss", "perplexity", "tokens", "time", "state")
LEFT_OUT = ("last loss", "tokens/s", "peak memory", "parameters")
"""Columns of the page that the terminal has no room for."""
MOST_ROWS = 20


def terminal_lines(report: Contents) -> list[str]:
    """A table for each group, as wide as the terminal at most."""
    width = shutil.get_terminal_size((120, 24)).columns
    lines = [f"damaged: {one_line(problem)}" for problem in report.problems]
    lines += [one_line(note) for note in report.notes]
    for section in report.sections:
        lines += ["", one_line(section.group.title)] if section.group.title else []
        lines += [shortened_line(line, width) for line in _table(section)]
        if len(section.rows) > MOST_ROWS:
            lines.append(f"... and {len(section.rows) - MOST_ROWS} more in the report")
    return lines


def shortened_line(line: str, width: int) -> str:
    """The line with its spaces, cut where it would wrap."""
    return line if len(line) <= width else line[: width - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _table(section: Section) -> list[str]:
    names = list(section.columns)
    first = [names.index(name) for name in FIRST]
    kept = [*first, *(i for i, name in enumerate(names) if name not in (*FIRST, *LEFT_OUT))]
    rows = [["#", "run", *(section.columns[place].rpartition(".")[2] for place in kept)]]
    for entry, cells in section.rows[:MOST_ROWS]:
        rows.append(
            [entry.label, shortened(entry.name, 30), *(shortened(cells[place], 40) for place in kept)]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
