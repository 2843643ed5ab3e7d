"""The settings that a sweep varies, each with a list of values or an interval: Optuna's distributions."""

import itertools
import math
from collections.abc import Mapping, Sequence

from optuna import Trial
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from gptpl.errors import InputError

Dimension = CategoricalDistribution | FloatDistribution | IntDistribution
"""The values of a list as they are written in an override, or numbers from `low` to `high`, both included."""
SearchSpace = Mapping[str, Dimension]
"""Dimensions by the keys of their settings."""


def values(name: str, given: Sequence[str]) -> CategoricalDistribution:
    """A list of values. Raises InputError if it has a value twice."""
    if twice := next((value for value in given if given.count(value) > 1), None):
        raise InputError(f"{name}={','.join(given)} has {twice} twice: leave one out")
    return CategoricalDistribution(tuple(given))


def interval(name: str, low: float, high: float, *, log: bool = False) -> FloatDistribution | IntDistribution:
    """An interval, of whole numbers if both ends are; `log`: each power of ten is equally likely.

    Raises InputError for an empty one, and for a logarithmic one that does not begin above 0.
    """
    if not -math.inf < low < high < math.inf:
        raise InputError(f"{name}=interval({low}, {high}) must have LOW < HIGH")
    if log and low <= 0:
        raise InputError(f"{name}=interval({low}, {high}) is logarithmic and must begin above 0")
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=log)
    return FloatDistribution(low, high, log=log)


def drawn(trial: Trial, name: str, dimension: Dimension) -> object:
    """A trial's value; the same one if the trial is asked again."""
    if isinstance(dimension, CategoricalDistribution):
        return trial.suggest_categorical(name, dimension.choices)
    if isinstance(dimension, IntDistribution):
        return trial.suggest_int(name, dimension.low, dimension.high, log=dimension.log)
    return trial.suggest_float(name, dimension.low, dimension.high, log=dimension.log)


def as_text(dimension: Dimension) -> str:
    """The dimension as it would be given on the command line."""
    if isinstance(dimension, CategoricalDistribution):
        return ",".join(map(str, dimension.choices))
    text = f"interval({dimension.low}, {dimension.high})"
    text = f"int({text})" if isinstance(dimension, IntDistribution) else text
    return f"tag(log, {text})" if dimension.log else text


def combinations(space: SearchSpace) -> list[dict[str, str]]:
    """Every combination of the values, the last setting changing fastest.

    Raises InputError for an interval, whose values cannot be listed.
    """
    for name, dimension in space.items():
        if not isinstance(dimension, CategoricalDistribution):
            raise InputError(
                f"{name}={as_text(dimension)} is an interval: give a list of values, such as {name}=1,2, or"
                " draw from it with sweep=tpe or sweep=random"
            )
    every = itertools.product(*map(_extremes, space.values()))
    return [dict(zip(space, chosen, strict=True)) for chosen in every]


def one_at_a_time(space: SearchSpace) -> list[dict[str, str]]:
    """Each value of each setting once (of an interval its ends), the other settings at their first."""
    first = {name: _extremes(dimension)[0] for name, dimension in space.items()}
    return [first] + [
        first | {name: value} for name, dimension in space.items() for value in _extremes(dimension)[1:]
    ]


def _extremes(dimension: Dimension) -> list[str]:
    """The values of a list, or the ends of an interval: if these are valid, all are."""
    if isinstance(dimension, CategoricalDistribution):
        return [str(choice) for choice in dimension.choices]
    return [str(dimension.low), str(dimension.high)]


def overrides(settings: Mapping[str, object]) -> tuple[str, ...]:
    """`key=value` for each."""
    return tuple(f"{name}={value}" for name, value in settings.items())
