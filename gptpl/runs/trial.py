"""What a run's training step takes of memory, and a few real steps that leave nothing behind."""

import tempfile
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch

from gptpl.callbacks.stopping import RunStopped, interrupts
from gptpl.errors import InputError
from gptpl.runs.build import Settled
from gptpl.runs.parts import build_trainer, choose, let_module_end, optimizer_factory, preparation
from gptpl.training.memory import (
    USABLE,
    StepMemory,
    free_memory,
    largest_batch_size,
    optimizer_state_bytes,
    step_memory,
)
from gptpl.training.module import TrainingModule
from gptpl.training.performance import device_type, product_dtype


def step_memory_of(settled: Settled, batch_size: int | None = None) -> StepMemory:
    """Of the run's training step, with its own batch or another one (which then is a whole step)."""
    own = batch_size is None
    return step_memory(
        settled.config,
        settled.fast_path,
        batch_size=settled.datamodule.batch_size if batch_size is None else batch_size,
        accumulates=own and settled.cfg.trainer.accumulate_grad_batches > 1,
        **_known(settled),
    )


def _known(settled: Settled) -> dict[str, Any]:
    precision, prepare = choose(settled.cfg.trainer).precision, preparation(settled.cfg)
    size = 2 if precision in ("bf16-true", "16-true") else 4
    make_optimizer = optimizer_factory(settled.cfg)
    return {
        "max_length": settled.datamodule.max_length,
        "low": product_dtype(precision) == torch.bfloat16,
        "optimizer_bytes": optimizer_state_bytes(
            settled.config, make_optimizer, weight_bytes=size, prepare=prepare
        ),
        "weight_bytes": size,
        "prepare": prepare,
    }


def largest_batch_of(settled: Settled, windows: int) -> int | None:
    """The largest power of two of up to so many windows that fits; 0: none; None: not known."""
    usable = usable_memory(settled)
    if usable is None:
        return None
    try:
        return largest_batch_size(
            settled.config,
            settled.fast_path,
            windows=2 ** (windows.bit_length() - 1),
            free=round(usable / USABLE),
            **_known(settled),
        )
    except InputError:  # not even one window
        return 0


def check_fits(settled: Settled) -> None:
    """Raises InputError where the run's training step needs more memory than is free."""
    needed, usable = step_memory_of(settled).peak, usable_memory(settled)
    if usable is not None and needed > usable:
        raise InputError(
            f"data.batch_size={settled.datamodule.batch_size}: a step needs about {needed / 1e9:.1f} GB and"
            f" may take {usable / 1e9:.1f} GB of what is free: lower data.batch_size, or give"
            " trainer.recompute_activations=true"
        )


def usable_memory(settled: Settled) -> int | None:
    """Bytes of the device that a training step may take; None where the device does not tell."""
    kind = device_type(settled.cfg.trainer.accelerator)
    return None if kind == "mps" else int(USABLE * free_memory(kind))


# --- a few steps ----------------------------------------------------------------------------------------


def train_a_little(
    settled: Settled,
    module: TrainingModule,
    *,
    steps: int,
    callbacks: Sequence[L.Callback],
    evaluates: bool = False,
) -> None:
    """Trains the module for so many optimizer steps, on one device, by the run's own settings.

    No loggers, checkpoints or samples; `evaluates`: with the evaluation before the first step. Raises
    KeyboardInterrupt where it is stopped from outside, and what the callbacks raise.
    """
    conf = settled.cfg.trainer.copy()
    conf.max_time, conf.stop_at_step = None, steps
    module.total_steps = max(module.total_steps, steps + 1)  # it would evaluate at the end
    with tempfile.TemporaryDirectory(prefix="gptpl-trial-") as folder:
        trainer = build_trainer(
            conf,
            eval_every_n_steps=settled.cfg.eval_every_n_steps,
            deterministic=settled.cfg.deterministic,
            callbacks=callbacks,
            logger=False,
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_progress_bar=False,
            **({} if evaluates else {"limit_val_batches": 0}),
        )
        let_module_end(trainer)
        try:
            with interrupts():
                trainer.fit(module, datamodule=settled.datamodule)
        except RunStopped as stop:
            if stop.status:  # a signal
                raise KeyboardInterrupt from None


def check_one_device(settled: Settled, command: str) -> None:
    """Raises InputError for a run of several processes."""
    if settled.trainer.world_size > 1:
        raise InputError(
            f"gptpl {command} measures one device, this run has {settled.trainer.world_size}:"
            " add trainer.devices=1 trainer.num_nodes=1"
        )
