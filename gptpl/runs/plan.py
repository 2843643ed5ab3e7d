"""What a run will be and cost: in numbers of its settings and its text alone, and the time of a few steps."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from gptpl.callbacks.step_trace import StepTimer
from gptpl.config.compose import Config, as_config
from gptpl.config.groups import Folder
from gptpl.config.instantiate import instantiate, partial_of
from gptpl.data.pretraining.datamodule import TOKENS_PER_PARAMETER, TextDataModule
from gptpl.errors import InputError
from gptpl.files.figures import figure_pixels, new_figure, write_png
from gptpl.model import GPTModel, ParameterCount, count_parameters
from gptpl.model.tuning import ALL
from gptpl.runs.build import Settled, build_module, peak_rate, schedule, settle
from gptpl.runs.parts import choose, is_gpt, optimizer_factory, preparation, tuning_of
from gptpl.runs.trial import largest_batch_of, step_memory_of, train_a_little, usable_memory
from gptpl.text import duration_text
from gptpl.training.flops import counted_flops_per_token, peak_flops
from gptpl.training.memory import ShapesAlone, StepMemory
from gptpl.training.module import NonFiniteError
from gptpl.training.performance import device_type, product_dtype
from gptpl.training.schedules import scheduler_of
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
MOST_POINTS = 2000
"""Of a picture."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What a few real steps took, after one to warm up."""

    steps: int
    step_seconds: float
    """Of an optimizer step."""
    evaluation_seconds: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run that has not begun.

    Attributes:
        about: the data, in words.
        trained: what of them trains, in a line; None: all.
        memory: of a training step on one device.
        process_bytes: of the process beside it on a CPU: Python, torch, Lightning, the text; else 0.
        held_bytes: what the allocator holds between blocks in use.
        usable_bytes: of the device's free memory, for a step; None where the device does not tell.
        largest_batch: windows, a power of two, that fit at a time; 0: none; None: not known.
        batch_size: windows at a time on one device.
        accumulate: batches of each device in an optimizer step.
        units: what the windows are called, which have up to `max_length` tokens (`padded`) or as many.
        steps_per_epoch, steps: optimizer steps of an epoch, and of the whole run.
        tokens: of the whole run, each counted as often as it is seen, without padding.
        flops: of the whole run's training steps.
        rates: peak learning rate of each group, by the name it is logged under.
        rate_factor: the multiple of the peak for the update after so many finished ones.
        timing: of a few steps, or why there is none.
    """

    about: str
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
    timing: Timing | str = ""

    @property
    def parts(self) -> dict[str, int]:
        """Bytes of what the process holds."""
        names = ("weights", "gradients", "optimizer", "activations", "head")
        step = {name: getattr(self.memory, name) for name in names}
        return step | {"held": self.held_bytes, "process": self.process_bytes}

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

    def run_seconds(self, timing: Timing) -> float:
        """Of the whole run: its steps and its evaluations."""
        return self.steps * timing.step_seconds + self.evaluations * timing.evaluation_seconds

    def lines(self) -> list[str]:
        """For a person, a topic a paragraph."""
        first, last = self.rate_factor(0), self.rate_factor(self.steps - 1)
        rates = [
            f"{name} {first * rate:.3g} at first, {rate:g} at most, {last * rate:.3g} at last"
            for name, rate in self.rates.items()
        ]
        topics = {
            "parameters": _parameter_lines(self),
            "memory": _memory_lines(self),
            "data": [self.about, *_step_lines(self)],
            "rate": ["; ".join(rates)],
            "time": _time_lines(self),
        }
        return [
            f"{label if number == 0 else '':<11} {line}".rstrip()
            for label, lines in topics.items()
            for number, line in enumerate(lines)
        ]

    def record(self) -> dict[str, Any]:
        """For a program: bytes, seconds, steps and tokens as numbers."""
        timed = self.timing if isinstance(self.timing, Timing) else None
        return {
            "parameters": {**asdict(self.parameters), "parts": dict(self.parameters.parts)},
            "memory_bytes": {
                **self.parts, "peak_of_step": self.memory.peak, "total": self.total_bytes,
                "usable": self.usable_bytes,
            },
            **{name: value for name, value in vars(self).items() if name not in _SAID_OTHERWISE},
            "fits": self.fits,
            "tokens_per_step": self.tokens_per_step,
            "tokens_per_parameter": self.tokens / self.parameters.total,
            "compute_optimal_tokens": TOKENS_PER_PARAMETER * self.parameters.total,
            "learning_rate": {
                name: {"peak": rate, "first": rate * self.rate_factor(0),
                       "last": rate * self.rate_factor(self.steps - 1)}
                for name, rate in self.rates.items()
            },
            "timing": None if timed is None else {
                **asdict(timed),
                "tokens_per_second": self.tokens_per_step / timed.step_seconds,
                "run_seconds": self.run_seconds(timed),
            },
            "not_timed": self.timing if timed is None else None,
        }  # fmt: skip

    def figure(self) -> "Figure":
        """Every group's learning rate against the optimizer steps, with epochs above."""
        figure = new_figure()
        axes = figure.subplots()
        updates, curves = rate_curves(self.rates, self.rate_factor, self.steps)
        for name, values in curves.items():
            line = "--" if name != "lr" and values == curves.get("lr") else "-"  # one would hide the other
            axes.plot(updates, values, label=name, linestyle=line, marker="." if self.steps < 40 else "")
        axes.set_xlabel("Optimizer steps")
        axes.set_ylabel("Learning rate")
        axes.set_ylim(bottom=0)
        axes.margins(x=0.02)
        axes.grid(visible=True, alpha=0.3)
        axes.yaxis.set_major_formatter(lambda rate, _position: f"{rate:g}")

        def to_epochs(updates: Any) -> Any:
            return updates / self.steps_per_epoch

        def to_updates(epochs: Any) -> Any:
            return epochs * self.steps_per_epoch

        top = axes.secondary_xaxis("top", functions=(to_epochs, to_updates))
        top.set_xlabel("Epochs")
        if len(curves) > 1:
            figure.legend(loc="outside lower center", ncols=3, frameon=False)
        figure.suptitle("Learning rate of the run", fontweight="bold")
        return figure

    def draw(self, path: Path) -> None:
        """Writes `figure` as a PNG."""
        write_png(figure_pixels(self.figure()), path)


