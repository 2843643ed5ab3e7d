"""What a server has done: metrics for Prometheus, a series for the page, and whether its outputs drift."""

import logging
import math
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from gptpl.errors import InputError
from gptpl.evaluation.statistics import repetition_rate
from gptpl.filters import Verdict

log = logging.getLogger(__name__)

INTERVAL = 5.0  # seconds of a point in the series
POINTS = 720  # an hour
MIN_TOKENS = 8  # of an output that says something about drift
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


@dataclass(frozen=True, kw_only=True)
class Load:
    """How busy a model's engine is: requests that wait, rows that are written, used part of the cache."""

    queued: int
    running: int
    cache_use: float


class Monitor:
    """Counts what happens, in the thread of the event loop; `loads` tells how busy each model is.

    `learned` is called when a `Drift` has its reference.

    `metrics` is Prometheus' text, `data` the series of the last hour.
    """

    def __init__(
        self,
        loads: Mapping[str, Callable[[], Load]],
        *,
        drift: "dict[str, Drift]",
        learned: Callable[[], None],
    ) -> None:
        self._loads, self.drift, self._learned = loads, drift, learned
        self.started = time.time()
        self._points: deque[dict[str, Any]] = deque(maxlen=POINTS)
        self._totals = dict.fromkeys(("requests", "tokens", "errors", "filtered", "rejected"), 0)
        self._counts: dict[str, int] = defaultdict(int)
        """Of the next point of the series, as are `_values`."""
        self._values: dict[str, list[float]] = defaultdict(list)
        self._registry = CollectorRegistry()
        counter = partial(Counter, namespace="gptpl", registry=self._registry)
        gauge = partial(Gauge, namespace="gptpl", registry=self._registry)
        of_model = ["model"]
        histogram = partial(
            Histogram, labelnames=of_model, namespace="gptpl", registry=self._registry, buckets=_SECONDS
        )
        self._requests = counter("requests", "Requests that were answered", ["model", "endpoint", "status"])
        self._prompt_tokens = counter("prompt_tokens", "Tokens of prompts", of_model)
        self._shared_tokens = counter("shared_prompt_tokens", "Of them, known from earlier texts", of_model)
        self._tokens = counter("generated_tokens", "Tokens that were written", of_model)
        self._verdicts = counter("filter_findings", "Findings of the filter", ["model", "where", "rule"])
        self._rejected = counter("rejected_requests", "Requests that were refused", ["reason"])
        self._first_token = histogram("time_to_first_token_seconds", "From request to first token")
        self._between_tokens = histogram("time_between_tokens_seconds", "Between tokens of a text")
        self._seconds = histogram("request_seconds", "From a POST request to the end of its answer")
        self._queued = gauge("queued_requests", "Requests that wait for a place", of_model)
        self._running = gauge("running_rows", "Texts that are written", of_model)
        self._cache_use = gauge("cache_use_ratio", "Used part of the cache", of_model)
        self._alarm = gauge("drift_alarm", "1 while outputs differ from the first ones", of_model)
        self._recent = gauge("output_recent", "Mean of recent outputs", ["model", "measure"])

    # --- what happens ---------------------------------------------------------------------------------------

    def answered(self, model: str, endpoint: str, status: int, seconds: float) -> None:
        """A request has ended with this status."""
        self._requests.labels(model, endpoint, str(status)).inc()
        self._seconds.labels(model).observe(seconds)
        self._count("requests", 1)
        self._count("errors", status >= 500)

    def rejected(self, reason: str) -> None:
        """A request was refused: no place, no key, too large."""
        self._rejected.labels(reason).inc()
        self._count("rejected", 1)

    def prompt(self, model: str, tokens: int, shared: int) -> None:
        """A prompt has been read."""
        self._prompt_tokens.labels(model).inc(tokens)
        self._shared_tokens.labels(model).inc(shared)

    def tokens(self, model: str, number: int, seconds: float, *, first: bool) -> None:
        """So many tokens came, so long after the request (the first ones) or after those before."""
        self._tokens.labels(model).inc(number)
        self._count("tokens", number)
        (self._first_token if first else self._between_tokens).labels(model).observe(seconds)
        self._values["first_token" if first else "between_tokens"].append(seconds)

    def verdict(self, model: str, verdict: Verdict, *, where: Literal["prompt", "text"]) -> None:
        """A filter has judged a prompt or a text."""
        for rule, number in verdict.counts.items():
            self._verdicts.labels(model, where, rule).inc(number)
        self._count("filtered", bool(verdict.findings))

    def output(self, model: str, tokens: Sequence[int], log_probabilities: Sequence[float]) -> None:
        """A text has been written, of these tokens."""
        if len(log_probabilities) < MIN_TOKENS:
            return
        mean, repetition = statistics.fmean(log_probabilities), repetition_rate([tokens])
        self._values["log_probability"].append(mean)
        self._values["repetition"].append(repetition)
        if (drift := self.drift.get(model)) is not None:
            before = drift.state
            drift.add(log_probability=mean, repetition=repetition)
            if drift.outputs == drift.reference:
                self._learned()
            if drift.state == "alarm" != before:
                log.warning("the outputs of %s have changed: %s", model, drift.measured)

    def _count(self, name: str, number: int) -> None:
        self._counts[name] += number
        self._totals[name] += number

    def tick(self) -> None:
        """Close a point of the series; to be called every `INTERVAL` seconds."""
        loads = self.loads().values()
        self._points.append(
            {
                "time": time.time(),
                **{name: self._counts[name] for name in ("requests", "tokens", "errors", "filtered")},
                "queued": sum(load.queued for load in loads),
                "running": sum(load.running for load in loads),
                "cache_use": max(load.cache_use for load in loads),
                "first_token_ms": _percentiles(self._values["first_token"]),
                "between_tokens_ms": _percentiles(self._values["between_tokens"]),
                **{name: _mean(self._values[name]) for name in Drift.MEASURES},
            }
        )
        self._counts.clear()
        self._values.clear()

    # --- what is told ---------------------------------------------------------------------------------------

    def loads(self) -> dict[str, Load]:
        """How busy each model is now."""
        return {model: load() for model, load in self._loads.items()}

    def metrics(self) -> bytes:
        """All metrics, in Prometheus' text format."""
        for model, load in self.loads().items():
            self._queued.labels(model).set(load.queued)
            self._running.labels(model).set(load.running)
            self._cache_use.labels(model).set(load.cache_use)
        for model, drift in self.drift.items():
            self._alarm.labels(model).set(drift.state == "alarm")
            for measure in Drift.MEASURES:
                self._recent.labels(model, measure).set(drift.recent(measure))
        return generate_latest(self._registry)

    def data(self) -> dict[str, Any]:
        """The series of the last hour, totals and drift, as plain data for JSON."""
        drifts = [{"model": model, **each.record()} for model, each in self.drift.items()]
        return {
            "interval_s": INTERVAL,
            "started": self.started,
            "models": list(self._loads),
            "points": list(self._points),
            "totals": dict(self._totals),
            "drift": max(drifts, key=lambda each: _STATES.index(each["state"]), default=None),
        }


