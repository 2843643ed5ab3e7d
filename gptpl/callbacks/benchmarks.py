"""Benchmarks of the model while it learns."""

import logging
from pathlib import Path

import lightning as L
import torch

from gptpl.callbacks.after_step import AfterStep, language_module
from gptpl.callbacks.records import RecordFile
from gptpl.errors import InputError
from gptpl.evaluation.suite import Suite
from gptpl.evaluation.suite_report import shown
from gptpl.training.sharding import FullyShardedStrategy

log = logging.getLogger(__name__)


class Benchmarks(AfterStep):
    """Asks the model the questions of a suite every so many steps, and at the end of training.

    The primary metric of each task goes to the log, to every logger as `benchmark/<task>`, and all metrics as
    JSON Lines to `path`, with `step` and `tokens_seen`. The first process alone asks, and no bit of the
    training changes; other processes wait, so that a suite must be shorter than `trainer.timeout`. There are
    no benchmarks under strategies that shard the model.

    Raises InputError when `fit` starts for questions that cannot be read or asked, and for a classifier.
    """

    def __init__(self, *, suite: Suite, path: str | Path, every_n_steps: int = 500) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise InputError(f"every_n_steps of the benchmarks must be 1 or more, got {every_n_steps}")
        if not suite.tasks:
            raise InputError(
                "callbacks.benchmarks takes suites whose tasks gptpl reads itself, such as core: run others"
                " by gptpl evaluate"
            )
        self.suite, self.every_n_steps = suite, every_n_steps
        self._file = RecordFile(Path(path))
        self._active = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read the questions, on every process, and decide whether this one asks them."""
        module = language_module(pl_module)
        if getattr(module, "labels", None) is not None:
            raise InputError(
                "callbacks.benchmarks needs a language model: leave it out with '~callbacks.benchmarks'"
            )
        sharded = isinstance(trainer.strategy, FullyShardedStrategy)
        if sharded and trainer.is_global_zero:
            log.warning("No benchmarks: the strategy fsdp divides the model among the processes.")
        self._active = trainer.is_global_zero and not sharded
        if not sharded:
            self.suite.check(module.net, module.tokenizer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Cut the file back to the step that training starts from."""
        super().on_train_start(trainer, pl_module)
        if self._active:
            self._file.start(step=trainer.global_step)

    def due(self, trainer: L.Trainer, pl_module: L.LightningModule) -> bool:
        """After every `every_n_steps` steps, and after the last."""
        step = trainer.global_step
        return step % self.every_n_steps == 0 or step >= language_module(pl_module).total_steps

    def after_step(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ask all questions."""
        if not self._active:
            return
        module, step = language_module(pl_module), trainer.global_step
        try:
            with torch.compiler.set_stance("force_eager"):
                found = self.suite.run(module.net, module.tokenizer).tasks
        except InputError as error:  # a model that has diverged
            log.warning("no benchmarks at step %d: %s", step, error)
            return
        primary = {task: result.metrics[result.primary] for task, result in found.items()}
        for logger in trainer.loggers:
            logger.log_metrics({f"benchmark/{task}": metric.value for task, metric in primary.items()}, step)
        metrics = {
            f"{task}/{name}": metric.value
            for task, result in found.items()
            for name, metric in result.metrics.items()
        }
        self._file.append([{"step": step, "tokens_seen": module.tokens_seen, "metrics": metrics}])
        texts = (f"{task} {shown(metric.value, metric.form)}" for task, metric in primary.items())
        log.info("benchmarks at step %d: %s", step, ", ".join(texts))
