"""The arguments of commands: flags, Hydra overrides or paths; what --cfg and --info print."""

import argparse
import re
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from gptpl.config.groups import known_keys, root_of, root_of_command
from gptpl.errors import InputError, os_error_text
from gptpl.text import nearest

if TYPE_CHECKING:
    from gptpl.config.compose import Config

INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


class Arguments(argparse.Namespace):
    """The arguments of a command with a config.

    Attributes:
        config: what the overrides compose to; only for a command that is `configured`, as is `trusted`.
        trusted: the packages that overrides and the user's folder name.
        overrides: all arguments that are not flags.
        flags: the command's own.
        config_dir: the user's folder, absolute.
        cfg, info: what to print instead of running.
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

    def refuse(self, flag: str) -> NoReturn:
        """Raises InputError for an unknown flag."""
        name = flag.partition("=")[0]
        word = name.lstrip("-").replace("-", "_")
        is_key = re.fullmatch(r"[a-z_.]{2,}", word) and f"--{word}" not in self.flags
        remedy = f": its flags are {', '.join(self.flags)}"
        if is_key:
            from gptpl.config.overrides import nearest_key  # with Hydra

            meant = nearest_key(word, known_keys(str(self.get_default("config_name"))))
            remedy = f"{meant.removesuffix('?') or f': did you mean {word}'}=VALUE?"
        raise InputError(
            f"{self.prog} has no flag {name}{nearest(name, self.flags, likeness=0.75) or remedy}"
        )


def configured(
    command: str, *, flags: Collection[str] = (), in_full: Callable[[str], str] = str
) -> Callable[[Callable[[Arguments], int | None]], Callable[[Sequence[str]], int]]:
    """Make a command of a function of `Arguments` that returns the exit status, None for 0.

    With --cfg or --info the function is not called. `in_full` writes abbreviated arguments out.
    """

    def command_of(function: Callable[[Arguments], int | None]) -> Callable[[Sequence[str]], int]:
        def run(arguments: Sequence[str]) -> int:
            given = parse(command, list(map(in_full, arguments)), flags=flags)
            if shown(given):
                return 0
            from gptpl.cli.console import collector_paused, console
            from gptpl.config.compose import composed

            with collector_paused():
                found = composed(given.overrides, given.config_name, config_dir=given.config_dir)
            given.config, given.trusted = found.cfg, found.trusted
            with console():
                return function(given) or 0

        return run

    return command_of


def parse(
    command: str, arguments: Sequence[str], *, flags: Collection[str] = (), sweeps: bool = False
) -> Arguments:
    """The arguments of a command with a config and flags of its own; only one that `sweeps` takes -m."""
    parser = _Parser(prog=f"gptpl {command}", add_help=False, allow_abbrev=False)
    for flag in flags:
        parser.add_argument(flag, dest="flags", action="append_const", const=flag)
    parser.set_defaults(flags=[])
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("-c", "--cfg", choices=("job", "hydra", "all"))
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("-p", "--package")
    parser.add_argument(*(() if "-i" in flags else ("-i",)), "--info", nargs="?", const="all", choices=INFO)
    root = root_of_command(command)
    parser.add_argument("-cn", "--config-name", default=root)
    parser.add_argument("-cd", "--config-dir")
    if "" in arguments:
        raise InputError("'' is not an override: give KEY=VALUE")
    given, rest = parser.parse_known_args(arguments, namespace=Arguments())
    given.overrides = [each for each in rest if each != "--"]
    for override in given.overrides:
        if override.startswith("-"):
            parser.refuse(override)
    if given.multirun and not sweeps:
        raise InputError(f"-m sweeps over settings of gptpl train: run gptpl {command} once for each value")
    if given.config_dir is not None:
        given.config_dir = str(Path(given.config_dir).expanduser().absolute())
    if given.config_dir is not None or any(each.lstrip("+").startswith("trust=") for each in given.overrides):
        here = str(Path.cwd())  # its modules can be imported, as with `python -m`
        if here not in sys.path and "" not in sys.path:
            sys.path.append(here)
    if given.config_name != root and (found := root_of(given.config_name, given.config_dir)) != root:
        raise InputError(
            f"--config-name {given.config_name} extends {found}: give gptpl {command} a root that extends"
            f" {root}"
        )
    return given


def shown(arguments: Arguments) -> bool:
    """Print what `--cfg` or `--info` asks for, if one of them is given; returns whether it is."""
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
            if not isinstance(part, Mapping) or key not in part:
                raise InputError(f"--package {arguments.package}: the config has no such part")
            part = part[key]
        print(to_yaml(part, resolve=arguments.resolve), end="")
    return True


# --- commands without a config --------------------------------------------------------------------------


class PlainArguments(NamedTuple):
    """The arguments of a command without a config."""

    paths: list[Path]
    flags: frozenset[str]
    settings: Mapping[str, str]


def parse_plain(
    command: str, arguments: Sequence[str], *, flags: Collection[str] = (), settings: Collection[str] = ()
) -> PlainArguments:
    """The arguments of a command that takes paths, these flags, and these settings as `key=value`.

    A path may have a `=` in it if it exists.
    """
    paths: list[Path] = []
    values: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if argument in flags:
            continue
        if argument.startswith("-"):
            remedy = nearest(argument, flags, likeness=0.7) or _offer("flags", flags)
            raise InputError(f"gptpl {command} has no flag {argument}{remedy}")
        if equals and key in settings:
            values[key] = value
        elif equals and re.fullmatch(r"\w[\w.]*", key) and not Path(argument).exists():
            remedy = nearest(key, settings) or _offer("settings", settings)
            raise InputError(f"gptpl {command} has no setting {key}{remedy}")
        elif not argument:
            raise InputError(f"'' is not a path: give gptpl {command} a folder, or leave it out")
        else:
            paths.append(Path(argument).expanduser())
    return PlainArguments(paths=paths, flags=frozenset(arguments) & frozenset(flags), settings=values)


def _offer(kind: str, names: Collection[str]) -> str:
    return f": its {kind} are {', '.join(names)}" if names else f": it has no {kind}, leave it out"


# --- outputs --------------------------------------------------------------------------------------------


def checked_output(key: str, given: str, *, suffix: str = "") -> Path:
    """The path of a file with the suffix, or of a folder, after checking that it can be written."""
    path = Path(given).expanduser()
    if suffix and (path.suffix.lower() != suffix or path.is_dir()):
        raise InputError(f"{key}={path} must be a file whose name ends in {suffix}")
    folder = (path.parent if suffix else path).absolute()
    existing = next(each for each in (folder, *folder.parents) if each.exists())
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise InputError(f"{key}={path} cannot be written: {os_error_text(error)}") from error
    return path
