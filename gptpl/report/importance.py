"""How much of the difference between good runs and the others goes with each setting."""

import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptpl.report.amounts import setting_text
from gptpl.report.axes import Axis

if TYPE_CHECKING:  # optuna is imported where it is used
    from optuna.distributions import BaseDistribution

FEWEST_RUNS = 10
"""Below, half of the runs are too few to show a pattern."""
GOOD = 0.5
"""The share of runs that are the good ones.

In synthetic runs, 10 to 80 of them, the setting that decided came out first more often than with a tenth, a
quarter or a third.
"""
SHUFFLES = 19
"""A setting that weighs more than with shuffled losses, every time, does so by chance once in 20 times."""


@dataclass(frozen=True, kw_only=True)
class Importance:
    """Shares that add up to 1, largest first; `note` says what they are worth, or why there are none."""

    shares: Sequence[tuple[Axis, float]]
    note: str


def importance(axes: Sequence[Axis], losses: Sequence[float]) -> Importance:
    """How much the values of a setting in the best runs are distributed otherwise than in all.

    By PED-ANOVA (Watanabe et al., IJCAI 2023, arXiv 2304.10255).

    Args:
        axes: settings with a value for each run.
        losses: one a run, finite, lower is better.
    """
    weighed = [axis for axis in axes if axis.numeric or len(axis.labels) < len(losses)]
    if not weighed:
        return Importance(shares=[], note="The finished runs differ in no setting that could be weighed.")
    if len(losses) < FEWEST_RUNS:
        runs = f"{len(losses)} finished run{'' if len(losses) == 1 else 's'}"
        return Importance(
            shares=[],
            note=f"Too few runs to weigh settings: {runs} of at least {FEWEST_RUNS}.",
        )
    found = _weights(weighed, losses)
    total = sum(found.values())
    if total <= 0:
        return Importance(shares=[], note="No setting stands out in the better half of the runs.")
    shares = sorted(((axis, found[axis.name] / total) for axis in weighed), key=lambda pair: -pair[1])
    clear = _beyond_chance(weighed, losses, found)
    names = [axis.name for axis, _ in shares if axis.name in clear]
    note = (
        f"From {len(losses)} finished runs: how far the values in their better half differ from those in all."
        f" More than by chance (more than in any of {SHUFFLES} shufflings of the losses):"
        f" {', '.join(names) or 'none, so do not read anything into this order'}."
    )
    return Importance(shares=shares, note=note)


def _beyond_chance(axes: Sequence[Axis], losses: Sequence[float], found: Mapping[str, float]) -> set[str]:
    """Names of the settings whose weight no shuffling of the losses reaches."""
    rng = random.Random(0)
    clear = set(found)
    for _ in range(SHUFFLES):
        weights = _weights(axes, rng.sample(losses, len(losses)))
        clear = {name for name in clear if found[name] > weights[name]}
    return clear


def _weights(axes: Sequence[Axis], losses: Sequence[float]) -> dict[str, float]:
    import optuna
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # Of losses that tie: no setting stands out, which is what the result says, too.
            warnings.filterwarnings("ignore", message="Target and region quantiles select the same set")
            study = optuna.create_study(direction="minimize")
            distributions = {axis.name: _distribution(axis) for axis in axes}
            columns: dict[str, list[float] | list[str]] = {
                axis.name: axis.numbers() or [setting_text(value) for value in axis.values] for axis in axes
            }
            for place, loss in enumerate(losses):
                params = {name: values[place] for name, values in columns.items()}
                trial = optuna.create_trial(params=params, distributions=distributions, value=loss)
                study.add_trial(trial)
            evaluator = PedAnovaImportanceEvaluator(target_quantile=GOOD)
            return get_param_importances(study, evaluator=evaluator, normalize=False)
    finally:
        optuna.logging.set_verbosity(verbosity)


def _distribution(axis: Axis) -> "BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if axis.numeric:
        return FloatDistribution(min(axis.numbers()), max(axis.numbers()), log=axis.logarithmic)
    return CategoricalDistribution(axis.labels)
