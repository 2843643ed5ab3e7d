"""What a run will be and cost: in numbers of its settings and its text alone, and the time of a few steps."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.lr_scheduler import ReduceLROnPlateau

from gptpl.callbacks.step_timer import StepTimer
from gptpl.config.compose import Config, as_config
from gptpl.config.groups import Folder
from gptpl.config.instantiate import instantiate, partial_of
from gptpl.data.datamodule import TextDataModule
from gptpl.errors import InputError
from gptpl.files.figures import figure_pixels, write_png
from gptpl.model import GPTModel, ParameterCount, count_parameters
from gptpl.runs.build import Settled, peak_rate, schedule, settle
from gptpl.runs.parts import is_gpt, optimizer_factory, preparation, trained_part
from gptpl.runs.trainer import choose
from gptpl.runs.trial import largest_batch_of, step_memory_of, train_a_little, trial_module, usable_memory
from gptpl.training.flops import counted_flops_per_token, peak_flops
from gptpl.training.non_finite import NonFiniteError
from gptpl.training.precision import device_type, product_dtype
from gptpl.training.schedules import scheduler_of
from gptpl.training.step_memory import StepMemory
from gptpl.weights.starting import RandomWeights

if TYPE_CHECKING:  # matplotlib takes long to import
    from matplotlib.figure import Figure

DEFAULT_STEPS = 3
CHEAP_SECONDS = 60
"""Steps are timed without being asked for where that takes about so long at most."""
REACHED_SHARE = 0.4
"""Of the device's rate, for a first guess of what timing takes."""
FORWARD_SHARE = 1 / 3
"""Of a training step's arithmetic: what an evaluation of as many tokens needs."""
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
    factor = schedule(cfg, settled.total_steps) or _stepped(cfg, settled.total_steps)
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
        rate_factor=factor,
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


def _stepped(cfg: Config, total_steps: int) -> Callable[[int], float]:
    """The factor of a scheduler such as torch's, stepped over the run beforehand.

    One that follows the validation loss keeps its first rate here: what the loss will be, nobody knows.
    """
    peak = peak_rate(cfg)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak, momentum=0.9)
    scheduler = scheduler_of(partial_of(cfg.scheduler), optimizer, total_steps=total_steps)
    factors = []
    for _ in range(total_steps):
        factors.append(optimizer.param_groups[0]["lr"] / peak)
        optimizer.step()
        if not isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step()
    return factors.__getitem__


def flops_per_token(settled: Settled) -> int:
    """Of the run's training."""
    return counted_flops_per_token(settled.config, settled.datamodule.max_length, preparation(settled.cfg))


def peak_rates(settled: Settled) -> dict[str, float]:
    """Under the names that `gptpl.callbacks.learning_rate` logs; of a model without memory."""
    with FakeTensorMode():
        if is_gpt(settled.cfg):  # the groups are those of any depth
            net: nn.Module = preparation(settled.cfg)(GPTModel(replace(settled.config, n_layers=1)))
        else:
            net = instantiate(settled.cfg.model)
        groups = optimizer_factory(settled.cfg)(net).param_groups
    return {f"lr/{g['name']}" if "name" in g else "lr": float(g["lr"]) for g in groups}


# --- with the time of a few steps -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What a few real steps took.

    Attributes:
        steps: that were timed, after one to warm up.
        step_seconds: of an optimizer step.
        evaluation_seconds: of an evaluation.
    """

    steps: int
    step_seconds: float
    evaluation_seconds: float

    def run_seconds(self, plan: RunPlan) -> float:
        """Of the whole run: its steps and its evaluations."""
        return plan.steps * self.step_seconds + plan.evaluations * self.evaluation_seconds


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `gptpl plan` says.

    Attributes:
        run: the numbers.
        timing: of a few steps, or why there is none.
        about: the data, in words.
    """

    run: RunPlan
    timing: Timing | str
    about: str

    def lines(self) -> list[str]:
        """For a person, a topic a paragraph."""
        from gptpl.runs.plan_report import plan_lines

        return list(plan_lines(self.run, self.timing, self.about))

    def record(self) -> dict[str, Any]:
        """For a program: bytes, seconds, steps and tokens as numbers."""
        from gptpl.runs.plan_report import plan_record

        return plan_record(self.run, self.timing)

    def figure(self) -> "Figure":
        """The learning rate over the run."""
        from gptpl.runs.plan_report import rate_figure

        run = self.run
        return rate_figure(run.rates, run.rate_factor, steps=run.steps, steps_per_epoch=run.steps_per_epoch)

    def draw(self, path: Path) -> None:
        """Writes `figure` as a PNG."""
        write_png(figure_pixels(self.figure()), path)


def plan(*config: Config | str, timed_steps: int | None = None, config_dir: Folder | None = None) -> Plan:
    """What a run will be and cost; no weights are made but for the timed steps.

    Args:
        config: a composed config, or overrides of `gptpl train`.
        timed_steps: real steps to time; 0: none; None: 3, where they take a minute at most.
        config_dir: the user's own config folder.
    """
    if timed_steps is not None and timed_steps < 0:
        raise InputError(f"plan.timed_steps={timed_steps} cannot be: give 0 or more")
    settled = settle(as_config(config, config_dir))
    numbers = plan_of(settled)
    data = settled.datamodule
    about = f"{data.name}, {data.tokenizer.name} tokenizer: {numbers.train_tokens:,} training tokens"
    return Plan(run=numbers, timing=_timed(settled, numbers, timed_steps), about=about)


def _timed(settled: Settled, plan: RunPlan, steps: int | None) -> Timing | str:
    """The time of a few real steps, or why they were not made."""
    if steps == 0:
        return "plan.timed_steps=0"
    if plan.devices > 1:
        return f"steps of {plan.devices} devices are not timed"
    if not plan.fits:
        return "a step does not fit into the memory that is free"
    if steps is None:
        seconds = _guessed_seconds(settled, plan, DEFAULT_STEPS + 1)
        if seconds > CHEAP_SECONDS:
            return (
                f"timing {DEFAULT_STEPS} steps would take about {seconds / 60:.0f} minutes;"
                f" plan.timed_steps={DEFAULT_STEPS} does it"
            )
        steps = DEFAULT_STEPS
    timer = StepTimer()
    module = trial_module(settled, RandomWeights())  # they take as long as any
    try:
        train_a_little(settled, module, steps=steps + 1, callbacks=[timer], evaluates=True)
    except NonFiniteError:
        return "the loss of these steps was no number"
    batches = timer.batch_seconds[plan.accumulate :]  # the first step warms up
    of_a_step = [sum(batches[i : i + plan.accumulate]) for i in range(0, len(batches), plan.accumulate)]
    return Timing(
        steps=len(of_a_step),
        step_seconds=statistics.median(of_a_step),
        evaluation_seconds=timer.evaluation_seconds or 0.0,
    )


def _guessed_seconds(settled: Settled, plan: RunPlan, steps: int) -> float:
    """Of so many steps and an evaluation; 0 where the device's rate is not known."""
    dtype = product_dtype(choose(settled.cfg.trainer).precision)
    peak = peak_flops(torch.device(plan.device), dtype, settled.config)
    if peak is None:
        return 0.0
    batches = sum(len(loader) for loader in settled.datamodule.val_dataloader())
    evaluated = batches * plan.batch_size * plan.max_length * FORWARD_SHARE
    flops = flops_per_token(settled)
    return (steps * plan.tokens_per_step + evaluated) * flops / (REACHED_SHARE * peak)