_SAID_OTHERWISE = (
    *("about", "parameters", "memory", "rate_factor", "rates", "timing"),
    *("process_bytes", "held_bytes", "usable_bytes"),
)


def plan(*config: Config | str, timed_steps: int | None = None, config_dir: Folder | None = None) -> Plan:
    """What a run of a config, or of overrides, will be and cost; weights are made for the timed steps alone.

    `timed_steps` are real ones; 0: none; None: 3, where they take a minute at most.
    """
    if timed_steps is not None and timed_steps < 0:
        raise InputError(f"plan.timed_steps={timed_steps} cannot be: give 0 or more")
    settled = settle(as_config(config, config_dir))
    found = _numbers(settled)
    return replace(found, timing=_timed(settled, found, timed_steps))


# --- numbers --------------------------------------------------------------------------------------------


def _numbers(settled: Settled) -> Plan:
    cfg, data, world_size = settled.cfg, settled.datamodule, settled.trainer.world_size
    device = device_type(cfg.trainer.accelerator)
    process_bytes = psutil.Process().memory_info().rss + LATER_BYTES if device == "cpu" else 0
    memory = step_memory_of(settled)
    tune, trained = tuning_of(cfg), None
    if tune.state() != ALL:
        with torch.device("meta"):
            trained = tune.report(preparation(cfg)(GPTModel(settled.config)))
    accumulate, examples = cfg.trainer.accumulate_grad_batches, len(data.examples("train"))
    # Batches of each device; an epoch's last step may have fewer than the others.
    of_epoch = data.steps_per_epoch(world_size=world_size)
    epochs, steps_left = divmod(settled.total_steps, -(-of_epoch // accumulate))
    batches = epochs * of_epoch + min(steps_left * accumulate, of_epoch)
    windows = batches * data.batch_size * world_size
    of_text = isinstance(data, TextDataModule)
    # Without padding: examples have as many tokens as the mean of them.
    tokens = windows * data.max_length if of_text else round(windows * data.train_tokens / examples)
    return Plan(
        about=f"{data.name}, {data.tokenizer.name} tokenizer: {data.train_tokens:,} training tokens",
        parameters=count_parameters(settled.config),
        trained=trained,
        memory=memory,
        process_bytes=process_bytes,
        held_bytes=round(HELD_SHARE * memory.peak) if device == "cpu" else 0,
        usable_bytes=usable_memory(settled),
        largest_batch=largest_batch_of(settled, min(MOST_WINDOWS, max(1, examples // world_size))),
        device=device,
        devices=world_size,
        precision=choose(cfg.trainer).precision,
        batch_size=data.batch_size,
        accumulate=accumulate,
        max_length=data.max_length,
        train_windows=examples,
        val_windows=len(data.examples("val")),
        units=data.units,
        padded=not of_text,
        steps_per_epoch=data.steps_per_epoch(world_size=world_size, accumulate=accumulate),
        steps=settled.total_steps,
        tokens=tokens,
        train_tokens=data.train_tokens,
        flops=windows * data.max_length * flops_per_token(settled),
        evaluations=1 + -(-settled.total_steps // cfg.eval_every_n_steps),
        rates=peak_rates(settled),
        rate_factor=schedule(cfg, settled.total_steps) or _stepped(cfg, settled.total_steps),
    )


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
    with ShapesAlone():
        if is_gpt(settled.cfg):  # the groups are those of any depth
            net: nn.Module = preparation(settled.cfg)(GPTModel(replace(settled.config, n_layers=1)))
        else:
            net = instantiate(settled.cfg.model)
        groups = optimizer_factory(settled.cfg)(net).param_groups
    return {f"lr/{g['name']}" if "name" in g else "lr": float(g["lr"]) for g in groups}


# --- the time of a few steps ---------------------------------------------------------------------------


def _timed(settled: Settled, plan: Plan, steps: int | None) -> Timing | str:
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
    module = build_module(settled, weights=RandomWeights())  # they take as long as any
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


def _guessed_seconds(settled: Settled, plan: Plan, steps: int) -> float:
    """Of so many steps and an evaluation; 0 where the device's rate is not known."""
    dtype = product_dtype(choose(settled.cfg.trainer).precision)
    peak = peak_flops(torch.device(plan.device), dtype, settled.config)
    if peak is None:
        return 0.0
    batches = sum(len(loader) for loader in settled.datamodule.val_dataloader())
    evaluated = batches * plan.batch_size * plan.max_length * FORWARD_SHARE
    flops = flops_per_token(settled)
    return (steps * plan.tokens_per_step + evaluated) * flops / (REACHED_SHARE * peak)


# --- in lines -------------------------------------------------------------------------------------------

_MEANINGS = {
    "optimizer": "what it keeps from step to step",
    "activations": "what the blocks keep for the backward pass",
    "head": "logits, copies of the head's matrix",
    "held": "held by the allocator between what is in use",
    "process": "Python, torch, Lightning, the text",
}


def _parameter_lines(plan: Plan) -> list[str]:
    count = plan.parameters
    head = f"untied head; tied it would be {count.tied:,}"
    if count.total == count.tied:
        head = f"tied head; untied it would be {count.untied:,}"
    lines = [f"{count.total:,} with {'its' if count.total == count.tied else 'an'} {head}"]
    for name, number in count.parts.items():
        lines.append(f"  {name:<19} {number:>13,} {number / count.total:>5.0%}")
    return lines if plan.trained is None else [*lines, plan.trained]


def _memory_lines(plan: Plan) -> list[str]:
    each = " each" if plan.devices > 1 else ""
    lines = [
        f"{_size(plan.total_bytes)} at most, on {plan.devices} x {plan.device}{each}: {plan.precision},"
        f" {plan.batch_size:,} x {plan.max_length:,} tokens at a time"
    ]
    for name, number in plan.parts.items():
        if number or name not in ("held", "process"):
            lines.append(f"  {name:<11} {_size(number):>9}  {_MEANINGS.get(name, '')}".rstrip())
    if not plan.memory.gradients_stay:
        lines.append("  gradients come while activations and head go: the larger of the two counts")
    if plan.usable_bytes is None or plan.largest_batch is None:
        return [*lines, f"whether it fits is not known: {plan.device} does not tell its free memory"]
    largest = f"of powers of two {plan.largest_batch:,} x {plan.max_length:,} is the largest that fits"
    if not plan.largest_batch:
        largest = f"not even 1 x {plan.max_length:,} does"
    fits = "it fits" if plan.fits else "IT DOES NOT FIT"
    return [*lines, f"{fits}: a step may take {_size(plan.usable_bytes)} of what is free; {largest}"]


def _step_lines(plan: Plan) -> list[str]:
    times = f" x {plan.accumulate} batches" if plan.accumulate > 1 else ""
    devices = f" x {plan.devices} devices" if plan.devices > 1 else ""
    ratio = plan.tokens / plan.parameters.total
    padded = plan.padded and "; memory, operations and time are those of full rows, at most"
    return [
        f"{plan.train_windows:,} training {plan.units} of {'up to ' if padded else ''}{plan.max_length:,},"
        f" {plan.val_windows:,} of validation{padded or ''}",
        f"{plan.steps:,} steps, {plan.steps_per_epoch:,} an epoch, of {plan.tokens_per_step:,} tokens"
        f" ({plan.batch_size:,} x {plan.max_length:,}{times}{devices})",
        f"{plan.tokens:,} tokens in all:"
        f" {_significant(plan.tokens / max(1, plan.train_tokens))} times the text",
        f"{_significant(ratio)} tokens for each parameter; about {TOKENS_PER_PARAMETER} of new text are"
        f" compute-optimal: {_count(TOKENS_PER_PARAMETER * plan.parameters.total)} tokens",
        f"{plan.flops:.2e} floating-point operations",
    ]


def _time_lines(plan: Plan) -> list[str]:
    timing = plan.timing
    if isinstance(timing, str):
        return [f"not known: {timing}"]
    seconds = plan.run_seconds(timing)
    end = datetime.now().astimezone() + timedelta(seconds=seconds)
    return [
        f"about {duration_text(seconds)}: begun now, it ends on {end:%a %d %b at %H:%M}, samples and"
        " checkpoints not counted",
        f"a step {timing.step_seconds:.3g} s ({plan.tokens_per_step / timing.step_seconds:,.0f} tokens/s;"
        f" {timing.steps} timed), each of {plan.evaluations:,} evaluations {timing.evaluation_seconds:.3g} s",
    ]


def _size(number: float) -> str:
    """Such as "512 kB", "71 MB", "3.09 GB"."""
    for size, unit in ((1e9, "GB"), (1e6, "MB")):
        if number >= size:
            return f"{number / size:.{2 if unit == 'GB' else 0}f} {unit}"
    return f"{number / 1e3:.0f} kB"


def _count(number: float) -> str:
    for size, word in ((1e9, " billion"), (1e6, " million")):
        if number >= size:
            return f"{number / size:.3g}{word}"
    return f"{number:,.0f}"


def _significant(number: float) -> str:
    """Two digits that count, without an exponent: 0.00057, 3.6, 120."""
    digits = 0 if number >= 10 else 1 - math.floor(math.log10(number))
    return f"{number:,.{digits}f}"


# --- the picture's numbers ------------------------------------------------------------------------------


def rate_curves(
    rates: Mapping[str, float], factor: Callable[[int], float], steps: int
) -> tuple[list[int], dict[str, list[float]]]:
    """Updates, counted from 1, evenly spaced in a long run, and their rates by name of the group."""
    drawn: Sequence[int] = range(steps)
    if steps > MOST_POINTS:
        drawn = sorted({round(i * (steps - 1) / (MOST_POINTS - 1)) for i in range(MOST_POINTS)})
    factors = [factor(step) for step in drawn]
    return [step + 1 for step in drawn], {
        name: [peak * share for share in factors] for name, peak in rates.items()
    }
