"""The files of `checkpoints/`: `best.ckpt` to use, `step-*.ckpt` to resume from, `last.ckpt` the newest."""

import copy
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import psutil
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import CheckpointIO

from gptpl.callbacks.after_step import AfterStep, language_module, of_every_rank
from gptpl.checkpoints.files import (
    CheckpointFolder,
    remove_checkpoint,
    snapshot,
    snapshot_bytes,
    write_checkpoint,
)
from gptpl.checkpoints.resume_state import RESUME_KEY, Position, loops_at, random_state, set_random_state
from gptpl.checkpoints.sharded import Share, assemble, split, write_share
from gptpl.errors import InputError
from gptpl.text import bytes_text
from gptpl.training.costs import USABLE, free_memory, peak_memory_bytes
from gptpl.training.loggers import ResumableLogger
from gptpl.training.task import Better, better, known_metrics

log = logging.getLogger(__name__)

_NICE = 10
"""Of the thread that writes in the background, where hashing takes a core (experiments/exact_resume)."""


def declared_mode(monitor: str, trainer: L.Trainer, pl_module: L.LightningModule) -> Better:
    """Whether a metric is better low or high, as the task or a callback declares; InputError if none does."""
    return better(monitor, known_metrics(pl_module, trainer.callbacks))  # type: ignore[attr-defined]


class BestCheckpoint(ModelCheckpoint):
    """`best.ckpt`: the weights at the best `monitor` so far, without optimizer state.

    Saved after each evaluation that improves on it; a third of the size of a checkpoint to resume from.
    `mode` None: see `declared_mode`.
    """

    def __init__(self, *, dirpath: str | Path, monitor: str = "val/loss", mode: Better | None = None) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="best",
            monitor=monitor,
            mode=mode or "min",
            save_top_k=1,
            save_weights_only=True,
            save_on_train_epoch_end=False,
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )
        self._mode_given = mode

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find out whether low or high is better."""
        if self._mode_given is None and stage == "fit":
            assert self.monitor is not None
            self.mode = declared_mode(self.monitor, trainer, pl_module)
            if not self.best_k_models:
                self.kth_value = torch.tensor(math.inf if self.mode == "min" else -math.inf)
        super().setup(trainer, pl_module, stage)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the best score; its file is in this run's folder, which may have been moved."""
        moved: dict[str, Any] = {"dirpath": self.dirpath}
        if state_dict["best_model_path"]:
            best = str(Path(str(self.dirpath)) / Path(state_dict["best_model_path"]).name)
            moved |= {"best_model_path": best, "kth_best_model_path": best}
            moved |= {"best_k_models": {best: state_dict["best_model_score"]}}
        super().load_state_dict(state_dict | moved)
        self.current_score = state_dict["current_score"]  # Lightning forgets it


