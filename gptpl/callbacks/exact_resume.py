"""Puts into every full checkpoint what an exact resume needs, and takes it out again."""

import copy
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import lightning as L

from gptpl.callbacks.after_step import AfterStep, language_module, of_every_rank
from gptpl.checkpoints.resume_state import RESUME_KEY, Position, loops_at, random_state, set_random_state
from gptpl.errors import InputError
from gptpl.training.loggers import ResumableLogger


class ExactResume(AfterStep):
    """Makes a resumed run do what an uninterrupted one would have done, bit for bit.

    A checkpoint holds the boundary after its step, before the evaluation and the samples of that step, even
    if it is written later, such as by an error in the middle of the next step. The resumed run first makes up
    for the evaluation. In addition to what Lightning saves, the boundary has:

    - the position in the epoch, where the datamodule continues in the same order;
    - the random states of torch (CPU, every GPU), NumPy and Python, of every rank;
    - how far the loggers had written: what they wrote afterwards is dropped, and logged again.

    Every run has this callback, before all others.
    """

    def __init__(self) -> None:
        super().__init__()
        self._random_state: dict[str, Any] | None = None
        self._logger_positions: dict[str, Any] = {}
        self._callback_states: dict[str, Any] | None = None
        self._to_restore: dict[str, Any] | None = None

    # --- at every boundary, without touching the disk -------------------------------------------------

    def after_step(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note what evaluation, samples and the next step are going to change."""
        self._random_state = random_state()
        self._logger_positions = {name: logger.position() for name, logger in _resumable(trainer).items()}
        self._callback_states = None

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Also note what the evaluation is going to change: the callbacks' states."""
        super().on_validation_start(trainer, pl_module)
        if not trainer.sanity_checking:
            self._callback_states = _callback_states(trainer)

    # --- into a checkpoint ----------------------------------------------------------------------------

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the state of the boundary; Lightning does not call this for checkpoints of weights alone."""
        if self._random_state is None:
            return
        for logger in _resumable(trainer).values():
            logger.sync()
        position = language_module(pl_module).position
        checkpoint[RESUME_KEY] = {
            **asdict(position),
            "random": of_every_rank(trainer, self._random_state),
            "loggers": self._logger_positions,
        }
        checkpoint["epoch"] = position.epoch
        checkpoint["loops"] = loops_at(checkpoint["loops"], position, evaluate=False)
        if self._callback_states is not None:
            checkpoint["callbacks"] = self._callback_states

    # --- out of a checkpoint --------------------------------------------------------------------------

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Set data and loops to the boundary, before Lightning begins with them."""
        state = checkpoint[RESUME_KEY]
        position = Position(**{name: state[name] for name in Position.__dataclass_fields__})
        module = language_module(pl_module)
        module.position = position
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(datamodule, "start_at"):
            raise InputError(
                f"the data ({type(datamodule).__name__}) cannot start within an epoch, as resuming needs:"
                " give the datamodule a method start_at(*, epoch, batch)"
            )
        batch = position.batch * module.micro_batches
        datamodule.start_at(epoch=position.epoch, batch=batch)
        checkpoint["loops"] = loops_at(
            checkpoint["loops"],
            replace(position, batch=batch),
            evaluate=module.evaluates_after(position.step),
        )
        # A rank that the run did not have keeps the random state it has.
        own = state["random"][trainer.global_rank : trainer.global_rank + 1]
        self._random_state = self._to_restore = own[0] if own else None
        self._logger_positions = state["loggers"]

    def _call(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the random states where the uninterrupted run noted them: before other callbacks act."""
        if self._to_restore is not None:
            set_random_state(self._to_restore)
            self._to_restore = None
        super()._call(trainer, pl_module)


def _callback_states(trainer: L.Trainer) -> dict[str, Any]:
    """Copies of what Lightning would put into a checkpoint now."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    states = {callback.state_key: callback.state_dict() for callback in callbacks}
    return {key: copy.deepcopy(state) for key, state in states.items() if state}


def return_loggers(trainer: L.Trainer, state: Mapping[str, Any]) -> None:
    """Make the loggers drop what they wrote after the checkpoint; before `fit` opens their files.

    `state` is the checkpoint's entry RESUME_KEY.
    """
    for name, logger in _resumable(trainer).items():
        if name in state["loggers"]:
            logger.return_to(state["loggers"][name])


def _resumable(trainer: L.Trainer) -> dict[str, ResumableLogger]:
    """The loggers that can be returned to a checkpoint, by their class."""
    return {type(each).__name__: each for each in trainer.loggers if isinstance(each, ResumableLogger)}
