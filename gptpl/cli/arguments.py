"""The command line of every command: flags, overrides or paths; what Hydra's flags show."""

import argparse
import re
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from gptpl.errors import InputError
from gptpl.text import nearest

if TYPE_CHECKING:
    from gptpl.config.compose import Config

INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


class Arguments(argparse.Namespace):
    """What was given: `overrides`, all that is no flag; the command's own `flags`; and Hydra's.

    `config_dir` is absolute; `cfg` (job, hydra or all) and `info` say what to show instead of running. A
    command that is `configured` has also the config that they compose to, and the packages that they name.
    """

    config: "Config"
    trusted: frozenset[str]
    overrides: list[str]
    flags: list[str]
    multirun: bool
    config_name: str
    config_dir: str | None
    cfg: str | None
    resolve: bool
    package: str | None
    info: str | None


class _Parser(argparse.ArgumentParser):
    def __init__(self, **settings: Any) -> None:
        self.flags: list[str] = []
        super().__init__(**settings)

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        action = super().add_argument(*names, **settings)
        self.flags += action.option_strings
        return action

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog}: {message}; see {self.prog} --help")


def configured(
    command: str, *, flags: Collection[str] = (), in_full: Callable[[str], str] = str
) -> Callable[[Callable[[Arguments], int | None]], Callable[[Sequence[str]], int]]:
    """Makes a command of a function of its arguments, which returns the exit status; None is 0.

    The log is shown while it runs; with --cfg or --info it does not run. `flags` are the command's own;
    `in_full` writes abbreviated arguments out.
    """
    from gptpl.cli.console import console
    from gptpl.config.compose import composed

    def command_of(function: Callable[[Arguments], int | None]) -> Callable[[Sequence[str]], int]:
        def run(arguments: Sequence[str]) -> int:
            given = parse(command, list(map(in_full, arguments)), flags=flags)
            if shown(given):
                return 0
            found = composed(given.overrides, given.config_name, config_dir=given.config_dir)
            given.config, given.trusted = found.cfg, found.trusted
            with console():
                return function(given) or 0

        return run

    return command_of


def parse(
    command: str, arguments: Sequence[str], *, flags: Collection[str] = (), sweeps: bool = False
) -> Arguments:
    """Sorts the arguments of a command that has a config and these flags of its own.

    Raises InputError for an unknown flag, and for `-m` where the command does not sweep.
    """
    parser = _Parser(prog=f"gptpl {command}", add_help=False, allow_abbrev=False)
    for flag in flags:
        parser.add_argument(flag, dest="flags", action="append_const", const=flag)
    parser.set_defaults(flags=[])
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("-c", "--cfg", choices=("job", "hydra", "all"))
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("-p", "--package")
    parser.add_argument(*(() if "-i" in flags else ("-i",)), "--info", nargs="?", const="all", choices=INFO)
    root = command.replace(" ", "_").replace("-", "_")
    parser.add_argument("-cn", "--config-name", default=root)
    parser.add_argument("-cd", "--config-dir")
    if "" in arguments:
        raise InputError("'' is no override: give KEY=VALUE")
    given, rest = parser.parse_known_args(arguments, namespace=Arguments())
    given.overrides = [each for each in rest if each != "--"]
    for override in given.overrides:  # `~callbacks.x=1` and the like are no flags of argparse's
        if override.startswith("-"):
            raise InputError(_unknown_flag(command, override, parser))
    if given.multirun and not sweeps:
        raise InputError(f"-m sweeps over settings of gptpl train: run gptpl {command} once for each value")
    if given.config_dir is not None:
        given.config_dir = str(Path(given.config_dir).expanduser().absolute())
        here = str(Path.cwd())  # whose classes can be imported, as with `python -m`
        if here not in sys.path and "" not in sys.path:
            sys.path.append(here)
    if given.config_name != root:
        from gptpl.config.groups import root_of

        if (found := root_of(given.config_name, given.config_dir)) != root:
            raise InputError(
                f"--config-name {given.config_name} extends {found}: give gptpl {command} a root that extends"
                f" {root}"
            )
    return given


def _unknown_flag(command: str, flag: str, parser: _Parser) -> str:
    name = flag.partition("=")[0]
    flags = parser.flags
    if name in ("-cp", "--config-path"):
        return f"{name}: gptpl keeps its own configs; give --config-dir FOLDER for yours beside them"
    if name == "--hydra-help":
        return f"--hydra-help: see gptpl {command} --help, and --info for what Hydra knows"
    word = name.lstrip("-").replace("-", "_")
    is_key = re.fullmatch(r"[a-z_.]{2,}", word) and f"--{word}" not in flags
    remedy = f": did you mean {word}=VALUE?" if is_key else f": its flags are {', '.join(flags)}"
    return f"{name} is no flag of gptpl {command}{nearest(name, flags, likeness=0.75) or remedy}"


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


class PlainArguments(NamedTuple):
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
    paths: list[Path] = []
    values: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if argument in flags:
            continue
        if argument.startswith("-"):
            remedy = nearest(argument, flags, likeness=0.7) or _offer("flags", flags)
            raise InputError(f"{argument} is no flag of gptpl {command}{remedy}")
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
            paths.append(Path(argument).expanduser())
    return PlainArguments(paths=paths, flags=frozenset(arguments) & frozenset(flags), settings=values)


def _offer(kind: str, names: Collection[str]) -> str:
    return f": its {kind} are {', '.join(names)}" if names else f", which has no {kind}: leave it out"


# --- where a command is to write ------------------------------------------------------------------------


def checked_output(key: str, given: str, *, suffix: str = "") -> Path:
    """A file with the suffix, or a folder where there is none; raises InputError if it cannot be written."""
    path = Path(given).expanduser()
    if suffix and path.suffix.lower() != suffix:
        raise InputError(f"{key}={path} is no picture: give a name that ends in {suffix}")
    if suffix and path.is_dir():
        raise InputError(f"{key}={path} is a folder: give a file, such as {path / 'picture'}{suffix}")
    folder = (path.parent if suffix else path).absolute()
    existing = next(each for each in (folder, *folder.parents) if each.exists())
    if not existing.is_dir():
        raise InputError(f"{key}={path} cannot be written: {existing} is a file")
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise InputError(
            f"{key}={path} cannot be written ({error.strerror}): choose a folder you may write to"
        ) from error
    return path
