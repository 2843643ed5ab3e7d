"""Settings that differ between runs, as axes of a picture and as parameters to weigh."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gptpl.records.run_record import RunRecord
from gptpl.records.settings import Setting
from gptpl.report.amounts import digits, setting_text


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A setting, with those that always change together with it.

    Attributes:
        name: of the setting.
        together: names of the others, whose effect cannot be told from its own.
        values: one a run.
        numeric: whether all values are numbers.
        measured: whether the values are no setting but what came of it: shown with four digits, never
            logarithmic.
    """

    name: str
    together: Sequence[str]
    values: Sequence[Setting | None]
    numeric: bool
    measured: bool = False

    @property
    def title(self) -> str:
        """The name, and how many others it stands for."""
        return f"{self.name} (+{len(self.together)})" if self.together else self.name

    @property
    def logarithmic(self) -> bool:
        """Whether the values are positive and span a factor of ten."""
        numbers = self.numbers()
        return bool(numbers) and not self.measured and min(numbers) > 0 and max(numbers) >= 10 * min(numbers)

    @property
    def labels(self) -> list[str]:
        """The different values as texts, in the order of the first runs that have them."""
        return list(dict.fromkeys(setting_text(value) for value in self.values))

    def text(self, value: Setting | None) -> str:
        """A value as it is shown."""
        return digits(float(value)) if self.measured and value is not None else setting_text(value)

    def numbers(self) -> list[float]:
        """One a run; none at all where not all values are numbers."""
        return [float(value) for value in self.values if value is not None] if self.numeric else []

    def places(self) -> list[float]:
        """Where each run is on the axis, from 0 to 1."""
        if not self.numeric:
            labels = self.labels
            return [labels.index(setting_text(value)) / max(len(labels) - 1, 1) for value in self.values]
        numbers = [math.log(value) for value in self.numbers()] if self.logarithmic else self.numbers()
        low, high = min(numbers), max(numbers)
        return [(value - low) / ((high - low) or 1) for value in numbers]


def axes(names: Sequence[str], runs: Sequence[RunRecord]) -> list[Axis]:
    """One a setting that differs between these runs; those that always change together are one.

    Together change what is the same in the same runs. This is taken for no accident where each value comes
    twice or more on average: of values that are drawn anew for each run, each differs from run to run.
    """
    made: dict[tuple[int, ...], Axis] = {}
    for name in names:
        values = [run.settings.get(name) for run in runs]
        different = list(dict.fromkeys(map(repr, values)))
        if len(different) < 2:
            continue
        pattern = tuple(different.index(repr(value)) for value in values)
        repeated = len(runs) >= 2 * len(different)
        if repeated and pattern in made:
            first = made[pattern]
            made[pattern] = Axis(
                name=first.name,
                together=[*first.together, name],
                values=first.values,
                numeric=first.numeric,
            )
            continue
        key = pattern if repeated else (-len(made) - 1,)
        made[key] = Axis(name=name, together=[], values=values, numeric=all(map(_is_number, values)))
    return list(made.values())


def _is_number(value: Setting | None) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
