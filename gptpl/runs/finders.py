"""Finders: learning rates at which training falls fastest, and speed and memory by batch size."""

# Not Lightning's `Tuner.lr_find`: it gives all parameter groups one learning rate, where Muon and AdamW have
# two; its slope is per unit of the learning rate, not of its logarithm, which favours the smallest; and it
# saves the whole model into the run's folder. Nor `Tuner.scale_batch_size`: it doubles until a step runs out
# of memory, which on a CPU ends the process, and measures no speed. Here memory is estimated first.

import csv
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from gptpl.callbacks.records import LossOfSteps, SeenEnough, StepTimer
from gptpl.config.compose import Config, as_config
from gptpl.config.groups import Folder
from gptpl.errors import InputError
from gptpl.evaluation.loss_curves import RangeResult, ramp_rate, range_result
from gptpl.files.durable import write_atomically
from gptpl.files.figures import figure_pixels, new_figure, write_png
from gptpl.runs.build import Settled, build_module, settle
from gptpl.runs.parts import check_gpt, is_gpt
from gptpl.runs.plan import peak_lrs
from gptpl.runs.trainer import fast_path_of, timings_of
from gptpl.runs.trial import check_fits, check_one_device, step_memory_of, train_a_little, usable_memory
from gptpl.text import bytes_text, count_text, table
from gptpl.training.autotune import PRECISIONS, machine_name
from gptpl.training.costs import forget_peak, peak_memory_bytes
from gptpl.training.module import NonFiniteError
from gptpl.training.performance import AUTO, device_type, keep_freed_memory
from gptpl.weights.starting import RandomWeights

if TYPE_CHECKING:  # matplotlib takes long to import
    from matplotlib.figure import Figure

