"""What is declared on a setting's own parameter: the values it takes, and how it may change at a resume.

    def adamw(net: nn.Module, *, lr: Annotated[float, POSITIVE] = 4e-4) -> AdamW:
        check_limits(adamw, "optimizer.", lr=lr)

    def __init__(self, *, num_workers: Annotated[int, FREE] = 0, max_length: int) -> None: ...

A declared limit is checked with the types of all settings, before torch is imported (`gptpl.config.check`);
the class or function itself checks it where it is called from Python.

A setting without a declaration of its change cannot change when a run is resumed, except in callbacks,
loggers, the trainer, optimizers and schedules, whose places in the config have defaults of their own
(`gptpl.config.slots.SLOTS`).
"""

import math
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from gptpl.errors import InputError

# --- resuming -------------------------------------------------------------------------------------------

Resume = Literal["free", "inexact", "next_step", "never"]

FREE: Resume = "free"
"""It may change: the weights become what they would have become."""
INEXACT: Resume = "inexact"
"""It may change: the same training by other kernels, or in another order of additions."""
NEXT_STEP: Resume = "next_step"
"""It may change, and changes the training from the next step on."""
NEVER: Resume = "never"
"""It made the steps so far: with another value it is another run."""

# --- values ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limit:
    """A condition on a value, in words that follow "must be" and as a function."""

    wanted: str
    holds: Callable[[Any], bool]

    def check(self, name: str, value: Any) -> None:
        """Raise InputError for a value out of the limit."""
        if not self.holds(value):
            raise InputError(f"{name} must be {self.wanted}, got {value!r}")


def _is_fraction(value: Any) -> bool:
    return bool(0 <= value < 1)


POSITIVE = Limit("positive", lambda value: value > 0)
NOT_NEGATIVE = Limit("0 or more", lambda value: value >= 0)
SIZE = Limit("a positive whole number", lambda value: type(value) is int and value >= 1)
DROPOUT = Limit("at least 0 and below 1", _is_fraction)
FRACTION = Limit("a number from 0 to below 1", _is_fraction)
TWO_FRACTIONS = Limit(
    "two numbers from 0 to below 1", lambda value: len(value) == 2 and all(map(_is_fraction, value))
)
PROBABILITY = Limit("above 0 and below 1", lambda value: 0 < value < 1)
ABOVE_1 = Limit("a number above 1", lambda value: value > 1 and math.isfinite(value))
COUNT_OR_NULL = Limit("1 or more, or null", lambda value: value >= 1)
SEED = Limit(f"from 0 to {2**32 - 1}", lambda value: 0 <= value < 2**32)
"""What every random number generator takes."""


def check_limits(owner: Callable[..., Any], prefix: str = "", /, **values: Any) -> None:
    """Raise InputError for the first value out of the limit that its parameter of `owner` declares."""
    hints = _hints(owner)
    for name, value in values.items():
        check_limit(hints[name], prefix + name, value)


def check_limit(annotation: Any, name: str, value: Any) -> None:
    """Raise InputError for a value out of the limit that its annotation declares, if it declares one.

    None, and words such as "auto", pass where the annotation has them beside numbers.
    """
    limit = next((mark for mark in getattr(annotation, "__metadata__", ()) if isinstance(mark, Limit)), None)
    if limit is None:
        return
    kinds = get_args(get_args(annotation)[0])
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    if not (value is None and NoneType in kinds) and value not in words:
        limit.check(name, value)


@lru_cache(maxsize=64)
def _hints(owner: Callable[..., Any]) -> dict[str, Any]:
    return typing.get_type_hints(owner, include_extras=True)
