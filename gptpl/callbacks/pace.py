"""How long a training will still take."""

import time
from collections.abc import Callable


class Pace:
    """Times the steps of one session of training, which starts when this is made.

    The first step is left out of the pace: it may compile the model and fill caches. Whatever happens between
    the other steps, such as evaluations, counts.

    Args:
        step: optimizer steps done before the session.
        clock: seconds from any fixed moment.
    """

    def __init__(self, step: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started_at = clock()
        self._session_start = step
        self._first: tuple[int, float] | None = None  # the first step of the session, and when it was done

    def reach(self, step: int) -> None:
        """Tell that `step` is done; to be called at every step."""
        if self._first is None and step > self._session_start:
            self._first = (step, self._clock())

    def seconds_left(self, step: int, *, total: int) -> float | None:
        """Time from `step` to `total` at the mean pace so far; None while the pace is not known."""
        if self._first is None or step <= self._first[0]:
            return None
        first_step, first_at = self._first
        return max(total - step, 0) * (self._clock() - first_at) / (step - first_step)

    def seconds_taken(self) -> float:
        """Time since the session started."""
        return self._clock() - self._started_at
