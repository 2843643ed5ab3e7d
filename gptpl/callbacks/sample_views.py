"""Generated text made fit for a terminal line and for a Markdown page: it may hold any character."""

from collections.abc import Sequence

from gptpl.callbacks.sample_file import Record


def one_line(text: str) -> str:
    """The text fit for one line of a terminal.

    Every run of white space is one space; what cannot be printed, such as an escape, is U+FFFD.
    """
    compact = " ".join(text.split())
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in compact)


def as_markdown(records: Sequence[Record]) -> str:
    """Prompts and continuations as code blocks, so that no character of theirs acts as Markdown or HTML."""
    parts = []
    for record in records:
        parts += ["**prompt**", _code_block(record["prompt"])]
        parts += ["**continuation**", _code_block(record["continuation"])]
    return "\n\n".join(parts)


def _code_block(text: str) -> str:
    # Indented rather than fenced: a text can hold a fence, but cannot leave its indentation.
    return "\n".join("    " + line for line in (text.splitlines() or [""]))
