"""`gptpl find-batch-size`: speed and memory of a run's training step by batch size."""

# Not Lightning's `Tuner.scale_batch_size`: it doubles until a step runs out of memory, which on a CPU ends
# the process, and it measures no speed. Here the estimate is asked before a size is tried.

import csv
import statistics
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import torch
from omegaconf import DictConfig
from tqdm import tqdm

from gptpl.callbacks.loss_figure import figure_pixels, write_png
from gptpl.callbacks.step_timer import StepTimer
from gptpl.cli.build import Settled, settle
from gptpl.cli.console import RunLog
from gptpl.cli.finder_figures import batch_size_figure
from gptpl.cli.hydra_app import run_under_hydra
from gptpl.cli.own_settings import OwnSettings
from gptpl.cli.settled_memory import check_fits, step_memory_of, usable_memory
from gptpl.cli.short_training import check_one_device, train_a_little, trial_module
from gptpl.cli.trainer import device_type
from gptpl.errors import InputError
from gptpl.training.peak_memory import forget_peak, peak_memory_bytes
from gptpl.weights.starting import RandomWeights

KEYS = ("max_batch_size", "timed_steps", "output")
NAME = "batch_size_finder"
MOST_WINDOWS = 1024
GAIN = 1.03
"""A size that is not faster by this factor than every smaller one has no gain; two such end the search."""
GOOD_ENOUGH = 0.95
"""Of the best speed: the smallest batch that reaches it is suggested."""
SETTLED_BY_COMMAND = ("data.batch_size", "data.global_batch_size", "trainer.accumulate_grad_batches")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a batch size was measured to take; the fields are the columns of the CSV."""

    batch_size: int
    tokens_per_second: float
    step_seconds: float
    peak_bytes: int
    estimated_step_bytes: int


def run(arguments: list[str]) -> int:
    """Prints a table and the suggestion, writes plot and numbers; returns the exit status."""
    own = OwnSettings("find-batch-size", arguments, prefix="find", keys=KEYS)
    folder = own.folder("output")
    most = own.whole("max_batch_size", None, least=1)
    steps = own.whole("timed_steps", 3, least=1)
    assert steps is not None
    for override in own.overrides:
        key = override.partition("=")[0].lstrip("+~")
        if key in SETTLED_BY_COMMAND:
            raise InputError(f"{key} is what gptpl find-batch-size tries out: leave it out")

    def task(cfg: DictConfig) -> None:
        with RunLog():
            settled = settle(cfg)
            check_one_device(settled, "find-batch-size")
            check_fits(settled)
            measured, ended = measure(settled, _sizes(settled, most), steps)
        folder.mkdir(parents=True, exist_ok=True)
        _write_csv(folder / f"{NAME}.csv", measured)
        suggested = suggestion(measured)
        figure = batch_size_figure(
            [m.batch_size for m in measured],
            [m.tokens_per_second for m in measured],
            [m.peak_bytes for m in measured],
            suggested.batch_size,
        )
        write_png(figure_pixels(figure), folder / f"{NAME}.png")
        print("\n".join(_lines(measured, suggested, ended, folder)))

    alone = ["data.batch_size=1", "data.global_batch_size=null", "trainer.accumulate_grad_batches=1"]
    run_under_hydra("train", [*own.overrides, *alone], task)
    return 0


def measure(settled: Settled, sizes: list[int], steps: int) -> tuple[list[Measured], str]:
    """Every size in turn, and why there are no more."""
    # Asked once: what a size has taken from the system is there for the next one.
    usable = usable_memory(settled)
    module = trial_module(settled, RandomWeights())
    module.lr_factor = lambda step: 0.0  # a step as any other, but the loss cannot diverge
    measured: list[Measured] = []
    without_gain = 0
    with tqdm(sizes, unit="size", disable=None) as bar:
        for size in bar:
            bar.set_description(f"batch size {size}")
            needed = step_memory_of(settled, size).peak
            if usable is not None and needed > usable:
                return measured, (
                    f"{size:,} windows would need about {needed / 1e9:.1f} GB for a step,"
                    f" which may take {usable / 1e9:.1f} GB of what is free"
                )
            best = max((m.tokens_per_second for m in measured), default=0.0)
            settled.datamodule.batch_size = size
            forget_peak(_device(settled))
            timer = StepTimer()
            train_a_little(settled, module, steps=steps + 1, callbacks=[timer])
            measured.append(_measured(settled, size, timer, needed))
            without_gain = 0 if measured[-1].tokens_per_second > GAIN * best else without_gain + 1
            if without_gain == 2:
                return measured, "the last two sizes were not faster"
    return measured, f"{sizes[-1]:,} windows are the most that were to be tried, or that the text has"


def suggestion(measured: list[Measured]) -> Measured:
    """The smallest batch that is nearly as fast as the fastest: memory is better left for something else."""
    best = max(m.tokens_per_second for m in measured)
    return next(m for m in measured if m.tokens_per_second >= GOOD_ENOUGH * best)


def _measured(settled: Settled, size: int, timer: StepTimer, needed: int) -> Measured:
    seconds = statistics.median(timer.batch_seconds[1:])  # the first warms up
    return Measured(
        batch_size=size,
        tokens_per_second=size * settled.datamodule.max_length / seconds,
        step_seconds=seconds,
        peak_bytes=peak_memory_bytes(_device(settled)),
        estimated_step_bytes=needed,
    )


def _device(settled: Settled) -> torch.device:
    return torch.device(device_type(settled.cfg.trainer.accelerator))


def _sizes(settled: Settled, most: int | None) -> list[int]:
    """1, 2, 4 and so on, up to what is asked for or the text has; the most asked for is one of them."""
    limit = min(most or MOST_WINDOWS, len(settled.datamodule.examples("train")))
    powers = [2**i for i in range(limit.bit_length())]
    return powers if most is None or powers[-1] == limit else [*powers, limit]


def _write_csv(path: Path, measured: list[Measured]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([field.name for field in fields(Measured)])
        writer.writerows(astuple(m) for m in measured)
    temporary.replace(path)


def _lines(measured: list[Measured], suggested: Measured, ended: str, folder: Path) -> Iterator[str]:
    yield "  batch   tokens/s   s a step   peak memory"
    for m in measured:
        yield (
            f"  {m.batch_size:>5,} {m.tokens_per_second:>10,.0f} {m.step_seconds:>10.3g}"
            f" {m.peak_bytes / 1e9:>10.2f} GB"
        )
    yield f"ended       {ended}"
    yield (
        f"suggestion  data.batch_size={suggested.batch_size}"
        f"  (the smallest with {GOOD_ENOUGH:.0%} of the best speed)"
    )
    yield f"written     {folder / NAME}.png, .csv"
