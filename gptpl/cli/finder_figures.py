"""The pictures of `gptpl find-lr` and `gptpl find-batch-size`."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gptpl.callbacks.loss_figure import DOTS_PER_INCH, SIZE_INCHES
from gptpl.training.rate_range import RangeResult

if TYPE_CHECKING:  # matplotlib takes long to import
    from matplotlib.figure import Figure


def rate_range_figure(rates: Sequence[float], losses: Sequence[float], result: RangeResult) -> "Figure":
    """The loss against the rate, its suggestion and where it diverges marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots()
    axes.plot(rates, losses, color="tab:blue", alpha=0.35, linewidth=1, label="loss of each step")
    axes.plot(rates, result.smoothed, color="tab:blue", label="smoothed")
    for rate, colour, name in (
        (result.suggested, "tab:green", "falls fastest"),
        (result.diverges, "tab:red", "diverges"),
    ):
        if rate is not None:
            axes.axvline(rate, color=colour, linestyle="--", label=f"{name}: {rate:.2g}")
    axes.set_xscale("log")
    finite = [loss for loss in losses if math.isfinite(loss)]
    if finite:  # a loss that explodes would flatten the rest
        low, first = min(finite), finite[0]
        top = min(max(finite), first + (first - low) + 0.2 * abs(first))
        axes.set_ylim(low - 0.05 * (top - low), top + 0.05 * (top - low)) if top > low else None
    axes.set_xlabel("Learning rate (optimizer.lr)")
    axes.set_ylabel("Training loss (nats per token)")
    axes.grid(visible=True, alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle("Learning-rate range test", fontweight="bold")
    return figure


def batch_size_figure(
    sizes: Sequence[int], tokens_per_second: Sequence[float], peak_bytes: Sequence[float], suggested: int
) -> "Figure":
    """Speed and peak memory against the batch size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    speed, memory = figure.subplots(2, 1, sharex=True)
    speed.plot(sizes, tokens_per_second, color="tab:blue", marker="o")
    speed.set_ylabel("Tokens per second")
    memory.plot(sizes, [number / 1e9 for number in peak_bytes], color="tab:orange", marker="o")
    memory.set_ylabel("Peak memory (GB)")
    memory.set_xlabel("Windows in a batch (data.batch_size)")
    memory.set_xscale("log", base=2)
    memory.set_xticks(sizes, [f"{size:,}" for size in sizes])
    memory.minorticks_off()
    for axes in (speed, memory):
        axes.set_ylim(bottom=0, top=1.1 * axes.get_ylim()[1])
        axes.grid(visible=True, alpha=0.3)
        axes.axvline(suggested, color="tab:green", linestyle="--", label=f"suggested: {suggested:,}")
    speed.legend(loc="lower left")
    figure.suptitle("Speed and memory by batch size", fontweight="bold")
    return figure
