"""From overrides to a checked config: Hydra's composition, without its command line and its global state."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.types import Glob, IntervalSweep, Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from gptpl.config.check import check
from gptpl.config.groups import (
    Folder,
    config_file,
    config_folder,
    folders,
    is_global,
    is_group,
    packages_named,
)
from gptpl.config.instantiate import locate
from gptpl.config.messages import explain
from gptpl.config.overrides import parsed, readable
from gptpl.errors import InputError

__all__ = ["Glob", "IntervalSweep", "Override"]  # of Hydra's grammar, for the rooms without Hydra

Config = DictConfig
"""A composed config: `cfg.optimizer.lr`, `cfg["data"]`."""


@dataclass(frozen=True, kw_only=True)
class Composed:
    """A config with what it was made of.

    Attributes:
        cfg: with interpolations, `hydra` left out.
        hydra: Hydra's own settings.
        choices: the choice of each config group.
        given: the overrides as they were given.
        trusted: packages that the overrides or the user's folder name classes of.
        config_dir: the user's folder.
    """

    cfg: DictConfig
    hydra: DictConfig
    choices: Mapping[str, Any]
    given: Sequence[Override]
    trusted: frozenset[str]
    config_dir: Folder | None


def compose(*overrides: str, config_name: str = "train", config_dir: Folder | None = None) -> DictConfig:
    """The config of a command: `compose("experiment=quick", "optimizer.lr=1e-3")`.

    Args:
        overrides: as on the command line.
        config_name: the root config: a command's, or one in the user's folder that extends it.
        config_dir: a folder of the user's own YAML files, beside gptpl's.

    Every node with a `_target_` is checked against the signature of its class. Raises InputError for whatever
    is wrong with an override or a YAML, naming the nearest right one.
    """
    return composed(overrides, config_name, config_dir=config_dir).cfg


def as_config(
    config: Sequence[DictConfig | str], config_dir: Folder | None = None, config_name: str = "train"
) -> DictConfig:
    """A copy of a composed config, or what overrides compose to."""
    if len(config) == 1 and not isinstance(config[0], str):
        return config[0].copy()
    return compose(*map(str, config), config_name=config_name, config_dir=config_dir)


def composed(
    overrides: Sequence[str],
    config_name: str = "train",
    *,
    config_dir: Folder | None = None,
    checked: bool = True,
    before: Sequence[str] = (),
) -> Composed:
    """See `compose`; without `checked`, for settings that are still to be completed by those of a run.

    `before` are overrides that nobody gave: they come first.
    """
    found = _searchpath(overrides)
    kept = [
        text.replace("hydra.run.dir", "run_dir", 1)
        for text in overrides
        if not text.lstrip("+").startswith("hydra.searchpath=")
    ]
    for text in kept:
        if text.lstrip("+~").startswith("hydra") and config_name != "sweep":
            raise InputError(
                f"{text} has no meaning in gptpl, which makes folders and logs itself: leave it out"
            )
    for_hydra = readable(kept, is_group=partial(is_group, config_dir=config_dir, more=found))
    given = [parsed(text) for text in for_hydra]
    places = folders(config_dir)
    primary = next((place for place in places if (place / f"{config_name}.yaml").is_file()), None)
    if primary is None:
        raise InputError(
            f"--config-name {config_name}: no {config_name}.yaml in {' or '.join(map(str, places))}"
        )
    more = ",".join(_quoted(path) for path in (*found, *map(str, places)) if path != str(primary))
    where = [f"hydra.searchpath=[{more}]"] if more else []
    try:
        with hydra.initialize_config_dir(str(primary), version_base="1.3", job_name=config_name):
            cfg = hydra.compose(config_name, [*where, *before, *for_hydra], return_hydra_config=True)
    except (
        HydraException,
        OmegaConfBaseException,
        YAMLError,
        ValueError,
        TypeError,
        AttributeError,
    ) as error:
        raise InputError(explain(error, config_name, kept, config_dir)) from error
    OmegaConf.set_struct(cfg, False)
    of_hydra = cfg.pop("hydra")
    choices = {
        group: choice for group, choice in of_hydra.runtime.choices.items() if not group.startswith("hydra/")
    }
    if choices.get("tune") == "auto" and isinstance(cfg.get("task"), DictConfig):
        choices["tune"] = _default_tune(cfg)
        cfg["tune"] = OmegaConf.merge(
            said_by("tune", choices["tune"], config_dir, bases=True), cfg.get("tune") or {}
        )
    cfg["choices"] = choices
    result = Composed(
        cfg=cfg,
        hydra=of_hydra,
        choices=choices,
        given=given,
        trusted=frozenset(_packages(given) | (packages_named(config_dir) if config_dir else set())),
        config_dir=None if config_dir is None else str(Path(config_dir).expanduser().absolute()),
    )
    if checked:
        try:
            root = root_of(config_name, config_dir)
            check(
                cfg,
                root=root,
                extended_by=None if config_name == root else config_name,
                overrides=given,
                config_dir=config_dir,
            )
        except OmegaConfBaseException as error:
            raise InputError(explain(error, config_name, kept, config_dir)) from error
        OmegaConf.set_struct(cfg, True)
    return result


def plain(cfg: DictConfig, *, resolve: bool = True) -> dict[str, Any]:
    """The config as plain dictionaries and lists, with interpolations filled in if `resolve`.

    Raises InputError for an interpolation of what is not there.
    """
    try:
        found = OmegaConf.to_container(cfg, resolve=resolve)
    except OmegaConfBaseException as error:
        raise InputError(f"{' '.join(str(error).split())}: give a value without ${{...}}") from error
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def to_yaml(settings: Mapping[str, Any] | DictConfig, *, resolve: bool = False) -> str:
    """The settings as YAML."""
    node = settings if isinstance(settings, DictConfig) else OmegaConf.create(dict(settings))
    return OmegaConf.to_yaml(node, resolve=resolve)


def from_plain(settings: Mapping[str, Any]) -> DictConfig:
    """Settings as a config, whose keys are all there are."""
    cfg = OmegaConf.create(dict(settings))
    OmegaConf.set_struct(cfg, True)
    return cfg


def load_yaml(path: Path) -> Any:
    """What a YAML file holds, plain, `${...}` in it left alone. Raises ValueError, OSError, YAMLError."""
    return OmegaConf.to_container(OmegaConf.load(path), resolve=False)


def said_by(
    group: str, choice: str, config_dir: Folder | None = None, *, bases: bool = False
) -> dict[str, Any]:
    """What the YAML of a choice says of its own group; with `bases`, also what it shares with others."""
    file = config_file(f"{group}/{choice}", config_dir)
    content = load_yaml(file) if file else {}
    if not isinstance(content, dict):
        return {}
    shared = [entry for entry in content.pop("defaults", []) if isinstance(entry, str) and entry != "_self_"]
    found: dict[str, Any] = {}
    for base in shared if bases else ():
        found |= said_by(group, base, config_dir, bases=True)
    return found | (content.get(group, {}) if file and is_global(file) else content)


def is_missing(cfg: DictConfig, key: str) -> bool:
    """Whether a setting is `???`: the user must give it."""
    return OmegaConf.is_missing(cfg, key)


def root_of(config_name: str, config_dir: Folder | None) -> str:
    """The command's root config that a root is, or extends."""
    from gptpl.config.roots import ROOTS

    if config_name in ROOTS or config_dir is None:
        return config_name
    file = Path(config_dir) / f"{config_name}.yaml"
    content = load_yaml(file) if file.is_file() else {}
    entries = content.get("defaults", []) if isinstance(content, dict) else []
    return next((entry for entry in entries if isinstance(entry, str) and entry in ROOTS), "train")


