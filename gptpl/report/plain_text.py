"""Texts of runs, which may hold any character, made fit for a page, a Markdown table and a terminal."""

import html
import re

_MARKDOWN = re.compile(r"([\\`*_\[\]|~$#])")


def readable(text: str) -> str:
    """The text without what no reader sees, such as escapes and marks that turn its direction."""
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else "\N{REPLACEMENT CHARACTER}" for letter in text
    )


def one_line(text: str) -> str:
    """The readable text with every run of white space as one space."""
    return readable(" ".join(text.split()))


def for_html(text: str) -> str:
    """The text where HTML is expected, also in an attribute: none of it acts."""
    return html.escape(readable(text))


def for_markdown(text: str) -> str:
    """The text on one line of Markdown, also in a cell of a table: none of it acts."""
    return _MARKDOWN.sub(r"\\\1", one_line(text).replace("&", "&amp;").replace("<", "&lt;"))


def markdown_block(text: str) -> str:
    """A block of code.

    Indented rather than fenced: a text can hold a fence, but cannot leave its indentation.
    """
    return "\n".join("    " + line for line in (readable(text).split("\n") or [""]))


def shortened(text: str, length: int) -> str:
    """One line of up to `length` characters."""
    line = one_line(text)
    return line if len(line) <= length else line[: length - 1] + "\N{HORIZONTAL ELLIPSIS}"


def ending(text: str, length: int) -> str:
    """The last characters of one line: of paths, those that tell them apart."""
    line = one_line(text)
    return line if len(line) <= length else "\N{HORIZONTAL ELLIPSIS}" + line[1 - length :]
