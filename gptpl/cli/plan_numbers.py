"""What a run will be, in numbers: of its settings and its text alone, no weight is made."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import psutil
from torch._subclasses.fake_tensor import FakeTensorMode

from gptpl.cli.build import Settled
from gptpl.cli.hydra_app import instantiate
from gptpl.cli.settled_memory import largest_batch_of, step_memory_of, usable_memory
from gptpl.cli.trainer import choose, device_type
from gptpl.cli.tuned import preparation, trained_part
from gptpl.data.datamodule import TextDataModule
from gptpl.model import GPTModel, ParameterCount, count_parameters
from gptpl.training.flops import counted_flops_per_token
from gptpl.training.step_memory import StepMemory

MOST_WINDOWS = 256
"""Larger batches are not asked for."""
HELD_SHARE = 0.2
"""Of a step's memory on a CPU: what malloc holds between blocks in use (experiments/plan_memory)."""
LATER_BYTES = 65_000_000
"""What a run loads after its data: loggers, figures, torch's own buffers (measured there)."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A run that has not begun.

    Attributes:
        parameters: of the model.
        trained: what of them trains, in a line; None: all.
        memory: of a training step on one device.
        process_bytes: of the process beside it on a CPU: Python, torch, Lightning, the text; else 0.
        held_bytes: what the allocator holds between blocks in use.
        usable_bytes: of the device's free memory, for a step; None where the device does not tell.
        largest_batch: windows, a power of two, that fit at a time; 0: none; None: not known.
        device: such as "cpu".
        devices: processes of the run.
        precision: Lightning's name of it.
        batch_size: windows at a time on one device.
        accumulate: batches of each device in an optimizer step.
        max_length: tokens in a window.
        train_windows: to train on.
        val_windows: to validate on.
        units: what they are called.
        padded: whether they may be shorter than `max_length`.
        steps_per_epoch: optimizer steps.
        steps: of the whole run.
        tokens: of the whole run, each counted as often as it is seen, without padding.
        train_tokens: in the training text.
        flops: of the whole run's training steps.
        evaluations: before, during and after.
        rates: peak learning rate of each group, by the name it is logged under.
        rate_factor: the multiple of the peak for the update after so many finished ones.
    """

    parameters: ParameterCount
    trained: str | None
    memory: StepMemory
    process_bytes: int
    held_bytes: int
    usable_bytes: int | None
    largest_batch: int | None
    device: str
    devices: int
    precision: str
    batch_size: int
    accumulate: int
    max_length: int
    train_windows: int
    val_windows: int
    units: str
    padded: bool
    steps_per_epoch: int
    steps: int
    tokens: int
    train_tokens: int
    flops: int
    evaluations: int
    rates: dict[str, float]
    rate_factor: Callable[[int], float]

    @property
    def total_bytes(self) -> int:
        """What the process will take at most."""
        return self.memory.peak + self.held_bytes + self.process_bytes

    @property
    def fits(self) -> bool:
        """Whether a step fits into the memory that is free; also where that is not known."""
        return self.usable_bytes is None or self.memory.peak <= self.usable_bytes

    @property
    def tokens_per_step(self) -> int:
        """Of all devices."""
        return self.batch_size * self.max_length * self.accumulate * self.devices


def plan_of(settled: Settled) -> RunPlan:
    """The numbers of a settled run."""
    cfg, data, world_size = settled.cfg, settled.datamodule, settled.trainer.world_size
    device = device_type(cfg.trainer.accelerator)
    process_bytes = psutil.Process().memory_info().rss + LATER_BYTES if device == "cpu" else 0
    parameters = count_parameters(settled.config)
    memory = step_memory_of(settled)
    factor = instantiate(cfg.scheduler).factor
    windows = _batches(settled) * data.batch_size * world_size
    return RunPlan(
        parameters=parameters,
        trained=trained_part(cfg, settled.config),
        memory=memory,
        process_bytes=process_bytes,
        held_bytes=round(HELD_SHARE * memory.peak) if device == "cpu" else 0,
        usable_bytes=usable_memory(settled),
        largest_batch=largest_batch_of(
            settled, min(MOST_WINDOWS, max(1, len(data.examples("train")) // world_size))
        ),
        device=device,
        devices=world_size,
        precision=choose(cfg.trainer).precision,
        batch_size=data.batch_size,
        accumulate=cfg.trainer.accumulate_grad_batches,
        max_length=data.max_length,
        train_windows=len(data.examples("train")),
        val_windows=len(data.examples("val")),
        units=data.units,
        padded=not isinstance(data, TextDataModule),
        steps_per_epoch=data.steps_per_epoch(
            world_size=world_size, accumulate=cfg.trainer.accumulate_grad_batches
        ),
        steps=settled.total_steps,
        tokens=_tokens_of(settled, windows),
        train_tokens=data.train_tokens,
        flops=windows * data.max_length * flops_per_token(settled),
        evaluations=1 + -(-settled.total_steps // cfg.eval_every_n_steps),
        rates=peak_rates(settled),
        rate_factor=partial(factor, peak_lr=cfg.optimizer.lr, total_steps=settled.total_steps),
    )


def _batches(settled: Settled) -> int:
    """Batches of each device in the whole run; an epoch's last step may have fewer than the others."""
    world_size, accumulate = settled.trainer.world_size, settled.cfg.trainer.accumulate_grad_batches
    of_epoch = settled.datamodule.steps_per_epoch(world_size=world_size)
    epochs, steps_left = divmod(settled.total_steps, -(-of_epoch // accumulate))
    return epochs * of_epoch + min(steps_left * accumulate, of_epoch)


def _tokens_of(settled: Settled, windows: int) -> int:
    """Tokens of so many windows, without padding: examples have as many as the mean of them."""
    data = settled.datamodule
    if isinstance(data, TextDataModule):
        return windows * data.max_length
    return round(windows * data.train_tokens / len(data.examples("train")))


def flops_per_token(settled: Settled) -> int:
    """Of the run's training."""
    return counted_flops_per_token(settled.config, settled.datamodule.max_length, preparation(settled.cfg))


def peak_rates(settled: Settled) -> dict[str, float]:
    """Under the names that `gptpl.callbacks.learning_rate` logs; of a model without memory."""
    with FakeTensorMode():
        # The groups are those of any depth.
        net = preparation(settled.cfg)(GPTModel(replace(settled.config, n_layers=1)))
        groups = instantiate(settled.cfg.optimizer)(net).param_groups
    return {f"lr/{g['name']}" if "name" in g else "lr": float(g["lr"]) for g in groups}
