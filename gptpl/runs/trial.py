"""Memory of a run's training step, and a few real steps that leave nothing behind."""

import tempfile
from collections.abc import Sequence

import lightning as L

from gptpl.callbacks.stopping import RunStopped, interrupts
from gptpl.errors import InputError
from gptpl.runs.build import Settled
from gptpl.runs.parts import memory_settings
from gptpl.runs.trainer import build_trainer
from gptpl.training.lightning_internals import let_module_end
from gptpl.training.memory import USABLE, StepMemory, free_memory, largest_batch_size, step_memory
from gptpl.training.module import TrainingModule
from gptpl.training.performance import device_type


def step_memory_of(settled: Settled, batch_size: int | None = None) -> StepMemory:
    """Memory of a training step with the run's own batch, or with another one that is a whole step."""
    own = batch_size is None
    return step_memory(
        settled.config,
        settled.fast_path,
        batch_size=settled.datamodule.batch_size if batch_size is None else batch_size,
        accumulates=own and settled.cfg.trainer.accumulate_grad_batches > 1,
        **memory_settings(settled.cfg, settled.datamodule, settled.fast_path.precision.precision),
    )


def largest_batch_of(settled: Settled, most: int) -> int | None:
    """The largest power of two of up to `most` sequences that fits; 0 if none does; None: not known."""
    usable = usable_memory(settled)
    if usable is None:
        return None
    try:
        return largest_batch_size(
            settled.config,
            settled.fast_path,
            sequences=2 ** (most.bit_length() - 1),
            free=round(usable / USABLE),
            **memory_settings(settled.cfg, settled.datamodule, settled.fast_path.precision.precision),
        )
    except InputError:  # not even one sequence fits
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


def check_one_device(settled: Settled, command: str) -> None:
    """Raises InputError for a run of several processes."""
    if settled.trainer.world_size > 1:
        raise InputError(
            f"gptpl {command} measures one device, this run has {settled.trainer.world_size}:"
            " add trainer.devices=1 trainer.num_nodes=1"
        )


def train_a_little(
    settled: Settled,
    module: TrainingModule,
    *,
    steps: int,
    callbacks: Sequence[L.Callback],
    evaluates: bool = False,
) -> None:
    """Train the module for a few optimizer steps on one device, with the run's settings.

    No loggers, checkpoints or samples; if `evaluates`, with the evaluation before the first step. Raises
    KeyboardInterrupt for a signal, and what the callbacks raise.
    """
    conf = settled.cfg.trainer.copy()
    conf.max_time, conf.stop_at_step = None, steps
    module.total_steps = max(module.total_steps, steps + 1)  # after the last one it would evaluate
    with tempfile.TemporaryDirectory(prefix="gptpl-trial-") as folder:
        trainer = build_trainer(
            conf,
            precision=settled.fast_path.precision.precision,
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
