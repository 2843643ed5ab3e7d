"""From the `trainer` settings to a `lightning.Trainer`: what `auto` means, and what this machine has."""

import logging
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, Strategy

from gptpl.callbacks.checkpoints import LastCheckpoint
from gptpl.callbacks.exact_resume import ExactResume
from gptpl.callbacks.stopping import StopAtBoundary
from gptpl.cli.schema import TrainerConf
from gptpl.errors import InputError
from gptpl.training.checkpoint_io import DurableCheckpointIO
from gptpl.training.precision import PrecisionChoice, choose_precision
from gptpl.training.sharding import FullyShardedStrategy

log = logging.getLogger(__name__)

ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")


def device_type(accelerator: str, *, key: str = "trainer.accelerator") -> str:
    """One of "cuda", "mps" and "cpu"; raises InputError, naming `key`, if the one asked for is not there."""
    if accelerator not in ACCELERATORS:
        raise InputError(f"{key}={accelerator} is unknown: choose one of {', '.join(ACCELERATORS)}")
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    instead = f"use {key}=cpu or {key}=auto"
    if accelerator in ("gpu", "cuda") and not cuda and not (accelerator == "gpu" and mps):
        raise InputError(
            f"{key}={accelerator}, but torch {torch.__version__} finds no CUDA device: {instead}"
        )
    if accelerator == "mps" and not mps:
        raise InputError(f"{key}=mps, but there is no Apple GPU here: {instead}")
    if accelerator == "cpu":
        return "cpu"
    if cuda and accelerator != "mps":
        return "cuda"
    return "mps" if mps else "cpu"


def check_seed(seed: int) -> None:
    """Raises InputError for a seed that not every random number generator takes."""
    if not 0 <= seed < 2**32:
        raise InputError(f"seed={seed} is no seed: give a number from 0 to {2**32 - 1}")


def choose(conf: TrainerConf) -> PrecisionChoice:
    """The precision asked for, or the best one of the device."""
    if conf.precision == "auto":
        return choose_precision(device_type(conf.accelerator))
    return PrecisionChoice(str(conf.precision), "as asked")


def build_trainer(
    conf: TrainerConf,
    *,
    precision: str,
    eval_every_n_steps: int,
    deterministic: bool,
    callbacks: Sequence[L.Callback],
    **fixed: Any,
) -> L.Trainer:
    """A Trainer that evaluates every so many optimizer steps, before the first, and after the last.

    To the callbacks given it adds what every run has: exact resuming, and stopping at a boundary. `fixed` are
    further arguments of `lightning.Trainer`: loggers, folders. Raises InputError for numbers out of range,
    and for a device, strategy or precision that Lightning refuses.
    """
    _check(conf, eval_every_n_steps)
    stopping = StopAtBoundary(max_time=conf.max_time, stop_at_step=conf.stop_at_step)
    # After a step: note its state, save it, stop if asked to, and only then whatever else there is.
    saving = [callback for callback in callbacks if isinstance(callback, LastCheckpoint)]
    others = [callback for callback in callbacks if not isinstance(callback, LastCheckpoint)]
    try:
        trainer = L.Trainer(
            accelerator=device_type(conf.accelerator),
            devices=conf.devices,
            num_nodes=conf.num_nodes,
            strategy=build_strategy(conf.strategy),
            precision=precision,  # type: ignore[arg-type]
            max_epochs=conf.max_epochs if conf.max_epochs is not None else -1,
            max_steps=conf.max_steps if conf.max_steps is not None else -1,
            accumulate_grad_batches=conf.accumulate_grad_batches,
            gradient_clip_val=conf.gradient_clip_val,
            log_every_n_steps=conf.log_every_n_steps,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=-1,  # the evaluation before the first step, with all batches
            deterministic=deterministic,
            use_distributed_sampler=False,  # the datamodule shards by itself
            enable_model_summary=False,
            callbacks=[ExactResume(), *saving, stopping, *others],
            plugins=[DurableCheckpointIO()],
            **fixed,
        )
    except (MisconfigurationException, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"trainer settings that Lightning refuses: {reason}") from error
    return trainer


def build_strategy(name: str) -> str | Strategy:
    """FSDP2, and DDP without a second copy of the gradients: they are views of what is sent.

    Not with `static_graph`: where batches are accumulated it ends in an error of torch's, or the gradients
    are not summed any more (pytorch issue 143580, pull request 187732).
    """
    if name == "fsdp":
        return FullyShardedStrategy()
    return DDPStrategy(gradient_as_bucket_view=True) if name == "ddp" else name


def _check(conf: TrainerConf, eval_every_n_steps: int) -> None:
    for name, value in (
        ("trainer.max_epochs", conf.max_epochs),
        ("trainer.max_steps", conf.max_steps),
        ("trainer.accumulate_grad_batches", conf.accumulate_grad_batches),
        ("trainer.log_every_n_steps", conf.log_every_n_steps),
        ("trainer.num_nodes", conf.num_nodes),
        ("trainer.gradient_clip_val", conf.gradient_clip_val),
        ("eval_every_n_steps", eval_every_n_steps),
    ):
        if value is not None and value <= 0:
            raise InputError(f"{name}={value} is not positive: give a positive number")
    if conf.max_epochs is None and conf.max_steps is None:
        raise InputError(
            "trainer.max_epochs and trainer.max_steps are both null: give one, the schedule needs an end"
        )


def planned_steps(conf: TrainerConf, steps_per_epoch: int) -> int:
    """Optimizer steps until the first of `max_epochs` and `max_steps`."""
    limits = [] if conf.max_steps is None else [conf.max_steps]
    if conf.max_epochs is not None:
        limits.append(conf.max_epochs * steps_per_epoch)
    return min(limits)


def let_module_end(trainer: L.Trainer) -> None:
    """Leaves it to the training module to end the training after its `total_steps`.

    Lightning counts an epoch that `max_steps` broke off as a whole one: resumed with more steps, a run would
    reach `max_epochs` before it has made them. And it would not even start where all steps are done, but not
    yet the evaluation of the last.
    """
    trainer.fit_loop.max_epochs = -1
    trainer.fit_loop.epoch_loop.max_steps = -1
