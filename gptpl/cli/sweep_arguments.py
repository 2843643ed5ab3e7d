"""What was asked of a sweep: the settings that all trials share, and the values that the others try."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
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
    given: set[str] = set()
    rest = flags_first([each for each in arguments if each not in ("-m", "--multirun")])
    while rest:
        argument = rest.pop(0)
        if argument in ("-cd", "--config-dir"):
            shared += [argument, str(Path(rest.pop(0)).expanduser().absolute())]
            continue
        if argument.startswith("-"):
            raise InputError(f"{argument} shows the settings of one run: leave -m out")
        written_key = argument.partition("=")[0]
        key = written_key.lstrip("+~")
        if key in given:
            raise InputError(f"{key} is given twice: leave one out")
        given.add(key)
        if key in _SET_BY_THE_SWEEP:
            raise InputError(f"{argument} in a sweep: {_SET_BY_THE_SWEEP[key]}")
        if key in OWN_KEYS or key.startswith(OWN_PREFIXES):
            if key != "hydra.sweep.dir" and parsed(argument) is not None:
                raise InputError(f"{argument} is a setting of the sweep, which has one value of it: give one")
            own.append(argument)
        elif key.startswith("hydra"):
            raise InputError(f"{argument} has no meaning in a sweep: leave it out")
        elif key in PATHS and "," not in argument:  # any other character may be part of a path
            shared.append(argument)
        elif (dimension := parsed(argument)) is not None:
            swept[written_key] = dimension
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
    if getattr(value, "shuffle", False):
        raise InputError(
            f"{override.input_line}: the same command must find the same trials, so leave out shuffle, or"
            " draw from the values with sweep=random"
        )
    if isinstance(value, Glob):
        offered = choices(override.key_or_group)
        if not offered:
            raise InputError(
                f"{override.input_line}: {override.key_or_group} is no config group, whose choices glob could"
                " find: give a list of values"
            )
        found = tuple(value.filter(offered))
        if not found:
            raise InputError(
                f"{override.input_line} fits no choice of {override.key_or_group}: {', '.join(offered)}"
            )
        return Choices(values=found)
    return Choices(values=tuple(override.sweep_string_iterator()))
