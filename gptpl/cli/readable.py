"""Numbers, times and settings as people read them."""

import math
import os
import re
from datetime import datetime
from pathlib import Path

from gptpl.records.settings import Setting


def bytes_text(size: int) -> str:
    """A size in the largest unit of 1000 that gives at least 1: `512 B`, `1.5 MB`."""
    if size < 1000:
        return f"{size} B"
    value = float(size)
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        if value < 999.95 or unit == "TB":
            break
    return f"{value:.1f} {unit}"


def count_text(count: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def loss_text(loss: float | None) -> str:
    """A loss with four decimals, `-` where there is none."""
    return "-" if loss is None or math.isnan(loss) else f"{loss:.4f}"


def seconds_text(seconds: float) -> str:
    """`1.4 s`, `12:03`, `3:12:03`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def time_text(moment: datetime) -> str:
    """Date and time of day."""
    return moment.strftime("%Y-%m-%d %H:%M:%S")


def near(path: Path) -> str:
    """A path as one would type it here: relative, where it lies below the folder that one is in."""
    full = Path(os.path.abspath(path))  # noqa: PTH100 - not resolved: a link keeps its name
    here = Path.cwd()
    return str(full.relative_to(here)) if full.is_relative_to(here) else str(full)


def setting_text(value: Setting | None) -> str:
    """A setting as YAML spells it, hashes cut to 12 digits; `-` for one that is not there."""
    if value is None:
        return "-"
    if isinstance(value, bool) or value == "None":
        return "null" if value == "None" else str(value).lower()
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{28,52}\b", r"\1", str(value))
