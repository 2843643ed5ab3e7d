"""Which run has which colour, in the table, the curves and the samples alike."""

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#999933", "#AA4499")
"""Six of Okabe and Ito's, two of Tol's muted ones: told apart by colour-blind eyes, on white and on black."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
"""A sign for each colour, for those who see none."""

GREY = "#8c8c90"
"""Runs beyond the best."""


def marker_of(colour: str) -> str:
    """The sign of a colour; none for grey."""
    return dict(zip(COLOURS, MARKERS, strict=True)).get(colour, "")


def colour(place: int) -> str:
    """That of the run at a place of its ranking, 0 being the best."""
    return COLOURS[place] if place < len(COLOURS) else GREY
