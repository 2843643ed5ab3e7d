"""Settings of a command that otherwise takes the overrides of `gptpl train`: `plan.output=...`."""

import difflib
import math
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from gptpl.cli.quoting import is_sweep
from gptpl.errors import InputError

_FLAGS_TAKEN = ("-cd", "--config-dir")


class OwnSettings:
    """A command's own settings, split from the overrides of `gptpl train`, which stay in `overrides`.

    Args:
        command: its name, for messages.
        arguments: all of the command line.
        prefix: of the own keys, without the dot.
        keys: the own keys, without the prefix.

    Raises InputError for an own key that does not exist, a sweep, `resume=`, and Hydra's flags that only show
    settings.
    """

    def __init__(self, command: str, arguments: Sequence[str], *, prefix: str, keys: Sequence[str]) -> None:
        self._prefix = prefix
        self._given: dict[str, str] = {}
        self.overrides: list[str] = []
        if is_sweep(list(arguments)):
            raise InputError(
                f"-m sweeps over settings of gptpl train: run gptpl {command} once for each value"
            )
        for argument in arguments:
            key, _, value = argument.partition("=")
            name = key.lstrip("+~")
            if name == "resume":
                raise InputError(
                    f"{argument} is for gptpl train: gptpl {command} looks at a run from its start"
                )
            if name.partition(".")[0] == prefix:
                self._given[_known(name, [f"{prefix}.{own}" for own in keys], command)] = value
                continue
            if argument.startswith("-") and key not in _FLAGS_TAKEN:
                raise InputError(f"{key} is no flag of gptpl {command}: see gptpl {command} --help")
            self.overrides.append(argument)

    def whole(self, key: str, default: int | None, *, least: int) -> int | None:
        """A whole number of `least` or more; `null` and a key that is not given are the default."""
        name, value = self._value(key)
        if value is None:
            return default
        if not re.fullmatch(r"\d+", value) or int(value) < least:
            raise InputError(f"{name}={value} cannot be: give a whole number of {least} or more")
        return int(value)

    def positive(self, key: str, default: float) -> float:
        """A number above 0."""
        name, value = self._value(key)
        if value is None:
            return default
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not (number > 0 and math.isfinite(number)):
            raise InputError(f"{name}={value} cannot be: give a positive number such as {default:g}")
        return number

    def file(self, key: str, default: str) -> Path:
        """A PNG file that can be written; raises InputError otherwise."""
        name, value = self._value(key)
        path = Path(_unquoted(value or default)).expanduser()
        if path.suffix.lower() != ".png":
            raise InputError(f"{name}={path} is no picture: give a name that ends in .png")
        if path.is_dir():
            raise InputError(f"{name}={path} is a folder: give a file, such as {path / default}")
        _check_writable(name, path, path.parent)
        return path

    def folder(self, key: str) -> Path:
        """A folder that can be written into, by default the present one; raises InputError otherwise."""
        name, value = self._value(key)
        folder = Path(_unquoted(value or ".")).expanduser()
        _check_writable(name, folder, folder)
        return folder

    def _value(self, key: str) -> tuple[str, str | None]:
        name = f"{self._prefix}.{key}"
        value = self._given.get(name)
        return name, None if value in (None, "null") else value


def _known(name: str, keys: Sequence[str], command: str) -> str:
    if name in keys:
        return name
    nearest = difflib.get_close_matches(name, keys, n=1, cutoff=0.5)
    meant = f": did you mean {nearest[0]}?" if nearest else ""
    raise InputError(f"{name} is no key of gptpl {command}{meant}; its keys are {', '.join(keys)}")


def _check_writable(name: str, path: Path, folder: Path) -> None:
    """The folder, or the nearest one above it, is one, and can be written into."""
    existing = next(f for f in (folder.absolute(), *folder.absolute().parents) if f.exists())
    if not existing.is_dir():
        raise InputError(f"{name}={path} cannot be written: {existing} is a file")
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise InputError(
            f"{name}={path} cannot be written ({error.strerror}): choose a folder you may write to"
        ) from error


def _unquoted(value: str) -> str:
    match = re.fullmatch(r"(['\"])(.*)\1", value)
    return match[2] if match else value
