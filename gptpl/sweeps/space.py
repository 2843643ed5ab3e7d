"""What a sweep tries: for each setting a list of values or an interval, and how one of them is drawn."""

import itertools
import math
from collections.abc import Iterable, Mapping
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

    def check(self, name: str) -> None:
        """Raises InputError where there are no numbers to draw, or none have a logarithm."""
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise InputError(f"{name}={self} is no interval: give interval(LOW, HIGH) with LOW < HIGH")
        if self.log and self.low <= 0:
            raise InputError(f"{name}={self}: a logarithmic interval begins above 0")

    def drawn(self, trial: "Trial", name: str) -> str:
        """The value of a trial; asked again, the same one."""
        if self.whole:
            return str(trial.suggest_int(name, int(self.low), int(self.high), log=self.log))
        return repr(trial.suggest_float(name, self.low, self.high, log=self.log))

    def extremes(self) -> tuple[str, ...]:
        """Values that are valid only if all are, as far as one can tell."""
        return str(self._number(self.low)), str(self._number(self.high))

    def __str__(self) -> str:
        text = f"interval({self._number(self.low)}, {self._number(self.high)})"
        text = f"int({text})" if self.whole else text
        return f"tag(log, {text})" if self.log else text

    def _number(self, value: float) -> float:
        return int(value) if self.whole else value


Dimension = Choices | Interval
SearchSpace = Mapping[str, Dimension]
"""The swept settings, by their keys."""


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


def drawn(trial: "Trial", space: SearchSpace) -> dict[str, str]:
    """The values of a trial, as texts of overrides; asked again, the same ones."""
    return {name: dimension.drawn(trial, name) for name, dimension in space.items()}


def overrides(values: Mapping[str, object]) -> tuple[str, ...]:
    """`key=value` for each."""
    return tuple(f"{name}={value}" for name, value in values.items())


def written(space: SearchSpace) -> dict[str, str]:
    """The space as it would be given on the command line."""
    return {name: str(dimension) for name, dimension in space.items()}


def check(space: SearchSpace) -> None:
    """Raises InputError for an interval without numbers, and for a list that names a value twice."""
    for name, dimension in space.items():
        if isinstance(dimension, Interval):
            dimension.check(name)
        elif twice := _repeated(dimension.values):
            raise InputError(f"{name}={dimension} has {twice} twice: leave one out")


def _repeated(values: Iterable[str]) -> str:
    seen: set[str] = set()
    for value in values:
        if value in seen:
            return value
        seen.add(value)
    return ""
