"""What a run will cost: memory, steps, arithmetic, and the time of a few steps."""

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from gptpl.callbacks.records import StepTimer
from gptpl.config.compose import Config, as_config
from gptpl.config.groups import Folder
from gptpl.config.instantiate import instantiate, partial_of
from gptpl.data.pretraining.datamodule import TOKENS_PER_PARAMETER, SequenceData
from gptpl.errors import InputError
from gptpl.files.figures import figure_pixels, new_figure, write_png
from gptpl.model import GPTModel, ParameterCount, count_parameters
from gptpl.model.parameters import ALL
from gptpl.runs.build import Settled, build_module, settle
from gptpl.runs.parallel_plan import REACHED_FRACTION, Cluster, ParallelPlan, parallel_plan, work_of_run
from gptpl.runs.parts import (
    base_lr,
    classifier_of,
    is_gpt,
    optimizer_factory,
    preparation,
    schedule,
)
from gptpl.runs.trial import (
    DryRun,
    dry_run,
    largest_batch_of,
    step_memory_of,
    train_a_little,
    usable_memory,
)
from gptpl.text import bytes_text, duration_text, table
from gptpl.training.costs import USABLE, counted_flops_per_token, peak_flops
from gptpl.training.lightning_internals import ShapesAlone
from gptpl.training.module import NonFiniteError
from gptpl.training.performance import device_type, product_dtype
from gptpl.training.schedules import scheduler_of
from gptpl.weights.starting import RandomWeights

if TYPE_CHECKING:  # matplotlib takes long to import
    from matplotlib.figure import Figure

