"""Arguments of the commands without a config: paths, `--flags`, and a few `key=value`."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from gptpl.cli.nearest import nearest
from gptpl.errors import InputError


@dataclass(frozen=True, kw_only=True)
class PlainArguments:
    """What was given."""

    paths: list[Path]
    flags: frozenset[str]
    settings: Mapping[str, str]


def parse(
    command: str,
    arguments: list[str],
    *,
    flags: Collection[str] = (),
    settings: Mapping[str, Collection[str]] | None = None,
) -> PlainArguments:
    """Sorts the arguments of `gptpl <command>`, in whatever order they were given.

    `settings` are the keys with their choices. Raises InputError for other flags, keys and choices. A path
    with a `=` in it is a path where it is there.
    """
    known = settings or {}
    found = PlainArguments(paths=[], flags=frozenset(a for a in arguments if a in flags), settings={})
    values: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if argument in found.flags:
            continue
        if argument.startswith("-"):
            raise InputError(
                f"{argument} is no flag of gptpl {command}"
                f"{nearest(argument, flags, likeness=0.7) or _offer('flags', flags)}"
            )
        if equals and key in known:
            if value not in known[key]:
                raise InputError(f"{argument} is unknown: choose one of {', '.join(known[key])}")
            values[key] = value
        elif equals and re.fullmatch(r"\w[\w.]*", key) and not Path(argument).exists():
            raise InputError(
                f"{key} is no key of gptpl {command}{nearest(key, known) or _offer('keys', known)}"
            )
        elif not argument:
            raise InputError(f"'' is no path: give gptpl {command} a folder, or leave it out")
        else:
            found.paths.append(Path(argument).expanduser())
    return PlainArguments(paths=found.paths, flags=found.flags, settings=values)


def _offer(kind: str, names: Collection[str]) -> str:
    return f": its {kind} are {', '.join(names)}" if names else f", which has no {kind}: leave it out"
