"""A few real steps of a run that leave nothing behind."""

import tempfile
from collections.abc import Sequence

import lightning as L

from gptpl.callbacks.stopping import RunStopped
from gptpl.cli.build import Settled
from gptpl.cli.build_module import build_module
from gptpl.cli.trainer import build_trainer, choose, let_module_end
from gptpl.errors import InputError
from gptpl.training.training_module import TrainingModule
from gptpl.weights.starting import StartingWeights


def trial_module(settled: Settled, weights: StartingWeights) -> TrainingModule:
    """The run's module as `gptpl train` would make it, with these weights."""
    module = build_module(
        settled.cfg,
        settled.config,
        settled.datamodule,
        total_steps=settled.total_steps,
        world_size=settled.trainer.world_size,
        resume=None,
        weights=weights,
    )
    settled.fast_path.apply(module.net)
    module.head = settled.fast_path.head
    return module


def train_a_little(
    settled: Settled,
    module: TrainingModule,
    *,
    steps: int,
    callbacks: Sequence[L.Callback],
    evaluates: bool = False,
    accumulate: int | None = None,
) -> None:
    """Trains the module for so many optimizer steps, on one device, by the run's own settings.

    No loggers, checkpoints or samples; `evaluates`: with the evaluation before the first step. Raises
    KeyboardInterrupt where it is stopped from outside, and what the callbacks raise.
    """
    conf = settled.cfg.trainer.copy()
    conf.max_time, conf.stop_at_step = None, steps
    if accumulate is not None:
        conf.accumulate_grad_batches = accumulate
    module.total_steps = max(module.total_steps, steps + 1)  # it would evaluate at the end
    with tempfile.TemporaryDirectory(prefix="gptpl-trial-") as folder:
        trainer = build_trainer(
            conf,
            precision=choose(conf).precision,
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
            trainer.fit(module, datamodule=settled.datamodule)
        except RunStopped as stop:
            if stop.status:  # a signal
                raise KeyboardInterrupt from None
        except SystemExit:  # how Lightning leaves after Ctrl-C
            raise KeyboardInterrupt from None


def check_one_device(settled: Settled, command: str) -> None:
    """Raises InputError for a run of several processes."""
    if settled.trainer.world_size > 1:
        raise InputError(
            f"gptpl {command} measures one device, this run has {settled.trainer.world_size}:"
            " add trainer.devices=1 trainer.num_nodes=1"
        )
