"""A hook that Lightning lacks: a step is done and logged, and nothing else has begun."""

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn


class AfterStep(L.Callback):
    """Calls `after_step` once for each optimizer step, when its numbers are in the loggers.

    That is before the evaluation and the samples that may follow it, before the end of the epoch and before
    the next batch, whichever comes first. Lightning's `on_train_batch_end` comes too early (the step is not
    logged yet, and after every micro-batch), and its next hook depends on what comes next.

    Where training starts, `after_step` has been called for the step that a resumed run starts from, in the
    run before; a class with `repeats_on_resume` gets the call again.
    """

    repeats_on_resume = False
    _reached: int | None = None

    def after_step(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What is to be done; `trainer.global_step` is the number of the step."""
        raise NotImplementedError

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes the step that training starts from."""
        self._reached = 0 if self.repeats_on_resume else trainer.global_step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """The next batch comes."""
        self._call(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """An evaluation comes."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._call(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The epoch is over."""
        self._call(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Training is over."""
        self._call(trainer, pl_module)

    def _call(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._reached is not None and trainer.global_step != self._reached:
            self._reached = trainer.global_step
            self.after_step(trainer, pl_module)
