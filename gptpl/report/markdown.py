"""A report as Markdown; its pictures are files beside it."""

from collections.abc import Iterator

from gptpl.report.contents import Contents, Section
from gptpl.report.drawing import Picture
from gptpl.report.plain_text import for_markdown, markdown_block
from gptpl.report.samples import LEFT_OUT, SharedPrompt


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
