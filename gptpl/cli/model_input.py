"""What the commands that use a model read: a checkpoint, and a text set, in a file, or piped in."""

import logging
import os
import stat
import sys
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from gptpl.cli.run_folder import checkpoint_file
from gptpl.cli.trainer import device_type
from gptpl.errors import InputError
from gptpl.training.checkpoint import LoadedCheckpoint, load_model

log = logging.getLogger(__name__)

STANDARD_INPUT = "-"
PRECISIONS = {"32-true": torch.float32, "bf16-true": torch.bfloat16}


def loaded_checkpoint(cfg: DictConfig) -> LoadedCheckpoint:
    """The model named by `checkpoint=`, on the device of `device=`, in the `precision=` if that is set."""
    if OmegaConf.is_missing(cfg, "checkpoint"):
        raise InputError("checkpoint is not set: give checkpoint=RUN_FOLDER or checkpoint=FILE.ckpt")
    precision = cfg.get("precision", "32-true")
    if precision not in PRECISIONS:
        raise InputError(f"precision={precision} is unknown: choose one of {', '.join(PRECISIONS)}")
    loaded = load_model(checkpoint_file(cfg.checkpoint), device=device_type(cfg.device, key="device"))
    loaded.net.to(PRECISIONS[precision])
    log.info("checkpoint: %s, step %d", loaded.path, loaded.step)
    return loaded


def given_text(text: str | None, file: str | None, *, key: str) -> str | None:
    """The text set as `key`, or in the file set as `<key>_file` ("-" is standard input); None if neither is.

    One line break at the end of a file or of standard input is taken away: `echo` and editors add it.

    Raises InputError for both at once, a file that cannot be read, and what is not UTF-8.
    """
    if text is not None and file is not None:
        raise InputError(f"{key}= and {key}_file={file} are both set: give one of them")
    if text is not None:
        return _checked_utf8(text, key)
    if file == STANDARD_INPUT:
        return _decoded(sys.stdin.buffer.read(), "standard input")
    if file is None:
        return None
    try:
        data = Path(file).expanduser().read_bytes()
    except OSError as error:
        raise InputError(f"{key}_file={file} cannot be read ({error.strerror}): give a text file") from error
    return _decoded(data, f"{key}_file={file}")


def piped_text(key: str) -> str | None:
    """The text of a pipe or file that standard input is; None at a terminal and where there is no input."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):  # closed, or replaced by what is no file
        return None
    if not (stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)):
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


def _checked_utf8(text: str, key: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # what Python makes of bytes that are none
        raise InputError(f"{key}={text!r} is not UTF-8: give it in UTF-8, or in {key}_file=FILE") from error
    return text
