"""What gptpl uses of Lightning and torch beyond their public interfaces.

Read in lightning 2.6.6 and torch 2.13. `tests/training/test_lightning_internals.py` has a test of each, which
names what breaks when a library changes. Elsewhere are only: the writer of TensorBoard's event files, in
`gptpl.training.loggers`, with Lightning's logger around it in `loggers`; and in lower rooms, the layout of
Lightning's loop counters in `gptpl.checkpoints.resume_state`, torch's private operators for CPUs in
`gptpl.model.inference` and `gptpl.model.attention_kernels`.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import lightning as L
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

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


@contextmanager
def fake_processes(count: int) -> Iterator[None]:
    """A context in which this process is the first of a group, whose others do not exist: nothing is sent."""
    # Its import registers the backend "fake".
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


_WHOLE = {
    "allreduce_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "alltoall_base_": ("all_to_all", 1),
}
"""Of c10d's operators, the operation and the place of the argument that is the whole tensor.

Of an all-to-all it is what this process divides among all.
"""


class CollectiveCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context that counts `calls` of collectives, and `bytes` of the whole tensors, by operation.

    torch's own `CommDebugMode` does not count bytes, and fails for modules that FSDP calls by another method
    than `forward` (torch 2.13).
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count an operator of the namespace c10d, and call it."""
        space, _, name = func.name().partition("::")
        if space == "c10d":
            operation, place = _WHOLE.get(name, (name, 0))
            whole = args[place]
            tensors = whole if isinstance(whole, list) else [whole]
            self.calls[operation] += 1
            self.bytes[operation] += sum(tensor.nbytes for tensor in tensors)
        return func(*args, **(kwargs or {}))
