"""From overrides to a checked config: Hydra's composition, without its command line and its global state."""

import sys
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

from gptpl.config.check import AUTO, check
from gptpl.config.groups import Folder, config_folder, folders, is_group, packages_named, said_by, walk
from gptpl.config.overrides import explain, parsed, quoted, readable
from gptpl.config.signatures import locate
from gptpl.errors import InputError

__all__ = ["Glob", "IntervalSweep", "Override"]  # of Hydra's grammar, for the rooms without Hydra

_ERRORS = (HydraException, OmegaConfBaseException, YAMLError, ValueError, TypeError, AttributeError)
"""What Hydra raises for a wrong config."""
_SEARCHPATH = "hydra.searchpath="
Config = DictConfig
"""A composed config: `cfg.optimizer.lr`, `cfg["data"]`."""


@dataclass(frozen=True, kw_only=True)
class Composed:
    """A config and what it was composed from.

    Attributes:
        cfg: with interpolations, without `hydra`.
        hydra: Hydra's own settings.
        given: the overrides.
        trusted: packages of which the overrides or the user's folder name classes.
        config_dir: the user's folder, absolute.
    """

    cfg: DictConfig
    hydra: DictConfig
    given: Sequence[Override]
    trusted: frozenset[str]
    config_dir: Folder | None


def compose(*overrides: str, config_name: str = "train", config_dir: Folder | None = None) -> DictConfig:
    """The config of a command: `compose("experiment=quick", "optimizer.lr=1e-3")`.

    `config_name` is a command's root config, or one that extends it in `config_dir`, the user's own folder of
    YAML files. Every node with a `_target_` is checked against the signature of its class. Raises InputError
    for whatever is wrong with an override or a YAML, naming the nearest right one.
    """
    return composed(overrides, config_name, config_dir=config_dir).cfg


def as_config(
    config: Sequence[DictConfig | str], config_dir: Folder | None = None, *, config_name: str = "train"
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
    """See `compose`; without `checked`, for settings that those of a run will complete.

    `before` are overrides of gptpl's own, which come first and count as given by nobody.
    """
    more = [folder for text in overrides for folder in _searchpath(text)]
    overrides = [
        text.replace("hydra.run.dir", "run_dir", 1)
        for text in overrides
        if not text.lstrip("+").startswith(_SEARCHPATH)
    ]
    for text in overrides:
        if text.lstrip("+~").startswith("hydra") and config_name != "sweep":
            raise InputError(f"{text} has no effect, gptpl makes folders and logs itself: leave it out")
    is_choice = partial(is_group, config_dir=config_dir, more=more)
    for_hydra = [readable(text, is_group=is_choice) for text in overrides]
    given = [parsed(text) for text in for_hydra]
    places = folders(config_dir)
    primary = next((place for place in places if (place / f"{config_name}.yaml").is_file()), None)
    if primary is None:
        raise InputError(
            f"--config-name {config_name}: no {config_name}.yaml in {' or '.join(map(str, places))}"
        )
    others = [*more, *(f"file://{place}" for place in places if place != primary)]
    where = [f"{_SEARCHPATH}[{','.join(map(quoted, others))}]"] if others else []
    try:
        with hydra.initialize_config_dir(str(primary), version_base="1.3", job_name=config_name):
            cfg = hydra.compose(config_name, [*where, *before, *for_hydra], return_hydra_config=True)
    except _ERRORS as error:
        raise InputError(explain(error, config_name, overrides, config_dir)) from error
    OmegaConf.set_struct(cfg, False)
    of_hydra = cfg.pop("hydra")
    cfg["choices"] = {
        group: each for group, each in of_hydra.runtime.choices.items() if not group.startswith("hydra/")
    }
    checks = partial(check, cfg, config_name, overrides=given, config_dir=config_dir)
    try:
        if checked and "torch" not in sys.modules:  # which takes seconds to import
            checks(without_imports=True)
        if cfg.choices.get("tune") == AUTO and isinstance(cfg.get("task"), DictConfig):
            cfg.choices.tune = _default_tune(cfg)
            own = said_by("tune", cfg.choices.tune, config_dir, bases=True)
            cfg["tune"] = OmegaConf.merge(own, cfg.get("tune") or {})
        if checked:
            checks()
            OmegaConf.set_struct(cfg, True)
    except OmegaConfBaseException as error:
        raise InputError(explain(error, config_name, overrides, config_dir)) from error
    return Composed(
        cfg=cfg,
        hydra=of_hydra,
        given=given,
        trusted=frozenset(_packages(given) | (packages_named(config_dir) if config_dir else set())),
        config_dir=None if config_dir is None else str(Path(config_dir).expanduser().absolute()),
    )


def _searchpath(override: str) -> list[str]:
    """The folders in an override of `hydra.searchpath`, as URLs."""
    if not override.lstrip("+").startswith(_SEARCHPATH):
        return []
    value = parsed(override).value()
    found = map(str, value if isinstance(value, list) else [value])
    return [each if "://" in each else f"file://{Path(each).expanduser().absolute()}" for each in found]


def _default_tune(cfg: DictConfig) -> str:
    """The choice of conf/tune that the task makes where nobody made one."""
    target = cfg.task.get("_target_")
    task: Any = None if target is None else locate(str(target), "task._target_")
    if not hasattr(task, "default_tune"):
        return "all"
    init, weights = cfg.get("init"), None
    if isinstance(init, DictConfig):
        weights = locate(str(init.get("_target_")), "init._target_")
    return str(task.default_tune(pretrained=getattr(weights, "pretrained", False)))


def _packages(overrides: Sequence[Override]) -> set[str]:
    """The packages of the classes that overrides name."""
    named = (each for override in overrides for each in walk(override.value(), override.key_or_group))
    targets = (value for key, value in named if key.rpartition(".")[2] == "_target_")
    return {target.partition(".")[0] for target in targets if isinstance(target, str)}


def plain(cfg: DictConfig, *, resolve: bool = True) -> dict[str, Any]:
    """The config as plain dictionaries and lists; with `resolve`, without interpolations."""
    try:
        found = OmegaConf.to_container(cfg, resolve=resolve)
    except OmegaConfBaseException as error:
        raise InputError(f"{' '.join(str(error).split())}: give a value without ${{...}}") from error
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def to_yaml(part: Any, *, resolve: bool) -> str:
    """A part of a config, or a value in it, as YAML."""
    return OmegaConf.to_yaml(part, resolve=resolve) if OmegaConf.is_config(part) else f"{part}\n"


def from_plain(settings: Mapping[str, Any]) -> DictConfig:
    """Settings as a config that takes no other keys."""
    cfg = OmegaConf.create(dict(settings))
    OmegaConf.set_struct(cfg, True)
    return cfg


def show_info(what: str, config_name: str, overrides: Sequence[str], config_dir: Folder | None) -> None:
    """Print what Hydra knows of a command's configs (`--info`)."""
    flags = ["--config-dir", str(config_dir)] if config_dir else []
    main = hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=config_name)
    given, sys.argv = sys.argv, ["gptpl", *flags, "--info", what, *overrides]
    try:
        main(lambda cfg: None)()
    finally:
        sys.argv = given