DEFAULT_STEPS = 3
CHEAP_SECONDS = 60
"""Steps are timed without being asked for where that takes about so long at most."""
FORWARD_FRACTION = 1 / 3
"""Of a training step's arithmetic, for an evaluation of as many tokens."""
MOST_SEQUENCES = 256
"""The largest batch asked for."""
HELD_FRACTION = 0.2
"""Of a step's memory on a CPU: what malloc holds between blocks in use (experiments/plan_memory)."""
LATER_BYTES = 65_000_000
"""What a run loads after its data: loggers, figures, torch's own buffers (measured there)."""
MOST_POINTS = 2000
"""Of a drawn curve."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What a few real optimizer steps took, after one to warm up."""

    steps: int
    step_seconds: float
    evaluation_seconds: float
    tokens_per_second: float
    run_seconds: float  # all steps and evaluations of the run


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The costs of a run that has not begun.

    `memory_bytes` are the parts of a training step on one device and its peak (`peak_of_step`); on a CPU what
    the allocator holds between blocks in use (`held`) and the rest of the process (`process`); the `total`;
    and what of the free memory a step may take (`usable`, None where the device does not tell).
    """

    data: str  # in words
    parameters: ParameterCount
    trained: str | None  # which of them train, in words; None: all
    memory_bytes: dict[str, int | None]
    fits: bool  # a step into the memory that is free; True also where that is not known
    largest_batch: int | None  # of powers of two that fit at a time; 0: none; None: not known
    device: str
    devices: int
    precision: str
    batch_size: int  # sequences at a time on one device
    accumulate: int  # batches of each device in an optimizer step
    max_length: int  # tokens of a sequence, at most if padded
    padded: bool
    train_sequences: int
    val_sequences: int
    steps_per_epoch: int  # optimizer steps, as all steps
    steps: int
    tokens_per_step: int
    tokens: int  # of the run, each counted as often as it is seen, without padding
    train_tokens: int  # of the training split, each counted once
    flops: int  # of the run's training steps
    evaluations: int
    learning_rate: dict[str, dict[str, float]]  # peak, first and last of each group, by its name in the logs
    lr_factor: Callable[[int], float]  # multiple of the peak for the update after so many finished ones
    timing: Timing | None = None
    not_timed: str | None = None  # why there is no timing
    parallel: ParallelPlan | None = None  # for devices that need not be here
    dry_runs: tuple[DryRun, ...] = ()

    def record(self) -> dict[str, Any]:
        """The plan as plain data."""
        record = asdict(replace(self, parallel=None))
        del record["lr_factor"], record["parallel"]
        if self.parallel is None:
            del record["dry_runs"]
            return record
        return record | {"parallel": self.parallel.record()}

    def lines(self) -> list[str]:
        """The plan for a person, a topic a paragraph."""
        lrs = [
            f"{name} {lr['first']:.3g} at first, {lr['peak']:g} at most, {lr['last']:.3g} at last"
            for name, lr in self.learning_rate.items()
        ]
        topics = {
            "parameters": _parameter_lines(self),
            **({"memory": _memory_lines(self)} if self.parallel is None else self.parallel.topics()),
            "dry run": table([row for run in self.dry_runs for row in run.rows()], right=(2, 3)),
            "data": _data_lines(self),
            "lr": ["; ".join(lrs)],
            "time": _time_lines(self),
        }
        return [
            f"{label if number == 0 else '':<11} {line}".rstrip()
            for label, lines in topics.items()
            for number, line in enumerate(lines)
        ]

    def draw(self, path: Path) -> None:
        """Write a PNG of every group's learning rate against the optimizer steps, with epochs above."""
        write_png(figure_pixels(self.figure()), path)

    def figure(self) -> "Figure":
        """The figure of `draw`."""
        figure = new_figure()
        axes = figure.subplots()
        peaks = {name: lr["peak"] for name, lr in self.learning_rate.items()}
        updates, curves = lr_curves(peaks, self.lr_factor, self.steps)
        for name, values in curves.items():
            line = "--" if name != "lr" and values == curves.get("lr") else "-"  # one would hide the other
            axes.plot(updates, values, label=name, linestyle=line, marker="." if self.steps < 40 else "")
        axes.set(xlabel="Optimizer steps", ylabel="Learning rate")
        axes.set_ylim(bottom=0)
        axes.margins(x=0.02)
        axes.grid(visible=True, alpha=0.3)
        axes.yaxis.set_major_formatter(lambda lr, _position: f"{lr:g}")
        length = self.steps_per_epoch
        epochs = (lambda step: np.divide(step, length), lambda epoch: np.multiply(epoch, length))
        axes.secondary_xaxis("top", functions=epochs).set_xlabel("Epochs")
        if len(curves) > 1:
            figure.legend(loc="outside lower center", ncols=3, frameon=False)
        figure.suptitle("Learning rate of the run", fontweight="bold")
        return figure


def lr_curves(
    lrs: Mapping[str, float], factor: Callable[[int], float], steps: int
) -> tuple[list[int], dict[str, list[float]]]:
    """Optimizer steps, counted from 1, evenly spaced in a long run, and each group's learning rate there."""
    drawn = np.unique(np.linspace(0, steps - 1, min(steps, MOST_POINTS)).round().astype(int)).tolist()
    factors = [factor(step) for step in drawn]
    return [step + 1 for step in drawn], {name: [lr * each for each in factors] for name, lr in lrs.items()}


def plan(
    *config: Config | str,
    timed_steps: int | None = None,
    cluster: Cluster | None = None,
    dry_run: bool = False,
    config_dir: Folder | None = None,
) -> Plan:
    """The costs of a run of a composed config, or of overrides; only the timed steps need weights.

    `timed_steps` real optimizer steps are timed; None: 3 where they take a minute at most. For a `cluster`,
    whose devices need not be here, none are timed, and strategies are compared; a `dry_run` of each counts
    what torch really calls.
    """
    if timed_steps is not None and timed_steps < 0:
        raise InputError(f"plan.timed_steps must be 0 or more, got {timed_steps}")
    if dry_run and (cluster is None or cluster.devices == 1):
        raise InputError(
            "plan.dry_run=true is for several devices that need not be here: give plan.nodes and"
            " plan.devices_per_node"
        )
    cfg = as_config(config, config_dir)
    settled = settle(cfg if cluster is None else cluster.prepared(cfg))
    costs = _costs(settled, cluster)
    if cluster is not None:
        dry_runs = _dry_runs(settled, costs.parallel) if dry_run and costs.parallel else ()
        return replace(costs, not_timed="the devices need not be here", dry_runs=dry_runs)
    timing = _timed(settled, costs, timed_steps)
    return replace(costs, **({"not_timed": timing} if isinstance(timing, str) else {"timing": timing}))


