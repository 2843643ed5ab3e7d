"""What was asked of a sweep: the settings that all trials share, and the values that the others try."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override
from hydra.errors import OverrideParseException

from gptpl.cli.configs import choices
from gptpl.cli.explain import explain
from gptpl.cli.quoting import PATHS, flags_first
from gptpl.errors import InputError
from gptpl.sweeps.space import Choices, Dimension, Interval

OWN_KEYS = ("sweep", "hydra/launcher")
OWN_PREFIXES = ("sweep.", "hydra.launcher.", "hydra.sweep.")
_SET_BY_THE_SWEEP = {
    "run_dir": "each trial has a folder of its own in the sweep's: give hydra.sweep.dir, or leave -m out",
    "resume": "it continues one run, which no sweep can: leave -m out",
}


@dataclass(frozen=True, kw_only=True)
class SweepArguments:
    """Arguments of `gptpl sweep`, sorted.

    Attributes:
        own: overrides of the sweep's own settings.
        shared: overrides that every trial has, as they were given.
        swept: the settings with several values.
    """

    own: list[str]
    shared: list[str]
    swept: dict[str, Dimension]


def parse(arguments: Sequence[str]) -> SweepArguments:
    """Sorts the arguments. Raises InputError for those that no sweep can have."""
    own: list[str] = []
    shared: list[str] = []
    swept: dict[str, Dimension] = {}
    for argument in flags_first([each for each in arguments if each not in ("-m", "--multirun")]):
        key = argument.lstrip("+~").partition("=")[0]
        if argument.startswith("-"):
            raise InputError(f"{argument} shows the settings of one run: leave -m out")
        if key in _SET_BY_THE_SWEEP:
            raise InputError(f"{argument} in a sweep: {_SET_BY_THE_SWEEP[key]}")
        if key in OWN_KEYS or key.startswith(OWN_PREFIXES):
            own.append(argument)
        elif key in PATHS and "," not in argument:  # any other character may be part of a path
            shared.append(argument)
        elif (dimension := parsed(argument)) is not None:
            swept[key] = dimension
        else:
            shared.append(argument)
    return SweepArguments(own=own, shared=shared, swept=swept)


def parsed(argument: str) -> Dimension | None:
    """The values of an override that has several; None where it has one."""
    try:
        [override] = OverridesParser.create().parse_overrides([argument])
    except OverrideParseException as error:
        raise InputError(explain(error, "sweep")) from error
    if not override.is_sweep_override():
        return None
    return _dimension(override, override.value())


def _dimension(override: Override, value: Any) -> Dimension:
    if isinstance(value, IntervalSweep):
        assert value.start is not None
        assert value.end is not None
        whole = isinstance(value.start, int) and isinstance(value.end, int)
        return Interval(low=value.start, high=value.end, log="log" in value.tags, whole=whole)
    if isinstance(value, Glob):
        offered = choices(override.key_or_group)
        found = tuple(value.filter(offered))
        if not found:
            raise InputError(
                f"{override.input_line} fits no choice of {override.key_or_group}: {', '.join(offered)}"
            )
        return Choices(values=found)
    return Choices(values=tuple(override.sweep_string_iterator()))
