"""Every key that a command's configs can have, read from the schemas, without composing anything."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from omegaconf import DictConfig, OmegaConf

from gptpl.cli.configs import choices, config_folder, default_choices
from gptpl.cli.schema import SCHEMAS


def known_keys(command: str) -> dict[str, list[str]]:
    """Every group and dotted key of a command, with the choices (`data=tale`) that bring it; [] is always."""
    keys: dict[str, list[str]] = {name: [] for name in _dotted(SCHEMAS[command])}
    for group in default_choices(command):
        keys.setdefault(group, [])
        for choice in choices(group):
            path = config_folder() / group / f"{choice}.yaml"
            for name in _keys_of_choice(path, group.replace("/", ".")):
                keys.setdefault(name, []).append(f"{group}={choice}")
    return keys


def fields_of(schema: str) -> list[str]:
    """Names of the fields of a schema class, also of one that is only a part of others; none if unknown."""
    for cls in _with_parts(*SCHEMAS.values()):
        if cls.__name__ == schema:
            return [field.name for field in dataclasses.fields(cls)]
    return []


def target_of_choice(path: Path, group: str) -> str:
    """The class that a choice of a group names, by its YAML or by the schema that it takes."""
    config = OmegaConf.load(path)
    assert isinstance(config, DictConfig)
    own = config.get(group, config) if is_global(path) else config
    if "_target_" in own:
        return str(own["_target_"])
    wanted = f"@{group}" if is_global(path) else "@_here_"
    entries = [str(entry) for entry in config.get("defaults", [])]
    schema = next(entry for entry in entries if entry.startswith("/schema/") and entry.endswith(wanted))
    return str(SCHEMAS[schema.removeprefix("/schema/").removesuffix(wanted)]()._target_)


def is_global(path: Path) -> bool:
    """Whether a YAML's keys are the root's."""
    return path.read_text(encoding="utf-8").startswith("# @package _global_")


def _keys_of_choice(path: Path, group: str) -> Iterator[str]:
    """The keys that a YAML's own schemas give it: `/schema/<name>@_here_`, or `@<name of the part>`.

    The parts of a `@package _global_` are those of the root.
    """
    config = OmegaConf.load(path)
    assert isinstance(config, DictConfig)
    of_root = is_global(path)
    for entry in config.get("defaults", []):
        if isinstance(entry, str) and entry.startswith("/schema/"):
            schema, _, package = entry.removeprefix("/schema/").partition("@")
            prefix = group if package == "_here_" else package if of_root else f"{group}.{package}"
            if prefix != group:
                yield prefix
            yield from _dotted(SCHEMAS[schema], f"{prefix}.")


def _dotted(schema: type, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(schema):
        yield f"{prefix}{field.name}"
        if dataclasses.is_dataclass(field.type):
            yield from _dotted(field.type, f"{prefix}{field.name}.")  # type: ignore[arg-type]


def _with_parts(*schemas: Any) -> Iterator[type]:
    """The classes, and those that their fields have as type or as type of their items."""
    for schema in schemas:
        if dataclasses.is_dataclass(schema):
            yield schema  # type: ignore[misc]
            for field in dataclasses.fields(schema):
                yield from _with_parts(field.type, *get_args(field.type))