def _default_tune(cfg: DictConfig) -> str:
    """The choice of conf/tune that the task makes where nobody made one."""
    target = cfg.task.get("_target_")
    task: Any = None if target is None else locate(str(target), "task._target_")
    init = cfg.get("init")
    pretrained = isinstance(init, DictConfig) and not str(init.get("_target_")).endswith(".RandomWeights")
    return str(task.default_tune(pretrained=pretrained)) if hasattr(task, "default_tune") else "all"


def _searchpath(overrides: Sequence[str]) -> list[str]:
    """The folders of `hydra.searchpath=[...]`."""
    found: list[str] = []
    for text in overrides:
        if text.lstrip("+").startswith("hydra.searchpath="):
            value = parsed(text).value()
            found += [str(each) for each in (value if isinstance(value, list) else [value])]
    return [each if "://" in each else str(Path(each).expanduser().absolute()) for each in found]


def _quoted(path: str | Path) -> str:
    return "'" + (str(path) if "://" in str(path) else f"file://{path}").replace("'", r"\'") + "'"


def _packages(overrides: Sequence[Override]) -> set[str]:
    """The packages of the classes that overrides name."""

    def named(value: Any, key: str) -> set[str]:
        if isinstance(value, Mapping):
            return {name for inner, each in value.items() for name in named(each, str(inner))}
        if isinstance(value, list):
            return {name for each in value for name in named(each, "")}
        of_class = isinstance(value, str) and key.rpartition(".")[2] == "_target_"
        return {value.partition(".")[0]} if of_class else set()

    return {name for override in overrides for name in named(override.value(), override.key_or_group)}


def show_info(what: str, config_name: str, overrides: Sequence[str], config_dir: Folder | None) -> None:
    """Prints what Hydra knows of a command's configs (`--info`), or a script for the shell's completion."""
    import sys

    flags = ["--config-dir", str(config_dir)] if config_dir else []
    kind = ["--shell-completion", what.partition("=")[2]] if what.startswith("sc=") else ["--info", what]
    main = hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=config_name)
    given, sys.argv = sys.argv, ["gptpl", *flags, *kind, *overrides]
    try:
        main(lambda cfg: None)()
    finally:
        sys.argv = given
