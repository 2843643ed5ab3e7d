"""Numbers, durations, settings and texts of runs as a page, a Markdown table and a terminal show them."""

import html
import math
import re

from gptpl.text import NONE, one_line, printable

# --- amounts: three or four digits, and a unit ----------------------------------------------------------


def digits(value: float, count: int = 4) -> str:
    """So many significant digits, thousands separated: 3.026, 20.61, 12,350."""
    if not math.isfinite(value):
        return NONE
    if value == 0:
        return "0"
    if abs(value) >= 1e15:
        return f"{value:.{count - 1}e}"
    places = count - 1 - math.floor(math.log10(abs(value)))
    rounded = round(value, places)
    return f"{rounded:,.{max(places, 0)}f}" if abs(value) >= 1e-4 else f"{value:.{count}g}"


def whole(value: float) -> str:
    """A count: 15,360."""
    return f"{round(value):,}" if math.isfinite(value) else NONE


def gigabytes(size: float) -> str:
    """Bytes in units of 10^9."""
    return f"{digits(size / 1e9, 3)} GB" if math.isfinite(size) else NONE


# --- texts, which may hold any character ----------------------------------------------------------------

_MARKDOWN = re.compile(r"([\\`*_\[\]|~$#])")


def for_html(text: str) -> str:
    """The text where HTML is expected, also in an attribute: none of it acts."""
    return html.escape(printable(text))


def for_markdown(text: str) -> str:
    """The text on one line of Markdown, also in a cell of a table: none of it acts."""
    return _MARKDOWN.sub(r"\\\1", one_line(text).replace("&", "&amp;").replace("<", "&lt;"))


def markdown_block(text: str) -> str:
    """A block of code.

    Indented rather than fenced: a text can hold a fence, but cannot leave its indentation.
    """
    return "\n".join("    " + line for line in (printable(text).split("\n") or [""]))


def ending(text: str, length: int) -> str:
    """The last characters of one line: of paths, those that tell them apart."""
    line = one_line(text)
    return line if len(line) <= length else "\N{HORIZONTAL ELLIPSIS}" + line[1 - length :]
