"""A plan in lines for a person, as plain data for a program, and its learning rate as a picture."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from gptpl.data.report import TOKENS_PER_PARAMETER
from gptpl.files.figures import DOTS_PER_INCH, SIZE_INCHES
from gptpl.runs.plan import RunPlan, Timing
from gptpl.text import duration_text

if TYPE_CHECKING:  # matplotlib takes long to import
    from matplotlib.figure import Figure


def plan_lines(plan: RunPlan, timing: Timing | str, data: str) -> Iterator[str]:
    """The plan, a topic a paragraph; `timing` is the reason where nothing was timed."""
    yield from _labelled("parameters", _parameter_lines(plan))
    yield from _labelled("memory", _memory_lines(plan))
    yield from _labelled("data", [data, *_step_lines(plan)])
    yield from _labelled("rate", [_rate_line(plan)])
    yield from _labelled("time", _time_lines(plan, timing))


def plan_record(plan: RunPlan, timing: Timing | str) -> dict[str, Any]:
    """The same, for `--json`; bytes, seconds, steps and tokens as numbers."""
    plain = {name: value for name, value in vars(plan).items() if name not in _NOT_PLAIN}
    count, timed = plan.parameters, timing if isinstance(timing, Timing) else None
    return {
        "parameters": {**asdict(count), "parts": dict(count.parts)},
        "memory_bytes": {
            **_parts(plan), "peak_of_step": plan.memory.peak, "total": plan.total_bytes,
            "usable": plan.usable_bytes,
        },
        **plain,
        "fits": plan.fits,
        "tokens_per_step": plan.tokens_per_step,
        "tokens_per_parameter": plan.tokens / count.total,
        "compute_optimal_tokens": TOKENS_PER_PARAMETER * count.total,
        "learning_rate": {
            name: {"peak": rate, "first": rate * plan.rate_factor(0),
                   "last": rate * plan.rate_factor(plan.steps - 1)}
            for name, rate in plan.rates.items()
        },
        "timing": None if timed is None else {
            **asdict(timed),
            "tokens_per_second": plan.tokens_per_step / timed.step_seconds,
            "run_seconds": timed.run_seconds(plan),
        },
        "not_timed": timing if isinstance(timing, str) else None,
    }  # fmt: skip


_NOT_PLAIN = (
    "parameters", "memory", "rate_factor", "rates", "process_bytes", "held_bytes", "usable_bytes",
)  # fmt: skip


def _parts(plan: RunPlan) -> dict[str, int]:
    memory = plan.memory
    return {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations": memory.activations,
        "head": memory.head,
        "held": plan.held_bytes,
        "process": plan.process_bytes,
    }


_MEANINGS = {
    "weights": "",
    "gradients": "",
    "optimizer": "what it keeps from step to step",
    "activations": "what the blocks keep for the backward pass",
    "head": "logits, copies of the head's matrix",
    "held": "held by the allocator between what is in use",
    "process": "Python, torch, Lightning, the text",
}


def _labelled(label: str, lines: list[str]) -> Iterator[str]:
    for number, line in enumerate(lines):
        yield f"{label if number == 0 else '':<11} {line}".rstrip()


def _parameter_lines(plan: RunPlan) -> list[str]:
    count = plan.parameters
    head = f"untied head; tied it would be {count.tied:,}"
    if count.total == count.tied:
        head = f"tied head; untied it would be {count.untied:,}"
    lines = [f"{count.total:,} with {'its' if count.total == count.tied else 'an'} {head}"]
    for name, number in count.parts.items():
        lines.append(f"  {name:<19} {number:>13,} {number / count.total:>5.0%}")
    return lines if plan.trained is None else [*lines, plan.trained]


def _memory_lines(plan: RunPlan) -> list[str]:
    each = " each" if plan.devices > 1 else ""
    lines = [
        f"{_size(plan.total_bytes)} at most, on {plan.devices} x {plan.device}{each}: {plan.precision},"
        f" {plan.batch_size:,} x {plan.max_length:,} tokens at a time"
    ]
    for name, number in _parts(plan).items():
        if number or name not in ("held", "process"):
            lines.append(f"  {name:<11} {_size(number):>9}  {_MEANINGS[name]}".rstrip())
    if not plan.memory.gradients_stay:
        lines.append("  gradients come while activations and head go: the larger of the two counts")
    lines.append(_fit_line(plan))
    return lines


def _fit_line(plan: RunPlan) -> str:
    if plan.usable_bytes is None or plan.largest_batch is None:
        return f"whether it fits is not known: {plan.device} does not tell its free memory"
    fits = "it fits" if plan.fits else "IT DOES NOT FIT"
    if plan.largest_batch:
        largest = f"of powers of two {plan.largest_batch:,} x {plan.max_length:,} is the largest that fits"
    else:
        largest = f"not even 1 x {plan.max_length:,} does"
    return f"{fits}: a step may take {_size(plan.usable_bytes)} of what is free; {largest}"


def _step_lines(plan: RunPlan) -> list[str]:
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


def _rate_line(plan: RunPlan) -> str:
    factors = [plan.rate_factor(step) for step in (0, plan.steps - 1)]
    lines = [
        f"{name} {factors[0] * rate:.3g} at first, {rate:g} at most, {factors[1] * rate:.3g} at last"
        for name, rate in plan.rates.items()
    ]
    return "; ".join(lines)


def _time_lines(plan: RunPlan, timing: Timing | str) -> list[str]:
    if isinstance(timing, str):
        return [f"not known: {timing}"]
    seconds = timing.run_seconds(plan)
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
    """Such as "3.2 billion"."""
    for size, word in ((1e9, " billion"), (1e6, " million")):
        if number >= size:
            return f"{number / size:.3g}{word}"
    return f"{number:,.0f}"


def _significant(number: float) -> str:
    """Two digits that count, without an exponent: 0.00057, 3.6, 120."""
    digits = 0 if number >= 10 else 1 - math.floor(math.log10(number))
    return f"{number:,.{digits}f}"


# --- the picture ----------------------------------------------------------------------------------------

MOST_POINTS = 2000


def drawn_steps(steps: int) -> list[int]:
    """Finished steps before each update that is drawn: all of a short run, of a long one evenly spaced."""
    if steps <= MOST_POINTS:
        return list(range(steps))
    return sorted({round(i * (steps - 1) / (MOST_POINTS - 1)) for i in range(MOST_POINTS)})


def rate_curves(
    rates: Mapping[str, float], factor: Callable[[int], float], steps: int
) -> tuple[list[int], dict[str, list[float]]]:
    """The updates that are drawn, counted from 1 as in the logs, and their rates by name of the group."""
    drawn = drawn_steps(steps)
    factors = [factor(step) for step in drawn]
    return [step + 1 for step in drawn], {
        name: [peak * share for share in factors] for name, peak in rates.items()
    }


def rate_figure(
    rates: Mapping[str, float], factor: Callable[[int], float], *, steps: int, steps_per_epoch: int
) -> "Figure":
    """Every group's rate against the optimizer steps, with epochs above."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots()
    updates, curves = rate_curves(rates, factor, steps)
    for name, values in curves.items():
        same = name != "lr" and values == curves.get("lr")  # one would hide the other
        axes.plot(
            updates, values, label=name, linestyle="--" if same else "-", marker="." if steps < 40 else ""
        )
    axes.set_xlabel("Optimizer steps")
    axes.set_ylabel("Learning rate")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.02)
    axes.grid(visible=True, alpha=0.3)
    axes.yaxis.set_major_formatter(lambda rate, _position: f"{rate:g}")

    def to_epochs(updates: Any) -> Any:
        return updates / steps_per_epoch

    def to_updates(epochs: Any) -> Any:
        return epochs * steps_per_epoch

    top = axes.secondary_xaxis("top", functions=(to_epochs, to_updates))
    top.set_xlabel("Epochs")
    if len(curves) > 1:
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle("Learning rate of the run", fontweight="bold")
    return figure
