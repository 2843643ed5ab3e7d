"""Inputs of the commands that use a model: the model, and a text that is set, in a file, or piped in."""

import logging
import os
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptpl.cli.arguments import Arguments
from gptpl.config.compose import plain
from gptpl.config.groups import said_by
from gptpl.config.instantiate import instantiate
from gptpl.config.overrides import quoted, without_interpolation
from gptpl.config.signatures import OWN_PACKAGES
from gptpl.errors import InputError
from gptpl.filters import Filter
from gptpl.runs.listing import find_run

log = logging.getLogger(__name__)

NOT_SET = "???"
SHORT_KEYS = frozenset(said_by("sampling", "greedy"))
"""Sampling rules, which may be given without `sampling.`."""


def settings_of(given: Arguments) -> dict[str, Any]:
    """The settings of a command as plain data; a required one that is not set is "???"."""
    settings = plain(given.config)
    return {**settings, "trust": sorted({*settings.get("trust", ()), *(given.trusted - OWN_PACKAGES)})}


def in_full(argument: str) -> str:
    """`temperature=1` means `sampling.temperature=1`, and `stop=END` a list with one string."""
    key, _, value = argument.partition("=")
    if key == "stop" and value and not value.startswith("["):
        return f"stop=[{quoted(without_interpolation(value))}]"
    return f"sampling.{argument}" if key in SHORT_KEYS else argument


def only_one(settings: Mapping[str, Any]) -> str | None:
    """The name of the only setting that is not None, if there is one; raises InputError if there are more."""
    given = [name for name, value in settings.items() if value is not None]
    if len(given) > 1:
        raise InputError(f"{'= and '.join(given[:2])}= are both set: give one of them")
    return given[0] if given else None


def given_model(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The model of `checkpoint=` or `init=`, as arguments of `gptpl.load`.

    For an adapter, `init=` names its base, if that has moved.
    """
    from gptpl.weights.adapter import is_adapter

    checkpoint, init = cfg["checkpoint"], cfg.get("init")
    weights = None if init is None else instantiate(init)
    base, source = None, weights
    if checkpoint not in (None, NOT_SET):
        base, source = weights, find_run(checkpoint, key="checkpoint")
        if not is_adapter(source):
            only_one({"checkpoint": checkpoint, "init": weights})
    if source is None:
        raise InputError(
            "checkpoint is not set: give checkpoint=RUN_FOLDER, checkpoint=FILE.ckpt, or init=gpt2_hf"
        )
    return {"source": source, "base": base, "device": cfg.get("device", "cpu"), "trust": cfg["trust"]}


def given_filter(cfg: Mapping[str, Any]) -> Filter | None:
    """The filter of `filter=`; None for filter=none."""
    made = None if cfg.get("filter") is None else instantiate(cfg["filter"])
    return made if made is not None and made.rules else None


def given_text(text: str | None, file: str | None = None, *, key: str, piped: bool = True) -> str | None:
    """The text set as `key`, or in the file set as `<key>_file` ("-" is standard input), or else piped in.

    A line break at the end of a file or of standard input, as `echo` and editors add it, is removed.
    """
    only_one({key: text, f"{key}_file": file})
    if text is not None:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # Python's substitutes for bytes of another encoding
            raise InputError(f"{key}={text!r} is not UTF-8: give it in UTF-8, or in a file") from error
        return text
    if file is not None and file != "-":
        try:
            data = Path(file).expanduser().read_bytes()
        except OSError as error:
            raise InputError(
                f"{key}_file={file} cannot be read ({error.strerror}): give a text file"
            ) from error
        return _decoded(data, f"{key}_file={file}")
    if file is None:
        try:
            mode = os.fstat(sys.stdin.fileno()).st_mode
        except (OSError, ValueError, AttributeError):  # closed, or not a file
            return None
        if not piped or not (stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)):
            return None
        log.info("%s: from standard input", key)
    return _decoded(sys.stdin.buffer.read(), "standard input")


def _decoded(data: bytes, name: str) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name} is not UTF-8 (byte {error.start} is 0x{data[error.start]:02x}): save it as UTF-8"
        ) from error
    return text.removesuffix("\n").removesuffix("\r")
