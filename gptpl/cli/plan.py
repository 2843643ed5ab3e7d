"""`gptpl plan`: what a run would be and cost, without training it."""

import json
import logging
import statistics
from pathlib import Path

import torch
from omegaconf import DictConfig

from gptpl.callbacks.loss_figure import figure_pixels, write_png
from gptpl.callbacks.step_timer import StepTimer
from gptpl.cli.build import Settled, settle
from gptpl.cli.console import RunLog
from gptpl.cli.hydra_app import run_under_hydra
from gptpl.cli.own_settings import OwnSettings
from gptpl.cli.plan_figure import rate_figure
from gptpl.cli.plan_numbers import RunPlan, flops_per_token, plan_of
from gptpl.cli.plan_report import Timing, plan_lines, plan_record
from gptpl.cli.short_training import train_a_little, trial_module
from gptpl.cli.trainer import choose
from gptpl.training.flops import peak_flops
from gptpl.training.non_finite import NonFiniteError
from gptpl.training.precision import product_dtype
from gptpl.weights.starting import RandomWeights

log = logging.getLogger(__name__)

DEFAULT_STEPS = 3
CHEAP_SECONDS = 60
"""Steps are timed without being asked for where that takes about so long at most."""
REACHED_SHARE = 0.4
"""Of the device's rate, for a first guess of what timing takes."""
FORWARD_SHARE = 1 / 3
"""Of a training step's arithmetic: what an evaluation of as many tokens needs."""
KEYS = ("output", "timed_steps")


def run(arguments: list[str]) -> int:
    """Prints the plan to standard output and draws the learning rate; returns the exit status."""
    as_json = "--json" in arguments
    own = OwnSettings("plan", [a for a in arguments if a != "--json"], prefix="plan", keys=KEYS)
    picture = own.file("output", "learning_rate.png")
    timed_steps = own.whole("timed_steps", None, least=0)

    def task(cfg: DictConfig) -> None:
        with RunLog():
            logging.getLogger().setLevel(logging.WARNING)  # the plan says what the log of a run would
            settled = settle(cfg)
            plan = plan_of(settled)
            timing = _timed(settled, plan, timed_steps)
            figure = rate_figure(
                plan.rates, plan.rate_factor, steps=plan.steps, steps_per_epoch=plan.steps_per_epoch
            )
            write_png(figure_pixels(figure), picture)
        _show(settled, plan, timing, picture, as_json=as_json)

    run_under_hydra("train", own.overrides, task)
    return 0


def _show(settled: Settled, plan: RunPlan, timing: Timing | str, picture: Path, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(plan_record(plan, timing, picture), indent=2))
        return
    data = settled.datamodule
    about = f"{data.name}, {data.tokenizer.name} tokenizer: {plan.train_tokens:,} training tokens"
    print("\n".join(plan_lines(plan, timing, picture, about)))


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
