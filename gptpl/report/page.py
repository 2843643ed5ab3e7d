"""A report as one HTML document that needs nothing else: no network, no script, no other file."""

from collections.abc import Iterator
from importlib import resources
from string import Template

from gptpl.report.contents import Contents, Section
from gptpl.report.drawing import Picture
from gptpl.report.plain_text import for_html
from gptpl.report.ranking import Entry
from gptpl.report.samples import LEFT_OUT, SharedPrompt

LONG_COLUMNS = ("overrides", "error")
LONG = 24
"""Longer texts are wrapped."""


BLANK = '<div class="faint">(nothing but white space)</div>'


def as_html(report: Contents) -> str:
    """The document. Whatever characters come from the runs, they are shown and never act as HTML."""
    page = resources.files("gptpl.report").joinpath("page.html").read_text(encoding="utf-8")
    return Template(page).substitute(
        title=for_html(report.title),
        facts="".join(
            f"<div><dt>{for_html(name)}</dt><dd>{for_html(value)}</dd></div>"
            for name, value in report.facts.items()
        ),
        body="\n".join(_body(report)),
    )


def _body(report: Contents) -> Iterator[str]:
    yield from (f'<p class="note">{for_html(note)}</p>' for note in report.notes)
    if report.problems:
        items = "".join(f"<li>{for_html(problem)}</li>" for problem in report.problems)
        yield f'<h2>Runs that could not be read</h2><ul class="errors">{items}</ul>'
    for section in report.sections:
        yield from _section(section)
    if report.samples:
        yield "<h2>The same prompt, continued by each run</h2>"
    yield from map(_prompt, report.samples)


def _section(section: Section) -> Iterator[str]:
    yield f"<h2>{for_html(section.group.title or 'Ranking')}</h2>"
    yield _table(section)
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


def _table(section: Section) -> str:
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


def _prompt(shared: SharedPrompt) -> str:
    cards = "".join(
        f'<div class="card"><div>{_who(entry)} <span class="faint">{for_html(when)}</span></div>'
        f'<pre><span class="faint">{for_html(shared.prompt)}</span>{for_html(text)}</pre>'
        f"{'' if text.strip() else BLANK}</div>"
        for entry, when, text in shared.texts
    )
    rest = f'<p class="faint">{LEFT_OUT.format(shared.left_out)}</p>' if shared.left_out else ""
    return f'<h3>{for_html(shared.strategy or "sampled")}</h3><div class="cards">{cards}</div>{rest}'
