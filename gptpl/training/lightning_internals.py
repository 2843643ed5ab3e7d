"""What gptpl uses of Lightning and torch beyond their public interfaces.

Read in lightning 2.6.6 and torch 2.13. `tests/training/test_lightning_internals.py` has a test of each, which
names what breaks when a library changes. Elsewhere are only: the writer of TensorBoard's event files, in
`gptpl.training.event_file`, with Lightning's logger around it in `loggers`; and in lower rooms, the layout of
Lightning's loop counters in `gptpl.checkpoints.resume_state`, torch's private operators for CPUs in
`gptpl.model.inference` and `gptpl.model.attention_kernels`.
"""

import sys
from types import ModuleType

import lightning as L
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

ShapesAlone = FakeTensorMode
"""A context in which tensors have shapes and types, but no memory."""


def evaluate_after_this_batch(trainer: L.Trainer, due: bool) -> None:
    """Let the Trainer evaluate after the present batch, or not.

    By itself it counts batches, which are no steps where an epoch ends with a short accumulation. It reads
    this interval after every batch (`_TrainingEpochLoop._should_check_val_fx`).
    """
    trainer.val_check_batch = 1 if due else sys.maxsize


def count_logged_steps(trainer: L.Trainer) -> None:
    """Set the counter that `trainer.log_every_n_steps` goes by to the number of optimizer steps.

    It counts an evaluation that a resumed run makes up for as one more step.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


def let_module_end(trainer: L.Trainer) -> None:
    """Leave it to the training module to end the training after its `total_steps`.

    Lightning counts an epoch that `max_steps` interrupted as a whole one: resumed with more steps, a run
    would reach `max_epochs` before it has made them. And it would not start where all steps are done, but not
    yet the evaluation of the last.
    """
    trainer.fit_loop.max_epochs = -1
    trainer.fit_loop.epoch_loop.max_steps = -1


def unscales_in_step(optimizer: Optimizer) -> bool:
    """Whether the optimizer undoes fp16's loss scale itself, in `step`: torch's fused optimizers do.

    Lightning's precision plugin then leaves the gradients scaled before clipping.
    """
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def leave_tensorflow_alone() -> None:
    """Keep TensorBoard from importing an installed TensorFlow: seconds, and lines on the terminal.

    It does without where this module exists, which some builds of TensorBoard have (`tensorboard.compat.tf`).
    """
    sys.modules.setdefault("tensorboard.compat.notf", ModuleType("tensorboard.compat.notf"))
