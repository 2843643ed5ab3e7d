"""`gptpl find-lr`: the learning-rate range test (Smith 2017) on a run's own model, text and optimizer."""

# Not Lightning's `Tuner.lr_find`: it gives all parameter groups one rate, where Muon and AdamW have two; its
# slope is per unit of the rate, not of its logarithm, which favours the smallest rates; and it writes a
# checkpoint of the whole model into the run's folder to undo what this command need not undo.

import csv
import math
from functools import partial
from pathlib import Path

from omegaconf import DictConfig
from tqdm import tqdm

from gptpl.callbacks.loss_figure import figure_pixels, write_png
from gptpl.callbacks.loss_of_steps import LossOfSteps, SeenEnough
from gptpl.cli.build import Settled, settle
from gptpl.cli.console import RunLog
from gptpl.cli.finder_figures import rate_range_figure
from gptpl.cli.hydra_app import run_under_hydra
from gptpl.cli.own_settings import OwnSettings
from gptpl.cli.plan_numbers import peak_rates
from gptpl.cli.settled_memory import check_fits
from gptpl.cli.short_training import check_one_device, train_a_little, trial_module
from gptpl.errors import InputError
from gptpl.training.non_finite import NonFiniteError
from gptpl.training.rate_range import RangeResult, ramp_rate, range_result

KEYS = ("min_lr", "max_lr", "steps", "output")
NAME = "lr_finder"
TABLE_ROWS = 12


def run(arguments: list[str]) -> int:
    """Prints a table and the suggestion, writes plot and numbers; returns the exit status."""
    own = OwnSettings("find-lr", arguments, prefix="find", keys=KEYS)
    folder = own.folder("output")
    min_lr, max_lr = own.positive("min_lr", 1e-6), own.positive("max_lr", 1.0)
    if min_lr >= max_lr:
        raise InputError(f"find.min_lr={min_lr:g} is not below find.max_lr={max_lr:g}: give a smaller one")
    steps = own.whole("steps", 100, least=10)
    assert steps is not None

    def task(cfg: DictConfig) -> None:
        with RunLog():
            settled = settle(cfg)
            check_one_device(settled, "find-lr")
            check_fits(settled)
            rates = [ramp_rate(step, min_lr=min_lr, max_lr=max_lr, steps=steps) for step in range(steps)]
            losses = ramp_losses(settled, rates)
        done = rates[: len(losses)]
        result = range_result(done, losses, steps=steps)
        folder.mkdir(parents=True, exist_ok=True)
        _write_csv(folder / f"{NAME}.csv", done, losses, result)
        figure = rate_range_figure(done, losses, result)
        write_png(figure_pixels(figure), folder / f"{NAME}.png")
        print("\n".join(_lines(settled, done, losses, result, folder)))

    run_under_hydra("train", own.overrides, task)
    return 0


def ramp_losses(settled: Settled, rates: list[float]) -> list[float]:
    """The loss of each step, before its update with that rate; ends where it diverges or is no number.

    The rates are `optimizer.lr`'s; all groups' rates grow together.
    """
    module = trial_module(settled, settled.weights)
    peak = float(settled.cfg.optimizer.lr)
    module.lr_factor = lambda step: rates[min(step, len(rates) - 1)] / peak
    with tqdm(total=len(rates), unit="step", desc="raising the rate", disable=None) as bar:
        kept = LossOfSteps(len(rates), partial(bar.update, 1))
        try:
            train_a_little(settled, module, steps=len(rates) + 1, callbacks=[kept])  # it ends before
        except SeenEnough:
            pass
        except NonFiniteError:  # which stops a run before the weights are touched
            kept.losses.append(math.nan)
    return kept.losses


def _write_csv(path: Path, rates: list[float], losses: list[float], result: RangeResult) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "lr", "loss", "smoothed_loss"])
        for step, row in enumerate(zip(rates, losses, result.smoothed, strict=True), start=1):
            writer.writerow([step, *row])
    temporary.replace(path)


def _lines(
    settled: Settled, rates: list[float], losses: list[float], result: RangeResult, folder: Path
) -> list[str]:
    lines = ["  lr        loss   smoothed"]
    every = max(1, math.ceil(len(rates) / TABLE_ROWS))
    shown = sorted({*range(0, len(rates), every), len(rates) - 1})
    for i in shown:
        lines.append(f"  {rates[i]:<8.2g} {losses[i]:>6.3f}   {result.smoothed[i]:>6.3f}")
    if result.diverges is None:
        lines.append(f"diverges    not up to {rates[-1]:.2g}")
    else:
        lines.append(f"diverges    at {result.diverges:.2g}")
    if result.suggested is None:
        lines.append("suggestion  none: the loss never falls; try other rates, or more find.steps")
    else:
        scale = result.suggested / float(settled.cfg.optimizer.lr)
        overrides = " ".join(
            f"optimizer.{_setting(name)}={rate * scale:.2g}" for name, rate in peak_rates(settled).items()
        )
        lines.append(f"suggestion  {overrides}  (where the loss falls fastest)")
    return [*lines, f"written     {folder / NAME}.png, .csv"]


def _setting(name: str) -> str:
    """The setting of a group's rate: `lr` is that of "lr", `muon_lr` of "lr/muon"."""
    _, _, part = name.partition("/")
    return f"{part}_lr" if part else "lr"