class LastCheckpoint(AfterStep):
    """`step-*.ckpt`, the newest `keep` of them, and `last.ckpt`: everything that is needed to resume.

    Saved after a step, before its evaluation and samples: every `every_n_steps` steps or `every_n_minutes`
    minutes, after the last step, and when training is interrupted.

    The first of these are `asynchronous`: training waits for a copy in memory, which is written while it
    continues (see `DurableCheckpointIO.in_background`). The others are on the disk before training ends. An
    error in the background is raised after the next step.
    """

    def __init__(
        self,
        *,
        dirpath: str | Path,
        every_n_minutes: float | None = 10.0,
        every_n_steps: int | None = None,
        keep: int = 2,
        asynchronous: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (("every_n_minutes", every_n_minutes), ("every_n_steps", every_n_steps)):
            if value is not None and value <= 0:
                raise InputError(f"callbacks.checkpoint_last.{name} must be positive or null, got {value}")
        self.folder = CheckpointFolder(Path(dirpath), keep=keep)
        self.every_n_minutes = every_n_minutes
        self.every_n_steps = every_n_steps
        self.asynchronous = asynchronous
        self.saved_step = 0
        self._saved_seconds = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock; the step that training starts from is saved already."""
        super().on_train_start(trainer, pl_module)
        self.saved_step = trainer.global_step
        self._saved_seconds = time.monotonic()

    def due(self, trainer: L.Trainer, pl_module: L.LightningModule) -> bool:
        """After so many steps, by the clock of any rank, and after the last step."""
        self._finish(trainer, wait=False)
        step, seconds = trainer.global_step, time.monotonic() - self._saved_seconds
        by_steps = self.every_n_steps is not None and step % self.every_n_steps == 0
        by_time = self.every_n_minutes is not None and seconds >= 60 * self.every_n_minutes
        return by_steps or by_time or step >= language_module(pl_module).total_steps

    def after_step(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the step; the last one before it is evaluated."""
        last = trainer.global_step >= language_module(pl_module).total_steps
        self.save(trainer, pl_module, wait=last or not self.asynchronous)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the last step of a training that was stopped early."""
        super().on_train_end(trainer, pl_module)
        self.save(trainer, pl_module)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Save the last finished step of an interrupted run, if no update has changed the weights since.

        Not with several processes: saving takes them all, and some may be gone.
        """
        if isinstance(io := trainer.strategy.checkpoint_io, DurableCheckpointIO):
            io.end()
        try:
            self._finish(trainer)
        except (OSError, RuntimeError, MemoryError) as error:  # of an earlier step
            log.error("a checkpoint could not be saved: %s", error)
        if self._reached is None or trainer.world_size > 1 or language_module(pl_module).updating:
            return
        step = language_module(pl_module).position.step
        try:
            if self.save(trainer, pl_module):
                log.info("saved step %d: %s", step, self.folder.path(step))
        except OSError as error:  # the disk may be full, which may be why training ended
            log.error("step %d could not be saved: %s", step, error)

    def save(self, trainer: L.Trainer, pl_module: L.LightningModule, *, wait: bool = True) -> bool:
        """Save the boundary after the last finished step, on all ranks together; False: nothing to save.

        With `wait` everything is on the disk when this returns. Raises the OSError of a save before it, too.
        """
        self._finish(trainer)
        step = language_module(pl_module).position.step
        if step == self.saved_step or trainer.fast_dev_run:  # type: ignore[attr-defined]
            if wait:
                trainer.strategy.barrier()  # the first rank may have waited for its file
            return False
        io, settle = trainer.strategy.checkpoint_io, partial(self._settle, step)
        background = not wait and isinstance(io, DurableCheckpointIO)
        with io.in_background(settle) if background else nullcontext():  # type: ignore[attr-defined]
            trainer.save_checkpoint(self.folder.path(step), weights_only=False)
        if not trainer.is_global_zero:
            self.saved_step = step
        elif not background:
            settle()
        self._saved_seconds = time.monotonic()
        return True

    def _settle(self, step: int) -> None:
        self.folder.settle(step)
        self.saved_step = step

    def _finish(self, trainer: L.Trainer, *, wait: bool = True) -> None:
        if isinstance(io := trainer.strategy.checkpoint_io, DurableCheckpointIO):
            io.finish(wait=wait)


class DurableCheckpointIO(CheckpointIO):
    """Writes the Trainer's checkpoints, never two at a time, and reads them.

    Lightning's own copies them in memory, and may leave half a file; its `AsyncCheckpointIO` tells of a full
    disk only after the save that follows.
    """

    def __init__(self) -> None:
        self._then: Callable[[], None] | None = None
        self._writing: Future[None] | None = None
        self._peak_bytes: int | None = None
        self._said_short = False
        self._ended = threading.Event()

    @contextmanager
    def in_background(self, then: Callable[[], None]) -> Iterator[None]:
        """Let `save_checkpoint` return with a copy made, which a thread writes before it calls `then`.

        Where memory is short for a copy it writes at once, and calls `then`.
        """
        self._then = then
        try:
            yield
        finally:
            self._then = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """See `write_checkpoint`; raises OSError naming `path`, which then keeps its old content.

        `storage_options` may be a `Share`: every process then calls this, and writes a part of it.
        """
        self.finish()
        if isinstance(storage_options, Share):
            checkpoint = {
                "part": split(checkpoint),
                "rest": checkpoint if storage_options.number == 1 else {},
            }
        write = partial(self._write, path=Path(path), share=storage_options, then=self._then)
        if self._then is None or not self._has_room(snapshot_bytes(checkpoint)):
            write(checkpoint)
            return
        writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing = writer.submit(write, snapshot(checkpoint))
        writer.shutdown(wait=False)

    def _write(
        self, checkpoint: dict[str, Any], *, path: Path, share: Share | None, then: Callable[[], None] | None
    ) -> None:
        if threading.current_thread() is not threading.main_thread():
            _stand_back()
        if share is None:
            write_checkpoint(checkpoint, path)
        else:
            write_share(checkpoint["part"], checkpoint["rest"], path, share, ended=self._ended.is_set)
        if then is not None and (share is None or share.number == 1):  # the file is whole
            then()

    def end(self) -> None:
        """Training has failed: wait for no part of another process any longer."""
        self._ended.set()

    def finish(self, *, wait: bool = True) -> None:
        """Wait for the write in the background, and raise its error; without `wait` only if it has ended."""
        if self._writing is None or not (wait or self._writing.done()):
            return
        wait_for([self._writing])  # which Ctrl-C may interrupt
        written, self._writing = self._writing, None
        written.result()

    def _has_room(self, needed: int) -> bool:
        """Whether so many bytes of the host's memory are left where training needs as much as so far."""
        if self._peak_bytes is None:  # later peaks have a copy in them
            self._peak_bytes = peak_memory_bytes(torch.device("cpu"))
        can_have = psutil.Process().memory_info().rss + int(USABLE * free_memory("cpu"))
        room = can_have - self._peak_bytes
        if needed > room and not self._said_short:
            self._said_short = True
            log.warning(
                "memory is short for a copy of the checkpoint (%s): training waits while it is written",
                bytes_text(needed),
            )
        return needed <= room

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The checkpoint, its tensors mapped from the file; raises ValueError for `weights_only=False`."""
        if weights_only is False:
            raise ValueError(f"{path}: weights_only=False would run code from the file")
        checkpoint: dict[str, Any] = torch.load(
            path, map_location=map_location or "cpu", weights_only=True, mmap=True
        )
        assemble(checkpoint, Path(path))
        return checkpoint

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Remove the file and its SHA-256, if they exist."""
        remove_checkpoint(Path(path))

    def teardown(self) -> None:
        """Finish a write that nothing else has waited for; the Trainer may fit again."""
        self.finish()
        self._ended.clear()


def _stand_back() -> None:
    """Lower the priority of this thread and of those it starts: steps were twice as slow during a write."""
    if sys.platform == "linux":  # where threads have priorities of their own
        thread = threading.get_native_id()
        with suppress(OSError):  # a sandbox may refuse it
            lower = max(_NICE, os.getpriority(os.PRIO_PROCESS, thread))  # nobody may raise it again
            os.setpriority(os.PRIO_PROCESS, thread, lower)


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
