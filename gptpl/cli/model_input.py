"""What the commands that use a model read: a checkpoint, and a text set, in a file, or piped in."""

import logging
import os
import stat
import sys
from pathlib import Path
from typing import cast

import torch
from omegaconf import DictConfig, OmegaConf

from gptpl.cli.hydra_app import instantiate
from gptpl.cli.trainer import device_type
from gptpl.data.tokenizers import Tokenizer
from gptpl.errors import InputError
from gptpl.model import GPTConfig
from gptpl.training.adapter import adapter_checkpoint
from gptpl.training.checkpoint import LoadedCheckpoint, load_model, model_of
from gptpl.training.checkpoint_files import checkpoint_file
from gptpl.training.foreign_checkpoint import load_foreign, load_published
from gptpl.training.starting_run import RunWeights
from gptpl.weights.adapter import is_adapter
from gptpl.weights.formats import is_foreign, open_model
from gptpl.weights.starting import FileWeights, PublishedWeights, RandomWeights, StartingWeights

log = logging.getLogger(__name__)

STANDARD_INPUT = "-"
PRECISIONS = {"32-true": torch.float32, "bf16-true": torch.bfloat16}


def loaded_checkpoint(
    cfg: DictConfig, *, config: GPTConfig | None = None, tokenizer: Tokenizer | None = None
) -> LoadedCheckpoint:
    """The model of `checkpoint=` or `init=`, on the device of `device=`, in the `precision=` if that is set.

    An adapter is added to its base, which `init=` names where it is no longer where it was.

    `config` and `tokenizer` are for files of other programs that say neither.
    """
    given = not OmegaConf.is_missing(cfg, "checkpoint")
    path = Path(cfg.checkpoint).expanduser() if given else None
    adapted = path is not None and is_adapter(path)
    if given and cfg.init is not None and not adapted:
        raise InputError(f"checkpoint={cfg.checkpoint} and init= are both set: give one of them")
    if not given and cfg.init is None:
        raise InputError(
            "checkpoint is not set: give checkpoint=RUN_FOLDER, checkpoint=FILE.ckpt, or init=gpt2_hf"
        )
    precision = cfg.get("precision", "32-true")
    if precision not in PRECISIONS:
        raise InputError(f"precision={precision} is unknown: choose one of {', '.join(PRECISIONS)}")
    device, dtype = device_type(cfg.get("device", "cpu"), key="device"), PRECISIONS[precision]
    weights = None if cfg.init is None else _whole(instantiate(cfg.init), of_base=adapted)
    if isinstance(weights, RunWeights) and not adapted:
        path = weights.file
    if isinstance(weights, PublishedWeights) and not adapted:
        loaded = load_published(weights, device=device, dtype=dtype)
    elif (isinstance(weights, FileWeights) and not adapted) or (path is not None and is_foreign(path)):
        files = weights.open() if isinstance(weights, FileWeights) else open_model(cast(Path, path))
        loaded = load_foreign(files, config=config, tokenizer=tokenizer, device=device, dtype=dtype)
    else:
        if config is not None or tokenizer is not None:
            raise InputError(
                f"checkpoint={path} says itself which model it is: leave model= and tokenizer= out"
            )
        loaded = _own(cast(Path, path), weights, device)
        loaded.net.to(dtype)
    log.info("checkpoint: %s, step %d", loaded.path, loaded.step)
    return loaded


def _own(path: Path, base: StartingWeights | None, device: str) -> LoadedCheckpoint:
    """What gptpl wrote: a checkpoint, or an adapter, to be added to its base."""
    if is_adapter(path):
        return model_of(adapter_checkpoint(path, base=base), path, device=device)
    return load_model(checkpoint_file(str(path)), device=device)


def _whole(weights: StartingWeights, *, of_base: bool) -> StartingWeights:
    """The weights themselves. Raises InputError where they mean nothing without a model to be trained.

    An adapter's base is a model as it was trained, with what it left out.
    """
    if isinstance(weights, RandomWeights):
        raise InputError("init=random has nothing to say yet: give checkpoint=RUN_FOLDER or init=gpt2_hf")
    for option in ("crop_context", "crop_vocabulary"):
        if getattr(weights, option, False) and not of_base:
            raise InputError(
                f"init.{option}=true is for training: the weights are used whole here, leave it out"
            )
    return weights


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
