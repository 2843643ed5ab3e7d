"""Runs a command's task under Hydra, and makes objects of configs."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from gptpl.cli.configs import config_folder
from gptpl.cli.explain import explain
from gptpl.cli.quoting import flags_first, is_sweep, readable_by_hydra
from gptpl.cli.schema import register_schemas
from gptpl.errors import InputError


def run_under_hydra(
    command: str,
    arguments: list[str],
    task: Callable[[DictConfig], None],
    *,
    expected: tuple[type[Exception], ...] = (),
) -> None:
    """Composes conf/<command>.yaml with the overrides and calls the task, once or for each trial of a sweep.

    In the task `sys.argv` is as Lightning's process launcher needs it. Raises InputError for whatever Hydra
    or OmegaConf finds wrong with the overrides or the configs; the task's own errors, and the `expected`
    ones, end a sweep and are raised without a word of Hydra's.
    """
    register_schemas()
    given_argv, given_full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    if is_sweep(arguments):
        raise InputError(f"-m sweeps over settings of gptpl train: run gptpl {command} once for each value")
    for_hydra = [readable_by_hydra(argument) for argument in flags_first(arguments)]
    main = hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=command)
    ending: tuple[type[Exception], ...] = (
        InputError,
        HydraException,
        OmegaConfBaseException,
        OSError,
        *expected,
    )
    began = False
    failures: list[Exception] = []

    def as_given(cfg: DictConfig) -> None:
        nonlocal began
        began = True
        if failures:
            return
        try:
            with _argv(given_argv), _full_error(given_full_error):
                task(cfg)
        except ending as error:
            failures.append(error)  # raised below: Hydra would print a line of its own before passing it on

    try:
        # HYDRA_FULL_ERROR=1: Hydra raises instead of printing and leaving.
        with _argv([f"gptpl {command}", *for_hydra]), _full_error("1"):
            main(as_given)()
        if failures:
            raise failures[0]
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise InputError(explain(error, command, for_hydra)) from error
    except ValueError as error:
        if began:
            raise
        raise InputError(explain(error, command, for_hydra)) from error
    finally:
        GlobalHydra.instance().clear()


@contextmanager
def _argv(argv: list[str]) -> Iterator[None]:
    before, sys.argv = sys.argv, argv
    try:
        yield
    finally:
        sys.argv = before


@contextmanager
def _full_error(value: str | None) -> Iterator[None]:
    before = os.environ.pop("HYDRA_FULL_ERROR", None)
    if value is not None:
        os.environ["HYDRA_FULL_ERROR"] = value
    try:
        yield
    finally:
        os.environ.pop("HYDRA_FULL_ERROR", None)
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before


def instantiate(node: Any, **runtime: Any) -> Any:
    """The one place where a `_target_` becomes an object, of plain lists and dictionaries.

    What the object's own checks say is passed on.
    """
    try:
        return hydra.utils.instantiate(node, _convert_="all", **runtime)
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, InputError):
                raise cause from error
            cause = cause.__cause__
        raise
