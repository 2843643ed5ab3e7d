"""Numbers, sizes, durations, settings, names and tables as text for a terminal.

Text from disk may hold any character: it is printed through `one_line`, `printable` or `table`.
"""

import difflib
import math
import os
import re
from collections.abc import Collection, Iterable, Sequence
from datetime import datetime
from pathlib import Path

NONE = "-"
"""In place of a missing value."""


def printable(text: str) -> str:
    """The text with U+FFFD for invisible characters: escapes, marks that change the direction of writing."""
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else "\N{REPLACEMENT CHARACTER}" for letter in text
    )


def one_line(text: str) -> str:
    """The printable text, with one space for every run of white space."""
    return printable(" ".join(text.split()))


def shortened(text: str, length: int) -> str:
    """One line of at most `length` characters, the last an ellipsis if it was cut."""
    line = one_line(text)
    return line if len(line) <= length else line[: length - 1] + "\N{HORIZONTAL ELLIPSIS}"


def table(rows: Sequence[Sequence[str]], *, right: Collection[int] = ()) -> list[str]:
    """Rows of equal length as printable lines with aligned columns, those in `right` to the right."""
    rows = [[printable(cell.replace("\n", " ").replace("\t", " ")) for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def bytes_text(size: float) -> str:
    """A size in the largest decimal unit that gives at least 1: `512 B`, `1.5 MB`."""
    if size < 1000:
        return f"{round(size)} B"
    power = next((power for power in (1, 2, 3) if size / 1000**power < 999.95), 4)
    return f"{size / 1000**power:.1f} {('kB', 'MB', 'GB', 'TB')[power - 1]}"


def count_text(count: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def some(names: Sequence[str], most: int = 10) -> str:
    """The first names, and how many more there are: `a, b and 3 more`."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def loss_text(loss: float | None) -> str:
    """A loss with four decimals."""
    return NONE if loss is None or math.isnan(loss) else f"{loss:.4f}"


def duration_text(seconds: float) -> str:
    """`4.2 s`, `45 s`, then minutes and hours as on a clock: `12:03`, `3:12:03`."""
    if not math.isfinite(seconds) or seconds < 0:
        return NONE
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def time_text(moment: datetime) -> str:
    """Date and time of day."""
    return moment.strftime("%Y-%m-%d %H:%M:%S")


def setting_text(value: bool | int | float | str | None, *, exact: bool = False) -> str:
    """A setting as YAML spells it, hashes cut to 12 digits and, unless `exact`, floats to 4."""
    if value is None:
        return NONE
    if isinstance(value, bool) or value == "None":
        return "null" if value == "None" else str(value).lower()
    if isinstance(value, float) and not exact:
        return f"{value:.4g}"
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{28,52}\b", r"\1", str(value))


def near(path: Path) -> str:
    """A path as one would type it: relative, if it is below the working folder."""
    full = Path(os.path.abspath(path))  # noqa: PTH100 - not resolved: a link keeps its name
    here = Path.cwd()
    return str(full.relative_to(here)) if full.is_relative_to(here) else str(full)


def closest(word: str, candidates: Iterable[str], *, likeness: float = 0.5) -> str:
    """The candidate most like the word, with a likeness of 0 to 1; "" if none is like it."""
    others = [candidate for candidate in candidates if not word.startswith(f"{candidate}.")]
    return "".join(difflib.get_close_matches(word, others, n=1, cutoff=likeness))


def nearest(word: str, candidates: Iterable[str], *, likeness: float = 0.5) -> str:
    """`: did you mean WORD?` with the closest candidate; "" without one."""
    found = closest(word, candidates, likeness=likeness)
    return f": did you mean {found}?" if found else ""


_WHITE_SPACE = str.maketrans(
    {
        " ": "\N{OPEN BOX}",
        "\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}",
        "\t": "\N{RIGHTWARDS ARROW}",
    }
)
_CONTROLS = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
"""U+2400 and what follows are pictures of the first 32 characters, in their order."""


def visible(text: str) -> str:
    """The text on one line, with signs for white space and control characters."""
    return readable(text.translate(_WHITE_SPACE))


def readable(text: str) -> str:
    """The text with signs for control characters but tab and line feed."""
    return printable(text.translate(_CONTROLS))
