"""The settings that differ between runs: as axes, and their importance."""

import math
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from gptpl.files.run_record import RunRecord
from gptpl.files.run_settings import Setting
from gptpl.text import count_text, setting_text

if TYPE_CHECKING:  # optuna is imported where it is used
    from optuna.distributions import BaseDistribution


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A setting, or what the runs reached.

    Attributes:
        together: names of settings that always change with this one, so that their effects cannot be told
            apart.
        values: one for each run.
        numeric: whether all values are numbers.
    """

    name: str
    together: Sequence[str] = ()
    values: Sequence[Setting | None]
    numeric: bool = True

    @property
    def title(self) -> str:
        """The name, and the number of other settings that it stands for."""
        return f"{self.name} (+{len(self.together)})" if self.together else self.name

    @property
    def logarithmic(self) -> bool:
        """Whether the values are positive and span a factor of ten."""
        numbers = self.numbers()
        return bool(numbers) and min(numbers) > 0 and max(numbers) >= 10 * min(numbers)

    @property
    def labels(self) -> list[str]:
        """The different values as texts, in the order of the first runs that have them."""
        return list(dict.fromkeys(map(setting_text, self.values)))

    def numbers(self) -> list[float]:
        """One for each run; empty unless all values are numbers."""
        return [float(value) for value in self.values if value is not None] if self.numeric else []

    def places(self) -> list[float]:
        """The place of each run on the axis, from 0 to 1."""
        if not self.numeric:
            labels = self.labels
            return [labels.index(setting_text(value)) / max(len(labels) - 1, 1) for value in self.values]
        numbers = [math.log(value) for value in self.numbers()] if self.logarithmic else self.numbers()
        low, high = min(numbers), max(numbers)
        return [(value - low) / ((high - low) or 1) for value in numbers]


def axes(names: Sequence[str], runs: Sequence[RunRecord]) -> list[Axis]:
    """An axis for each setting that differs between these runs; those that always change together share one.

    Two settings change together if they are equal in the same runs, and each value occurs twice or more on
    average: values drawn independently for each run all differ, which proves nothing.
    """
    made: dict[tuple[int, ...], Axis] = {}
    for name in names:
        values = [run.settings.get(name) for run in runs]
        different = list(dict.fromkeys(map(repr, values)))
        if len(different) < 2:
            continue
        pattern = tuple(different.index(repr(value)) for value in values)
        if len(runs) < 2 * len(different):
            pattern = (-len(made) - 1,)  # of its own
        if pattern in made:
            made[pattern] = replace(made[pattern], together=[*made[pattern].together, name])
        else:
            made[pattern] = Axis(name=name, values=values, numeric=all(map(_is_number, values)))
    return list(made.values())


def _is_number(value: Setting | None) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# --- importance -----------------------------------------------------------------------------------------

FEWEST_RUNS = 10
"""With fewer, half of the runs are too few to show a pattern."""
GOOD = 0.5
"""The fraction of runs that count as good.

In synthetic runs, 10 to 80 of them, the decisive setting came out first more often than with a tenth, a
quarter or a third.
"""
SHUFFLES = 19
"""A setting exceeds its weight with shuffled losses every time by chance in one of 20 cases."""


class Importance(NamedTuple):
    """Shares that add up to 1, largest first; `note` says how reliable they are, or why there are none."""

    shares: Sequence[tuple[Axis, float]]
    note: str


def importance(axes: Sequence[Axis], losses: Sequence[float]) -> Importance:
    """How much the distribution of a setting in the best runs differs from that in all runs.

    By PED-ANOVA (Watanabe et al., IJCAI 2023, arXiv 2304.10255). `losses` has a finite value for each run,
    lower is better.
    """
    weighed = [axis for axis in axes if axis.numeric or len(axis.labels) < len(losses)]
    if not weighed:
        return Importance([], "The finished runs differ in no setting that could be weighed.")
    if len(losses) < FEWEST_RUNS:
        runs = count_text(len(losses), "finished run")
        return Importance([], f"Too few runs to weigh settings: {runs} of at least {FEWEST_RUNS}.")
    found = _weights(weighed, losses)
    total = sum(found.values())
    if total <= 0:
        return Importance([], "No setting stands out in the better half of the runs.")
    shares = sorted(((axis, found[axis.name] / total) for axis in weighed), key=lambda pair: -pair[1])
    rng = random.Random(0)
    clear = set(found)
    for _ in range(SHUFFLES):
        by_chance = _weights(weighed, rng.sample(losses, len(losses)))
        clear = {name for name in clear if found[name] > by_chance[name]}
    names = [axis.name for axis, _ in shares if axis.name in clear]
    note = (
        f"From {len(losses)} finished runs: how far the values in their better half differ from those in all."
        f" More than by chance (more than in any of {SHUFFLES} shufflings of the losses):"
        f" {', '.join(names) or 'none, so do not read anything into this order'}."
    )
    return Importance(shares, note)


def _weights(axes: Sequence[Axis], losses: Sequence[float]) -> Mapping[str, float]:
    import optuna
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # Losses that tie: no setting stands out, which is what the result says, too.
            warnings.filterwarnings("ignore", message="Target and region quantiles select the same set")
            study = optuna.create_study(direction="minimize")
            distributions = {axis.name: _distribution(axis) for axis in axes}
            columns: dict[str, list[float] | list[str]] = {
                axis.name: axis.numbers() or [setting_text(value) for value in axis.values] for axis in axes
            }
            for place, loss in enumerate(losses):
                params = {name: values[place] for name, values in columns.items()}
                study.add_trial(optuna.create_trial(params=params, distributions=distributions, value=loss))
            evaluator = PedAnovaImportanceEvaluator(target_quantile=GOOD)
            return get_param_importances(study, evaluator=evaluator, normalize=False)
    finally:
        optuna.logging.set_verbosity(verbosity)


def _distribution(axis: Axis) -> "BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if axis.numeric:
        return FloatDistribution(min(axis.numbers()), max(axis.numbers()), log=axis.logarithmic)
    return CategoricalDistribution(axis.labels)
