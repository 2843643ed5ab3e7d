"""How all figures look, and how they are written."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gptpl.files.durable import replacement

if TYPE_CHECKING:  # matplotlib takes long to import
    from matplotlib.figure import Figure

SIZE_INCHES = (8.0, 5.0)
DOTS_PER_INCH = 150

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#999933", "#AA4499")
"""Six of Okabe and Ito, two of Tol: told apart by colour-blind eyes, on white and on black."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
"""One for each colour."""
GREY = "#8c8c90"
"""For what is not compared by colour."""


def new_figure() -> "Figure":
    """An empty figure of the usual size, which pyplot does not know: nothing has to be closed."""
    from matplotlib.figure import Figure

    return Figure(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, layout="constrained")


def figure_pixels(figure: "Figure") -> npt.NDArray[np.uint8]:
    """The figure as (height, width, 3) RGB."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def write_png(pixels: npt.NDArray[np.uint8], path: Path) -> None:
    """Write (height, width, 3) RGB as a PNG file, which appears or is replaced in one move."""
    from matplotlib.image import imsave

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacement(path) as temporary:
        imsave(temporary, pixels, format="png", dpi=DOTS_PER_INCH)


def marker_of(colour: str) -> str:
    """The marker of a colour; empty for grey."""
    return dict(zip(COLOURS, MARKERS, strict=True)).get(colour, "")


def colour(place: int) -> str:
    """The colour of a place in a ranking, from 0."""
    return COLOURS[place] if place < len(COLOURS) else GREY
