"""A schedule: a class with a `factor`."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Sawtooth:
    """Straight down to `low` of the peak, and up again at once, every `period` optimizer steps."""

    period: int = 5
    low: float = 0.2

    def factor(self, step: int, *, total_steps: int, peak_lr: float) -> float:
        done = step % self.period / self.period
        return 1.0 - (1.0 - self.low) * done