TABLE_ROWS = 12
MOST_SEQUENCES = 1024
GAIN = 1.03
"""A size that is not faster by this factor than every smaller one has no gain; two such end the search."""
GOOD_ENOUGH = 0.95
"""Of the best speed: the smallest batch that reaches it is suggested."""
SETTLED_BY_FINDER = ("data.batch_size", "data.global_batch_size", "trainer.accumulate_grad_batches")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Rows for a CSV file, lines for a person, a figure, and the number suggested, if any."""

    table: list[Sequence[Any]]
    lines: list[str]
    figure: "Figure"
    suggested: float | int | None

    def write(self, folder: Path, name: str) -> None:
        """Write `<name>.png` and `<name>.csv`."""
        folder.mkdir(parents=True, exist_ok=True)
        text = io.StringIO(newline="")
        csv.writer(text).writerows(self.table)
        write_atomically(folder / f"{name}.csv", text.getvalue())
        write_png(figure_pixels(self.figure), folder / f"{name}.png")


# --- learning rates -------------------------------------------------------------------------------------


def find_lr(
    *config: Config | str,
    min_lr: float = 1e-6,
    max_lr: float = 1.0,
    steps: int = 100,
    config_dir: Folder | None = None,
) -> Finding:
    """The learning-rate range test (Smith 2017) on the model, text and optimizer of a config, or overrides.

    `optimizer.lr` grows from `min_lr` in the first step to `max_lr` in the last, by the same factor in each
    of 10 steps or more, unless the loss diverges before.
    """
    if not 0 < min_lr < max_lr:
        raise InputError(f"find.min_lr={min_lr:g} must be positive and below find.max_lr={max_lr:g}")
    if steps < 10:
        raise InputError(f"find.steps must be 10 or more, got {steps}")
    settled = settle(as_config(config, config_dir))
    check_one_device(settled, "find-lr")
    if is_gpt(settled.cfg):  # the memory of another model is not known
        check_fits(settled)
    ramp = [ramp_rate(step, min_lr=min_lr, max_lr=max_lr, steps=steps) for step in range(steps)]
    losses = _ramp_losses(settled, ramp)
    lrs = ramp[: len(losses)]
    result = range_result(lrs, losses, steps=steps)
    rows = list(zip(range(1, steps + 1), lrs, losses, result.smoothed, strict=False))
    return Finding(
        table=[("step", "lr", "loss", "smoothed_loss"), *rows],
        lines=_lr_lines(settled, rows, result),
        figure=_lr_figure(lrs, losses, result),
        suggested=result.suggested,
    )


def _ramp_losses(settled: Settled, lrs: list[float]) -> list[float]:
    """The loss of each step, before its update with that `optimizer.lr`; ends where it diverges."""
    module = build_module(settled, weights=settled.weights)
    peak = float(settled.cfg.optimizer.lr)
    module.make_scheduler = None
    module.lr_factor = lambda step: lrs[min(step, len(lrs) - 1)] / peak
    with tqdm(total=len(lrs), unit="step", desc="raising the learning rate", disable=None) as bar:
        kept = LossOfSteps(len(lrs), partial(bar.update, 1))
        try:
            train_a_little(settled, module, steps=len(lrs) + 1, callbacks=[kept])
        except SeenEnough:
            pass
        except NonFiniteError:
            kept.losses.append(math.nan)
    return kept.losses


def _lr_lines(settled: Settled, rows: Sequence[Sequence[float]], result: RangeResult) -> list[str]:
    every = max(1, math.ceil(len(rows) / TABLE_ROWS))
    shown = [rows[i] for i in sorted({*range(0, len(rows), every), len(rows) - 1})]
    cells = [[f"{lr:.2g}", f"{loss:.3f}", f"{smooth:.3f}"] for _, lr, loss, smooth in shown]
    lines = [f"  {line}" for line in table([["lr", "loss", "smoothed"], *cells], right=[1, 2])]
    where = f"not up to {rows[-1][1]:.2g}" if result.diverges is None else f"at {result.diverges:.2g}"
    lines.append(f"diverges    {where}")
    if result.suggested is None:
        return [*lines, "suggestion  none: the loss never falls; try other rates, or more find.steps"]
    scale = result.suggested / float(settled.cfg.optimizer.lr)
    overrides = []
    for name, lr in peak_lrs(settled).items():
        group = name.partition("/")[2]  # "lr/muon" is set by `muon_lr`
        overrides.append(f"optimizer.{f'{group}_lr' if group else 'lr'}={lr * scale:.2g}")
    return [*lines, f"suggestion  {' '.join(overrides)}  (where the loss falls fastest)"]


def _lr_figure(lrs: Sequence[float], losses: Sequence[float], result: RangeResult) -> "Figure":
    figure = new_figure()
    axes = figure.subplots()
    axes.plot(lrs, losses, color="tab:blue", alpha=0.35, linewidth=1, label="loss of each step")
    axes.plot(lrs, result.smoothed, color="tab:blue", label="smoothed")
    for lr, colour, name in (
        (result.suggested, "tab:green", "falls fastest"),
        (result.diverges, "tab:red", "diverges"),
    ):
        if lr is not None:
            axes.axvline(lr, color=colour, linestyle="--", label=f"{name}: {lr:.2g}")
    finite = [loss for loss in losses if math.isfinite(loss)]
    if finite:  # a loss that explodes would flatten the rest
        low, first = min(finite), finite[0]
        top = min(max(finite), 2 * first - low + 0.2 * abs(first))
        margin = 0.05 * (top - low) or 1.0
        axes.set_ylim(low - margin, top + margin)
    axes.set(xscale="log", xlabel="Learning rate (optimizer.lr)", ylabel="Training loss (nats per token)")
    axes.grid(visible=True, alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle("Learning-rate range test", fontweight="bold")
    return figure


# --- the fastest way to compute -------------------------------------------------------------------------


def autotune(*config: Config | str, config_dir: Folder | None = None) -> list[str]:
    """Measure what is fastest for the model and batch of a config, or overrides, on this machine: a table.

    The times replace those in the cache, by which training chooses. Raises InputError where nothing is left
    to choose.
    """
    cfg = as_config(config, config_dir)
    path = fast_path_of(cfg)
    if path.keep_freed_memory:
        keep_freed_memory()
    times = timings_of(cfg, again=True)
    if times is None:
        raise InputError(
            f"nothing is left to choose for trainer.precision={cfg.trainer.precision} on"
            f" {device_type(cfg.trainer.accelerator)}: give trainer.precision=auto"
        )
    path, work = fast_path_of(cfg, timings=times), times.work
    chosen = (path.precision.precision, path.attention, path.head if work.has_head else "-")
    ways = [
        (times.step_seconds(precision, kernel, head), precision, kernel, head if work.has_head else "-")
        for precision in PRECISIONS
        for kernel in times.kernels
        for head in (times.heads if work.has_head else ("fused",))
    ]
    rows = [["precision", "attention", "head", "s a batch", "tokens/s", ""]]
    for seconds, *names in sorted(ways):
        if math.isfinite(seconds):
            mark = "chosen" if tuple(names) == chosen else ""
            rows.append([*names, f"{seconds:.3g}", f"{work.positions / seconds:,.0f}", mark])
    shown = [*table(rows, right=[3, 4]), "Forward and backward pass, without the optimizer."]
    rates = {precision: times.gigaflops(precision) for precision in PRECISIONS}
    return [
        f"machine     {machine_name(work.device)}, torch {torch.__version__}",
        f"batch       {work.sequences} x {work.length} tokens, {count_text(work.threads, 'thread')}",
        f"products    {', '.join(f'{name} {rate:,.0f} GFLOP/s' for name, rate in rates.items() if rate)}",
        *(shown if work.is_model else [f"chosen      {path}, by the products of GPT-2 small's block"]),
    ]


# --- batch sizes ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Measurements of a batch size; the fields are the columns of the CSV."""

    batch_size: int
    tokens_per_second: float
    step_seconds: float
    peak_bytes: int
    estimated_step_bytes: int