def _percentiles(seconds: Sequence[float]) -> list[float] | None:
    """The median and the 95th percentile, in milliseconds."""
    if not seconds:
        return None
    return [round(1000 * float(each), 1) for each in np.percentile(seconds, (50, 95))]


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


# --- drift ----------------------------------------------------------------------------------------------

State = Literal["learning", "steady", "alarm"]
_STATES = get_args(State)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A measure's mean over the first and over the recent outputs, so many standard errors apart."""

    reference: float
    recent: float
    deviation: float
    threshold: float


class Drift:
    """Whether a model's outputs are still like the first ones: how likely they are to it, and how repetitive.

    The first `reference` outputs are what is compared with; the alarm is on while the mean of the last
    `window` outputs is more than `threshold` standard errors from theirs. Other prompts or other sampling
    settings change outputs, too: the alarm says to look, not why.

    Args:
        reference: number of outputs to learn from, at least 2.
        window: number of recent outputs, at least 2.
        threshold: 0 or above. Measures are skewed, and each output closes another window: 4 gave a false
            alarm in every sixth 1,000 outputs, see experiments/monitoring.
    """

    MEASURES = ("log_probability", "repetition")

    def __init__(self, *, reference: int = 200, window: int = 50, threshold: float = 6.0) -> None:
        for name, number in {"reference": reference, "window": window}.items():
            if number < 2:
                raise InputError(f"{name} must be at least 2, got {number}")
        if not 0 <= threshold < math.inf:
            raise InputError(f"threshold must be 0 or a positive number, got {threshold}")
        self.reference, self.window, self.threshold = reference, window, threshold
        self.first: dict[str, list[float]] = {name: [] for name in self.MEASURES}
        """The first outputs by measure, for another `Drift` to be compared with."""
        self._recent: dict[str, deque[float]] = {name: deque(maxlen=window) for name in self.MEASURES}
        self.measured: dict[str, Measured] = {}
        """The comparison of each measure at the last output, once there are enough."""
        self.outputs = 0

    def restore(self, first: dict[str, list[float]]) -> None:
        """Compare with the first outputs of another. Raises InputError for other than those of `first`."""
        if first.keys() != self.first.keys() or not all(
            len(values) == self.reference and all(map(math.isfinite, values)) for values in first.values()
        ):
            raise InputError(f"{self.reference} outputs are wanted, of which it has other numbers")
        self.first = first
        self.outputs = self.reference

    def add(self, *, log_probability: float, repetition: float) -> None:
        """An output's mean log-probability per token, in nats, and its share of repeated 4-grams."""
        self.outputs += 1
        for name, value in {"log_probability": log_probability, "repetition": repetition}.items():
            if len(self.first[name]) < self.reference:
                self.first[name].append(value)
            else:
                self._recent[name].append(value)
        if self.outputs >= self.reference + self.window:
            self.measured = {name: self._compared(name) for name in self.MEASURES}

    @property
    def state(self) -> State:
        """Whether it is still learning, or what the comparison says."""
        if not self.measured:
            return "learning"
        apart = (abs(each.deviation) > each.threshold for each in self.measured.values())
        return "alarm" if any(apart) else "steady"

    def recent(self, name: str) -> float:
        """The mean of the recent outputs; while it learns of all, NaN without any."""
        values = self._recent[name] or self.first[name]
        return statistics.fmean(values) if values else math.nan

    def _compared(self, name: str) -> Measured:
        first, recent = self.first[name], self._recent[name]
        reference, now = statistics.fmean(first), statistics.fmean(recent)
        # Welch's: each has a variance of its own. Where all outputs are equal any change is infinite.
        spread = math.sqrt(
            statistics.variance(first) / len(first) + statistics.variance(recent) / len(recent)
        )
        apart = now - reference
        deviation = apart / spread if spread else (math.copysign(math.inf, apart) if apart else 0.0)
        return Measured(reference=reference, recent=now, deviation=deviation, threshold=self.threshold)

    def record(self) -> dict[str, Any]:
        """Plain data for JSON; an infinite deviation is None."""
        measures = {name: asdict(each) for name, each in self.measured.items()}
        for each in measures.values():
            each["deviation"] = each["deviation"] if math.isfinite(each["deviation"]) else None
        return {
            "state": self.state,
            "outputs": self.outputs,
            "needed": self.reference + self.window,
            "reference": self.reference,
            "measures": measures,
        }
