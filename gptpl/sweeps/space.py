"""What a sweep tries: for each setting a list of values or an interval, and how one of them is drawn."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptpl.errors import InputError

if TYPE_CHECKING:
    from optuna import Trial


@dataclass(frozen=True, kw_only=True)
class Choices:
    """Values to choose from, as they stand in an override."""

    values: tuple[str, ...]

    def drawn(self, trial: "Trial", name: str) -> str:
        """The value of a trial; asked again, the same one."""
        return str(trial.suggest_categorical(name, self.values))

    def extremes(self) -> tuple[str, ...]:
        """Values that are valid only if all are."""
        return self.values

    def __str__(self) -> str:
        return ",".join(self.values)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Numbers from `low` to `high`, both included; `log`: each power of ten is as likely as the next."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def drawn(self, trial: "Trial", name: str) -> str:
        """See `Choices`."""
        if self.whole:
            return str(trial.suggest_int(name, int(self.low), int(self.high), log=self.log))
        return repr(trial.suggest_float(name, self.low, self.high, log=self.log))

    def extremes(self) -> tuple[str, ...]:
        """Values that are valid only if all are, as far as one can tell."""
        return tuple(str(int(end) if self.whole else end) for end in (self.low, self.high))

    def __str__(self) -> str:
        text = f"interval({', '.join(self.extremes())})"
        text = f"int({text})" if self.whole else text
        return f"tag(log, {text})" if self.log else text


Dimension = Choices | Interval
SearchSpace = Mapping[str, Dimension]
"""The swept settings, by their keys."""


def check(space: SearchSpace) -> None:
    """Raises InputError for an interval without numbers, and for a list that names a value twice."""
    for name, dimension in space.items():
        if isinstance(dimension, Choices):
            values = dimension.values
            if twice := next((value for value in values if values.count(value) > 1), None):
                raise InputError(f"{name}={dimension} has {twice} twice: leave one out")
        elif not (-math.inf < dimension.low < dimension.high < math.inf):
            raise InputError(f"{name}={dimension} is no interval: give interval(LOW, HIGH) with LOW < HIGH")
        elif dimension.log and dimension.low <= 0:
            raise InputError(f"{name}={dimension}: a logarithmic interval begins above 0")


def combinations(space: SearchSpace) -> list[dict[str, str]]:
    """Every combination of the values, the last setting changing fastest.

    Raises InputError for an interval, which has no end of values.
    """
    values = []
    for name, dimension in space.items():
        if not isinstance(dimension, Choices):
            raise InputError(
                f"{name}={dimension} has no list of values: give one, such as {name}=1,2, or draw from it"
                " with sweep=tpe or sweep=random"
            )
        values.append(dimension.values)
    return [dict(zip(space, chosen, strict=True)) for chosen in itertools.product(*values)]


def one_at_a_time(space: SearchSpace) -> list[dict[str, str]]:
    """Each value of each setting once (of an interval its ends), the other settings at their first."""
    first = {name: dimension.extremes()[0] for name, dimension in space.items()}
    others = [
        first | {name: value} for name, dimension in space.items() for value in dimension.extremes()[1:]
    ]
    return [first, *others]


def overrides(values: Mapping[str, object]) -> tuple[str, ...]:
    """`key=value` for each."""
    return tuple(f"{name}={value}" for name, value in values.items())