def find_batch_size(
    *config: Config | str,
    max_batch_size: int | None = None,
    timed_steps: int = 3,
    config_dir: Folder | None = None,
) -> Finding:
    """Speed and memory of a training step by batch size, for a config or overrides: 1, 2, 4, ...

    `max_batch_size` is the largest to try; None: until memory, text or the gain in speed ends. Of each size
    `timed_steps` are timed, after one to warm up.
    """
    for name, value in (("max_batch_size", max_batch_size), ("timed_steps", timed_steps)):
        if value is not None and value < 1:
            raise InputError(f"find.{name} must be 1 or more, got {value}")
    cfg = as_config(config, config_dir)
    check_gpt(cfg, "find-batch-size estimates the memory of a GPTModel")
    if "global_batch_size" not in cfg.data:
        raise InputError(f"{cfg.data._target_} makes its own batches: time its sizes by training with each")
    cfg.data.batch_size, cfg.data.global_batch_size, cfg.trainer.accumulate_grad_batches = 1, None, 1
    if cfg.trainer.head == AUTO:
        cfg.trainer.head = "fused"  # also of sizes whose logits would be too large to keep
    settled = settle(cfg)
    check_one_device(settled, "find-batch-size")
    check_fits(settled)
    limit = min(max_batch_size or MOST_SEQUENCES, settled.datamodule.train_examples)
    sizes = [2**i for i in range(limit.bit_length())]
    if max_batch_size is not None and sizes[-1] != limit:
        sizes.append(limit)
    measured, ended = _measure(settled, sizes, timed_steps)
    best = suggestion(measured)
    rows = [
        [
            f"{m.batch_size:,}",
            f"{m.tokens_per_second:,.0f}",
            f"{m.step_seconds:.3g}",
            bytes_text(m.peak_bytes),
        ]
        for m in measured
    ]
    lines = table([["batch", "tokens/s", "s a step", "peak memory"], *rows], right=range(4))
    return Finding(
        table=[[field.name for field in fields(Measured)], *map(astuple, measured)],
        lines=[
            *(f"  {line}" for line in lines),
            f"ended       {ended}",
            f"suggestion  data.batch_size={best.batch_size}  (the smallest with {GOOD_ENOUGH:.0%} of the best"
            " speed)",
        ],
        figure=_size_figure(measured, best.batch_size),
        suggested=best.batch_size,
    )


def _measure(settled: Settled, sizes: list[int], steps: int) -> tuple[list[Measured], str]:
    """Measure every size in turn; returns also why there are no more."""
    device = torch.device(device_type(settled.cfg.trainer.accelerator))
    usable = usable_memory(settled)  # once: the process keeps what a size has taken for the next one
    module = build_module(settled, weights=RandomWeights())
    module.make_scheduler = None
    module.lr_factor = lambda step: 0.0  # the same work, and the loss cannot diverge
    measured: list[Measured] = []
    best, without_gain = 0.0, 0
    with tqdm(sizes, unit="size", disable=None) as bar:
        for size in bar:
            bar.set_description(f"batch size {size}")
            needed = step_memory_of(settled, size).peak
            if usable is not None and needed > usable:
                return measured, (
                    f"{size:,} sequences would need about {bytes_text(needed)} for a step,"
                    f" which may take {bytes_text(usable)} of what is free"
                )
            settled.datamodule.batch_size = size
            forget_peak(device)
            timer = StepTimer()
            train_a_little(settled, module, steps=steps + 1, callbacks=[timer])
            seconds = statistics.median(timer.batch_seconds[1:])  # the first warms up
            speed = size * settled.datamodule.max_length / seconds
            measured.append(
                Measured(
                    batch_size=size,
                    tokens_per_second=speed,
                    step_seconds=seconds,
                    peak_bytes=peak_memory_bytes(device),
                    estimated_step_bytes=needed,
                )
            )
            without_gain = 0 if speed > GAIN * best else without_gain + 1
            best = max(best, speed)
            if without_gain == 2:
                return measured, "the last two sizes were not faster"
    return measured, f"{sizes[-1]:,} sequences are the most to try, or all that the text has"


def suggestion(measured: list[Measured]) -> Measured:
    """The smallest batch that is nearly as fast as the fastest: its memory is better used otherwise."""
    best = max(m.tokens_per_second for m in measured)
    return next(m for m in measured if m.tokens_per_second >= GOOD_ENOUGH * best)


def _size_figure(measured: list[Measured], best: int) -> "Figure":
    figure = new_figure()
    speed, memory = figure.subplots(2, 1, sharex=True)
    sizes = [m.batch_size for m in measured]
    speed.plot(sizes, [m.tokens_per_second for m in measured], color="tab:blue", marker="o")
    speed.set_ylabel("Tokens per second")
    memory.plot(sizes, [m.peak_bytes / 1e9 for m in measured], color="tab:orange", marker="o")
    memory.set(ylabel="Peak memory (GB)", xlabel="Sequences in a batch (data.batch_size)")
    memory.set_xscale("log", base=2)
    memory.set_xticks(sizes, [f"{size:,}" for size in sizes])
    memory.minorticks_off()
    for axes in (speed, memory):
        axes.set_ylim(bottom=0, top=1.1 * axes.get_ylim()[1])
        axes.grid(visible=True, alpha=0.3)
        axes.axvline(best, color="tab:green", linestyle="--", label=f"suggested: {best:,}")
    speed.legend(loc="lower left")
    figure.suptitle("Speed and memory by batch size", fontweight="bold")
    return figure