# --- from the settings and the text ---------------------------------------------------------------------


def _costs(settled: Settled, cluster: Cluster | None) -> Plan:
    cfg, data, world_size = settled.cfg, settled.datamodule, settled.trainer.world_size
    config = settled.config  # refuses a model of another class
    accumulate, steps = cfg.trainer.accumulate_grad_batches, settled.total_steps
    examples, of_text = data.train_examples, isinstance(data, SequenceData)
    trained = None
    if settled.tune.state() != ALL:
        with torch.device("meta"):
            trained = settled.tune.report(preparation(cfg, data)(GPTModel(config)))
    # Batches of each device; an epoch's last step may have fewer than the others.
    of_epoch = data.steps_per_epoch(world_size=world_size)
    epochs, steps_left = divmod(steps, -(-of_epoch // accumulate))
    batches = epochs * of_epoch + min(steps_left * accumulate, of_epoch)
    sequences = batches * data.batch_size * world_size
    # Without padding: examples have as many tokens as the mean of them.
    tokens = sequences * data.max_length if of_text else round(sequences * data.train_tokens / examples)
    memory_bytes = _memory_bytes(settled, here=cluster is None)
    if cluster is None:
        parallel, usable = None, usable_memory(settled)
        fits = usable is None or memory_bytes["peak_of_step"] <= usable
        largest = largest_batch_of(settled, min(MOST_SEQUENCES, max(1, examples // world_size)))
    else:
        parallel = parallel_plan(work_of_run(settled), cluster)
        usable = int(USABLE * cluster.memory_gb * 1e9)
        fits, largest = parallel.best is not None, None
    lrs = peak_lrs(settled)
    lr_factor = schedule(cfg, steps) or _stepped(cfg, steps)
    return Plan(
        data=f"{data.name}, {data.tokenizer.name} tokenizer: {data.train_tokens:,} training tokens",
        parameters=count_parameters(config, classifier_of(cfg, data)),
        trained=trained,
        memory_bytes={**memory_bytes, "usable": usable},
        fits=fits,
        largest_batch=largest,
        device=device_type(cfg.trainer.accelerator) if cluster is None else "planned",
        devices=world_size,
        precision=settled.fast_path.precision.precision,
        batch_size=data.batch_size,
        accumulate=accumulate,
        max_length=data.max_length,
        train_sequences=examples,
        val_sequences=len(data.examples("val")),
        padded=not of_text,
        steps_per_epoch=data.steps_per_epoch(world_size=world_size, accumulate=accumulate),
        steps=steps,
        tokens_per_step=data.batch_size * data.max_length * accumulate * world_size,
        tokens=tokens,
        train_tokens=data.train_tokens,
        flops=sequences * data.max_length * _flops_per_token(settled),
        evaluations=1 + -(-steps // cfg.eval_every_n_steps),
        learning_rate={
            name: {"peak": lr, "first": lr * lr_factor(0), "last": lr * lr_factor(steps - 1)}
            for name, lr in lrs.items()
        },
        lr_factor=lr_factor,
        parallel=parallel,
    )


def _dry_runs(settled: Settled, planned: ParallelPlan) -> tuple[DryRun, ...]:
    return tuple(
        dry_run(
            planned.work,
            each.layout,
            planned.cluster,
            settled.fast_path,
            make_optimizer=optimizer_factory(settled.cfg),
            prepare=preparation(settled.cfg, settled.datamodule),
        )
        for each in planned.strategies
        if each.layout.tensor == 1
    )


def _memory_bytes(settled: Settled, *, here: bool) -> dict[str, int]:
    memory, held, process = step_memory_of(settled), 0, 0
    if here and device_type(settled.cfg.trainer.accelerator) == "cpu":
        held = round(HELD_FRACTION * memory.peak)
        process = psutil.Process().memory_info().rss + LATER_BYTES
    parts = {name: getattr(memory, name) for name in _STEP_PARTS}
    total = memory.peak + held + process
    return parts | {"held": held, "process": process, "peak_of_step": memory.peak, "total": total}


def _flops_per_token(settled: Settled) -> int:
    prepare = preparation(settled.cfg, settled.datamodule)
    return counted_flops_per_token(settled.config, settled.datamodule.max_length, prepare)


def peak_lrs(settled: Settled) -> dict[str, float]:
    """The learning rate of each parameter group, under the names of `gptpl.callbacks.metrics`."""
    cfg = settled.cfg
    with ShapesAlone():
        if is_gpt(cfg):  # the groups are those of any depth
            net: nn.Module = preparation(cfg, settled.datamodule)(
                GPTModel(replace(settled.config, n_layers=1))
            )
        else:
            net = instantiate(cfg.model)
        groups = optimizer_factory(cfg)(net).param_groups
    return {f"lr/{g['name']}" if "name" in g else "lr": float(g["lr"]) for g in groups}


def _stepped(cfg: Config, total_steps: int) -> Callable[[int], float]:
    """The factors of a scheduler such as torch's, stepped through the run beforehand.

    One that follows the validation loss keeps its first learning rate here.
    """
    peak = base_lr(cfg)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak, momentum=0.9)
    scheduler = scheduler_of(partial_of(cfg.scheduler), optimizer, total_steps=total_steps)
    factors = []
    for _ in range(total_steps):
        factors.append(optimizer.param_groups[0]["lr"] / peak)
        optimizer.step()
        if not isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step()
    return factors.__getitem__


# --- the time of a few steps ----------------------------------------------------------------------------


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
    module = build_module(settled, weights=RandomWeights())  # steps of other weights take as long
    try:
        train_a_little(settled, module, steps=steps + 1, callbacks=[timer], evaluates=True)
    except NonFiniteError:
        return "the loss of these steps was not finite"
    batches = timer.batch_seconds[plan.accumulate :]  # the first step warms up
    of_steps = [sum(batches[i : i + plan.accumulate]) for i in range(0, len(batches), plan.accumulate)]
    seconds, evaluation_seconds = statistics.median(of_steps), timer.evaluation_seconds or 0.0
    return Timing(
        steps=len(of_steps),
        step_seconds=seconds,
        evaluation_seconds=evaluation_seconds,
        tokens_per_second=plan.tokens_per_step / seconds,
        run_seconds=plan.steps * seconds + plan.evaluations * evaluation_seconds,
    )


def _guessed_seconds(settled: Settled, plan: Plan, steps: int) -> float:
    """Seconds of so many steps and an evaluation; 0 where the device's arithmetic is not known."""
    dtype = product_dtype(plan.precision)
    peak = peak_flops(torch.device(plan.device), dtype, settled.config)
    if peak is None:
        return 0.0
    batches = sum(len(loader) for loader in settled.datamodule.val_dataloader())
    evaluated = batches * plan.batch_size * plan.max_length * FORWARD_FRACTION
    tokens = steps * plan.tokens_per_step + evaluated
    return tokens * _flops_per_token(settled) / (REACHED_FRACTION * peak)


# --- in lines -------------------------------------------------------------------------------------------

_MEANINGS = {
    "weights": "",
    "gradients": "",
    "optimizer": "its state between steps",
    "activations": "kept by the blocks for the backward pass",
    "head": "logits, copies of the head's matrix",
    "held": "held by the allocator between what is in use",
    "process": "Python, torch, Lightning, the text",
}
_STEP_PARTS = ("weights", "gradients", "optimizer", "activations", "head")


def _parameter_lines(plan: Plan) -> list[str]:
    count = plan.parameters
    head = f"an untied head; tied: {count.tied:,}"
    if count.tied == count.untied:
        head = "a classifier's head"
    elif count.total == count.tied:
        head = f"a tied head; untied: {count.untied:,}"
    parts = [f"  {name:<19} {size:>13,} {size / count.total:>5.0%}" for name, size in count.parts.items()]
    return [f"{count.total:,} with {head}", *parts, *([plan.trained] if plan.trained else [])]


def _memory_lines(plan: Plan) -> list[str]:
    of = plan.memory_bytes
    lines = [
        f"{bytes_text(of['total'] or 0)} at most, on {plan.devices} x {plan.device}: {plan.precision},"
        f" {plan.batch_size:,} x {plan.max_length:,} tokens at a time on each"
    ]
    for name, meaning in _MEANINGS.items():
        if (size := of[name] or 0) or name in _STEP_PARTS:
            lines.append(f"  {name:<11} {bytes_text(size):>9}  {meaning}".rstrip())
    if plan.accumulate == 1:
        lines.append("  gradients take the place of activations and head: the larger of the two counts")
    if of["usable"] is None:
        return [*lines, f"whether it fits is not known: {plan.device} does not tell its free memory"]
    fits = "it fits" if plan.fits else "IT DOES NOT FIT"
    largest = f"the largest batch (a power of two) that does is {plan.largest_batch:,}"
    if not plan.largest_batch:
        largest = "not even one sequence does"
    return [*lines, f"{fits}: a step may take {bytes_text(of['usable'])} of what is free; {largest}"]


def _data_lines(plan: Plan) -> list[str]:
    times = f" x {plan.accumulate} batches" if plan.accumulate > 1 else ""
    devices = f" x {plan.devices} devices" if plan.devices > 1 else ""
    note = "; memory, operations and time are those of full sequences" if plan.padded else ""
    parameters = plan.parameters.total
    return [
        plan.data,
        f"{plan.train_sequences:,} training sequences of {'up to ' if plan.padded else ''}{plan.max_length:,}"
        f" tokens, {plan.val_sequences:,} of validation{note}",
        f"{plan.steps:,} steps, {plan.steps_per_epoch:,} an epoch, of {plan.tokens_per_step:,} tokens"
        f" ({plan.batch_size:,} x {plan.max_length:,}{times}{devices})",
        f"{plan.tokens:,} tokens: {_two_digits(plan.tokens / max(1, plan.train_tokens))} times the text",
        f"{_two_digits(plan.tokens / parameters)} tokens for each parameter; about {TOKENS_PER_PARAMETER} of"
        f" new text are compute-optimal: {TOKENS_PER_PARAMETER * parameters:,} tokens",
        f"{plan.flops:.2e} floating-point operations",
    ]


def _time_lines(plan: Plan) -> list[str]:
    timing = plan.timing
    if plan.parallel is not None:
        if plan.parallel.best is None:
            return ["not known: nothing fits"]
        seconds = plan.steps * plan.parallel.best.step_seconds
        return [f"about {duration_text(seconds)} for {plan.steps:,} steps, without all else of a run"]
    if timing is None:
        return [f"not known: {plan.not_timed}"]
    end = datetime.now().astimezone() + timedelta(seconds=timing.run_seconds)
    return [
        f"about {duration_text(timing.run_seconds)}: started now, it ends on {end:%a %d %b at %H:%M}, without"
        " samples and checkpoints",
        f"a step {timing.step_seconds:.3g} s, {timing.tokens_per_second:,.0f} tokens/s ({timing.steps} timed)"
        f", each of {plan.evaluations:,} evaluations {timing.evaluation_seconds:.3g} s",
    ]


def _two_digits(number: float) -> str:
    """Two significant digits without an exponent: 0.00057, 3.6, 120."""
    digits = 0 if number >= 10 else 1 - math.floor(math.log10(number))
    return f"{number:,.{digits}f}"
