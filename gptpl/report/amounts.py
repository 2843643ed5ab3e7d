"""Numbers, durations and settings as a reader wants them: three or four digits, and a unit."""

import math

from gptpl.records.settings import Setting

NONE = "-"
"""What stands where a run has no value."""


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


def duration(seconds: float) -> str:
    """Such as `4.2 s`, `1 min 5 s`, `2 h 3 min`, `1 d 4 h`: the two largest units."""
    if not math.isfinite(seconds) or seconds < 0:
        return NONE
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d {hours} h"


def gigabytes(size: float) -> str:
    """Bytes in units of 10^9."""
    return f"{digits(size / 1e9, 3)} GB" if math.isfinite(size) else NONE


def setting_text(value: Setting | None) -> str:
    """A setting as one would type it; a missing one is `-`, which a run without that setting has."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.4g}"
    return "null" if value == "None" else str(value)
