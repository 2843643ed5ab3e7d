"""The command line of every command: flags, overrides or paths; what Hydra's flags show."""

import argparse
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from gptpl.errors import InputError
from gptpl.text import nearest

INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What was given.

    Attributes:
        overrides: all that is no flag, as it was given.
        flags: the command's own flags that were given.
        multirun: whether to sweep.
        config_name: the root config.
        config_dir: the user's own config folder, absolute.
        cfg: what of the config to show instead of running: job, hydra or all.
        resolve: whether to fill in interpolations there.
        package: the part of the config to show.
        info: what Hydra is to tell instead.
    """

    overrides: list[str]
    flags: frozenset[str]
    multirun: bool
    config_name: str
    config_dir: str | None
    cfg: str | None
    resolve: bool
    package: str | None
    info: str | None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog}: {message}; see {self.prog} --help")


def parse(
    command: str, arguments: Sequence[str], *, flags: Mapping[str, str] | None = None, sweeps: bool = False
) -> Arguments:
    """Sorts the arguments of a command that has a config.

    `flags` are its own, each with the name that it is kept under. Raises InputError for an unknown flag, and
    for `-m` where the command does not sweep.
    """
    own = dict(flags or {})
    parser = _Parser(prog=f"gptpl {command}", add_help=False, allow_abbrev=False)
    for flag, name in own.items():
        parser.add_argument(flag, dest="flags", action="append_const", const=name)
    parser.set_defaults(flags=None)
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("-c", "--cfg", choices=("job", "hydra", "all"))
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("-p", "--package")
    parser.add_argument(*(() if "-i" in own else ("-i",)), "--info", nargs="?", const="all", choices=INFO)
    root = command.replace(" ", "_").replace("-", "_")
    parser.add_argument("-cn", "--config-name", default=root)
    parser.add_argument("-cd", "--config-dir")
    known, overrides = _apart(parser, arguments)
    for override in overrides:
        if override.startswith("-"):
            raise InputError(_unknown_flag(command, override, parser))
    if known.multirun and not sweeps:
        raise InputError(f"-m sweeps over settings of gptpl train: run gptpl {command} once for each value")
    folder = None if known.config_dir is None else Path(known.config_dir).expanduser().absolute()
    if folder is not None:
        use_working_folder()
    if known.config_name != root:
        _check_root(known.config_name, folder, root, command)
    return Arguments(
        overrides=overrides,
        flags=frozenset(known.flags or ()),
        multirun=known.multirun,
        config_name=known.config_name,
        config_dir=None if folder is None else str(folder),
        cfg=known.cfg,
        resolve=known.resolve,
        package=known.package,
        info=known.info,
    )


def _apart(parser: _Parser, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Flags, and all else in its order."""
    for argument in arguments:  # `~callbacks.x=1`, `-1` and the like are no flags of argparse's
        if argument == "":
            raise InputError("'' is no override: give KEY=VALUE")
    known, rest = parser.parse_known_args(list(arguments))
    return known, [each for each in rest if each != "--"]


def _unknown_flag(command: str, flag: str, parser: _Parser) -> str:
    name = flag.partition("=")[0]
    flags = [each for action in parser._actions for each in action.option_strings]
    if name in ("-cp", "--config-path"):
        return f"{name}: gptpl keeps its own configs; give --config-dir FOLDER for yours beside them"
    if name == "--hydra-help":
        return f"--hydra-help: see gptpl {command} --help, and --info for what Hydra knows"
    word = name.lstrip("-").replace("-", "_")
    key = (
        f": did you mean {word}=VALUE?"
        if re.fullmatch(r"[a-z_.]{2,}", word) and f"--{word}" not in flags
        else ""
    )
    return (
        f"{name} is no flag of gptpl {command}"
        f"{nearest(name, flags, likeness=0.75) or key or ': its flags are ' + ', '.join(flags)}"
    )


def _check_root(name: str, folder: Path | None, root: str, command: str) -> None:
    """Raises InputError for a root of the user's that has not the settings of this command."""
    from gptpl.config.groups import root_of

    if (found := root_of(name, folder)) != root:
        raise InputError(
            f"--config-name {name} extends {found}: give gptpl {command} a root that extends {root}"
        )


def use_working_folder() -> None:
    """Lets classes of the folder that one is in be imported, as `python -m` does."""
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)


def shown(arguments: Arguments) -> bool:
    """Prints what `--cfg` or `--info` asks for; whether one did."""
    from gptpl.config.compose import composed, show_info, to_yaml

    if arguments.info is not None:
        show_info(arguments.info, arguments.config_name, arguments.overrides, arguments.config_dir)
        return True
    if arguments.cfg is None:
        return False
    if arguments.config_name == "train":
        from gptpl.runs.build import planned_config

        cfg, hydra = planned_config(arguments.overrides, config_dir=arguments.config_dir)
    else:
        found = composed(arguments.overrides, arguments.config_name, config_dir=arguments.config_dir)
        cfg, hydra = found.cfg, found.hydra
    for part in {"job": [cfg], "hydra": [hydra], "all": [cfg, hydra]}[arguments.cfg]:
        for key in arguments.package.split(".") if arguments.package else ():
            if key not in part:
                raise InputError(f"--package {arguments.package} is no part of the config")
            part = part[key]
        print(to_yaml(part, resolve=arguments.resolve), end="")
    return True


# --- commands without a config --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PlainArguments:
    """What was given."""

    paths: list[Path]
    flags: frozenset[str]
    settings: Mapping[str, str]


def parse_plain(
    command: str,
    arguments: Sequence[str],
    *,
    flags: Collection[str] = (),
    settings: Mapping[str, Collection[str]] | None = None,
) -> PlainArguments:
    """Sorts the arguments of a command that takes paths, `--flags`, and a few `key=value`, in any order.

    `settings` are the keys with their choices; no choices: any value. Raises InputError for other flags, keys
    and choices. A path with a `=` in it is a path where it is there.
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
            if known[key] and value not in known[key]:
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
