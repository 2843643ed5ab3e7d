"""What `data.batch_size`, `data.global_batch_size` and accumulation come to."""

import logging
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig

from gptpl.cli.hydra_app import instantiate
from gptpl.cli.trainer import choose, device_type
from gptpl.cli.tuned import preparation
from gptpl.data.training_data import TrainingData
from gptpl.errors import InputError
from gptpl.model import GPTConfig
from gptpl.training.batch_size import accumulation, free_memory, largest_batch_size
from gptpl.training.fast_path import FastPath
from gptpl.training.precision import product_dtype
from gptpl.training.step_memory import optimizer_state_bytes

log = logging.getLogger(__name__)

AUTO = "auto"


def whole_batch_size(value: Any) -> int:
    """A number of windows; raises InputError for what is none."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"data.batch_size={value} is no number of windows: give a whole number, or auto")
    return value


def settle_batch(
    cfg: DictConfig, trainer: L.Trainer, datamodule: TrainingData, config: GPTConfig, path: FastPath
) -> None:
    """Puts the numbers that follow from `data.global_batch_size` into config, trainer and datamodule.

    Raises InputError where they contradict each other, and for `auto` where nothing fits into memory.
    """
    windows = cfg.data.global_batch_size
    if windows is None:
        if cfg.data.batch_size == AUTO:
            raise InputError(
                "data.batch_size=auto needs data.global_batch_size=N, the windows of an optimizer step"
            )
        return
    if cfg.data.batch_size == AUTO:
        cfg.data.batch_size = _largest(cfg, trainer, config, path)
    datamodule.batch_size = cfg.data.batch_size
    times = accumulation(global_batch=windows, batch_size=cfg.data.batch_size, world_size=trainer.world_size)
    given = cfg.trainer.accumulate_grad_batches
    if given not in (1, times):
        raise InputError(
            f"data.global_batch_size={windows} and data.batch_size={cfg.data.batch_size} make"
            f" trainer.accumulate_grad_batches={times}, not {given}: leave it out"
        )
    cfg.trainer.accumulate_grad_batches = trainer.accumulate_grad_batches = times
    log.info(
        "batch: %d windows a step: %d at a time, on %d x %s, %d times",
        windows, cfg.data.batch_size, trainer.world_size, device_type(cfg.trainer.accelerator), times,
    )  # fmt: skip


def _largest(cfg: DictConfig, trainer: L.Trainer, config: GPTConfig, path: FastPath) -> int:
    windows, devices = cfg.data.global_batch_size, trainer.world_size
    if windows < 1 or windows % devices:
        raise InputError(
            f"data.global_batch_size={windows} is no multiple of {devices} devices: give one that is"
        )
    kind = device_type(cfg.trainer.accelerator)
    prepare = preparation(cfg)
    here = 1 if kind == "cuda" else trainer.num_devices  # processes that share the machine's memory
    return largest_batch_size(
        config,
        path,
        max_length=cfg.data.max_length,
        windows=windows // devices,
        low=product_dtype(choose(cfg.trainer).precision) == torch.bfloat16,
        free=free_memory(kind) // here,
        optimizer_bytes=optimizer_state_bytes(config, instantiate(cfg.optimizer), prepare=prepare),
        prepare=prepare,
        accumulates=True,  # unless it takes them all at once, which then fits all the more
    )
