"""What pictures of loss curves have in common."""

import math


def tokens_text(tokens: float, _position: object = None) -> str:
    """Such as "500", "40k", "1.5M", "3B": the labels of an axis of tokens, as matplotlib asks for them."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(tokens) >= size:
            return f"{tokens / size:g}{letter}"
    return f"{tokens:g}"


def finite(loss: float) -> float:
    """The loss, or NaN, which leaves a gap in a curve."""
    return loss if math.isfinite(loss) else math.nan
