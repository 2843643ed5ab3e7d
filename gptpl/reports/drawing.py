"""Figures in two shapes, for wide and narrow pages, as SVG that takes the page's colours, and as PNG."""

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # matplotlib takes long to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, LINE, PAPER = "#010203", "#c7c8cc", "#fefdfe"
"""Text, lines of the axes and what is behind a text: in an SVG they become the page's own colours."""

DOTS_PER_INCH = 150


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure in all its forms.

    Attributes:
        name: of the PNG file, without its ending.
        alt: what it shows, for those who do not see it.
        png: for Markdown.
        wide, narrow: `<svg>` elements, for HTML.
    """

    name: str
    alt: str
    png: bytes
    wide: str
    narrow: str


def picture(name: str, alt: str, draw: Callable[[bool], "Figure"]) -> Picture:
    """Draws both shapes; `draw` takes whether the figure is the narrow one."""
    with _style():
        wide, narrow = draw(False), draw(True)
        return Picture(
            name=name,
            alt=alt,
            png=_png(wide),
            wide=_svg(wide, salt=name),
            narrow=_svg(narrow, salt=f"{name}-narrow"),
        )


def bare(axes: "Axes", *, grid: str) -> None:
    """Takes away the frame and shows a faint grid along "x", "y" or "both"."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(visible=True, axis=grid, linewidth=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


@contextmanager
def _style() -> Iterator[None]:
    from matplotlib import rc_context

    with rc_context(
        {
            "axes.edgecolor": LINE,
            "axes.facecolor": "none",
            "axes.labelcolor": INK,
            "axes.titlesize": 9,
            "font.family": ["sans-serif"],
            "font.size": 9,
            "grid.color": LINE,
            "legend.frameon": False,
            "svg.fonttype": "none",  # text that can be read aloud, searched and copied
            "text.color": INK,
            "text.parse_math": False,  # a dollar in a setting is a dollar
            "xtick.color": LINE,
            "xtick.labelcolor": INK,
            "ytick.color": LINE,
            "ytick.labelcolor": INK,
        }
    ):
        yield


def _svg(figure: "Figure", *, salt: str) -> str:
    from matplotlib import rc_context

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.hashsalt": salt}):  # names within the SVG that no other one of the page has
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<style type=\"text/css\">.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r' (?:width|height)="[^"]*"', "", text, count=2)  # the page decides
    text = re.sub(r'<g id="', f'<g id="{salt}-', text)
    for colour, name in ((INK, "ink"), (LINE, "line"), (PAPER, "paper")):
        text = text.replace(colour, f"var(--{name})")
    return text


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()
