"""A sweep's search space, and its state: trials, who runs them, and results, kept in an Optuna study.

The study is an SQLite file, so that a sweep can be stopped, continued, and worked on by several processes.
Optuna is used directly: hydra-optuna-sweeper 1.3 needs Optuna 2, and ends a sweep with its first failed
trial. Optuna's heartbeat needs `study.optimize`; here a worker shows that it is alive by a locked file, which
the system unlocks however the worker ends.
"""

import itertools
import math
import os
import socket
import uuid
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import optuna
from filelock import FileLock, Timeout
from optuna import Trial
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from gptpl.errors import InputError
from gptpl.files.run_record import LOSS, Mode
from gptpl.runs.listing import STUDY_FILE, WORKERS
from gptpl.sweeps.jobs import is_alive

_BUSY_SECONDS = 120
"""How long to wait for another process that writes to the file."""
_FOLDER, _WORKER, _PROCESS = "folder", "worker", "process"
_ERROR, _RETRY_OF, _INTERRUPTED = "error", "retry_of", "interrupted"

STORAGE_ERRORS = (optuna.exceptions.StorageInternalError, SQLAlchemyError)
"""Optuna's exceptions if its file cannot be read or written."""

Sampler = Literal["grid", "random", "tpe"]
Pruner = Literal["none", "median", "hyperband"]
State = Literal["finished", "pruned", "failed", "interrupted", "running", "waiting"]


# --- the settings that vary -----------------------------------------------------------------------------

Dimension = CategoricalDistribution | FloatDistribution | IntDistribution
"""The values of a list as they are written in an override, or numbers from `low` to `high`, both included."""
SearchSpace = Mapping[str, Dimension]
"""Dimensions by the keys of their settings."""


def values(name: str, given: Sequence[str]) -> CategoricalDistribution:
    """A list of values. Raises InputError if it has a value twice."""
    if twice := next((value for value in given if given.count(value) > 1), None):
        raise InputError(f"{name}={','.join(given)} has {twice} twice: leave one out")
    return CategoricalDistribution(tuple(given))


def interval(name: str, low: float, high: float, *, log: bool = False) -> FloatDistribution | IntDistribution:
    """An interval, of integers if both ends are integers; `log`: uniform on a logarithmic scale.

    Raises InputError for an empty one, and for a logarithmic one that does not begin above 0.
    """
    if not -math.inf < low < high < math.inf:
        raise InputError(f"{name}=interval({low}, {high}) must have LOW < HIGH")
    if log and low <= 0:
        raise InputError(f"{name}=interval({low}, {high}) is logarithmic and must begin above 0")
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=log)
    return FloatDistribution(low, high, log=log)


def drawn(trial: Trial, name: str, dimension: Dimension) -> object:
    """A trial's value; the same one if the trial is asked again."""
    if isinstance(dimension, CategoricalDistribution):
        return trial.suggest_categorical(name, dimension.choices)
    if isinstance(dimension, IntDistribution):
        return trial.suggest_int(name, dimension.low, dimension.high, log=dimension.log)
    return trial.suggest_float(name, dimension.low, dimension.high, log=dimension.log)


def as_text(dimension: Dimension) -> str:
    """The dimension as it would be given on the command line."""
    if isinstance(dimension, CategoricalDistribution):
        return ",".join(map(str, dimension.choices))
    text = f"interval({dimension.low}, {dimension.high})"
    text = f"int({text})" if isinstance(dimension, IntDistribution) else text
    return f"tag(log, {text})" if dimension.log else text


def combinations(space: SearchSpace) -> list[dict[str, str]]:
    """Every combination of the values, the last setting changing fastest.

    Raises InputError for an interval, whose values cannot be listed.
    """
    for name, dimension in space.items():
        if not isinstance(dimension, CategoricalDistribution):
            raise InputError(
                f"{name}={as_text(dimension)} is an interval: give a list of values, such as {name}=1,2, or"
                " draw from it with sweep=tpe or sweep=random"
            )
    every = itertools.product(*map(_extremes, space.values()))
    return [dict(zip(space, chosen, strict=True)) for chosen in every]


def one_at_a_time(space: SearchSpace) -> list[dict[str, str]]:
    """Each value of each setting once (of an interval its ends), the other settings at their first."""
    first = {name: _extremes(dimension)[0] for name, dimension in space.items()}
    return [first] + [
        first | {name: value} for name, dimension in space.items() for value in _extremes(dimension)[1:]
    ]


def _extremes(dimension: Dimension) -> list[str]:
    """The values of a list, or the ends of an interval: if these are valid, all are."""
    if isinstance(dimension, CategoricalDistribution):
        return [str(choice) for choice in dimension.choices]
    return [str(dimension.low), str(dimension.high)]


def overrides(settings: Mapping[str, object]) -> tuple[str, ...]:
    """`key=value` for each."""
    return tuple(f"{name}={value}" for name, value in settings.items())


# --- the study ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Search:
    """How trials are chosen (`n_trials` None: all of a grid), and the metric by which they are compared.

    `tpe` is Optuna's tree-structured Parzen estimator; `pruner` decides which trials to stop early.
    """

    sampler: Sampler
    n_trials: int | None
    pruner: Pruner
    seed: int
    metric: str = LOSS
    mode: Mode = "min"

    def __post_init__(self) -> None:
        for key, kind in (("sampler", Sampler), ("pruner", Pruner), ("mode", Mode)):
            if getattr(self, key) not in get_args(kind):
                known = ", ".join(get_args(kind))
                raise InputError(f"sweep.{key} must be one of {known}, got {getattr(self, key)}")
        if self.seed < 0:
            raise InputError(f"sweep.seed must be 0 or more, got {self.seed}")
        if self.sampler != "grid" and (self.n_trials or 0) < 1:
            raise InputError(f"sweep.n_trials must be 1 or more, got {self.n_trials}")

    @property
    def sign(self) -> int:
        """The factor that makes lower values better."""
        return 1 if self.mode == "min" else -1


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """The state of a trial; `value` is the best of the sweep's metric if it has finished, else NaN."""

    folder: str
    overrides: tuple[str, ...]
    state: State
    error: str
    value: float


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A trial that this worker is to run, in the folder of this name within the sweep's."""

    folder: str
    overrides: tuple[str, ...]
    trial: optuna.Trial


class SweepStudy:
    """The trials of the sweep in a folder, for one worker, which is alive until the end of `with`."""

    def __init__(self, folder: Path, space: SearchSpace, search: Search) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._space, self.search = space, search
        self._workers = folder / WORKERS
        self._workers.mkdir(parents=True, exist_ok=True)
        self._worker = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._alive = FileLock(self._workers / f"{self._worker}.lock")
        self._alive.acquire()
        self._one_at_a_time = FileLock(self._workers / "study.lock")
        with self._one_at_a_time:
            try:
                storage = optuna.storages.RDBStorage(
                    f"sqlite:///{folder / STUDY_FILE}",
                    engine_kwargs={"connect_args": {"timeout": _BUSY_SECONDS}},
                )
                self._study = optuna.create_study(
                    study_name="sweep",  # by which Hyperband assigns trials to its brackets
                    storage=storage,
                    load_if_exists=True,
                    direction="minimize" if search.mode == "min" else "maximize",
                    pruner=_PRUNERS[search.pruner](),
                )
                known = len(self._latest())
                missing = combinations(space)[known:] if search.sampler == "grid" else []
                for number, values in enumerate(missing, start=known):
                    self._study.enqueue_trial(values, user_attrs={_FOLDER: str(number)})
            except STORAGE_ERRORS as error:
                raise storage_error(folder, error) from error

    def __enter__(self) -> "SweepStudy":
        return self

    def __exit__(self, *error: object) -> None:
        self._alive.release()
        (self._workers / f"{self._worker}.lock").unlink(missing_ok=True)

    # --- the next trial -------------------------------------------------------------------------------

    def abandoned(self) -> list[Claim]:
        """Take over the trials that were interrupted, or whose worker is gone."""
        with self._one_at_a_time:
            trials = [each for each in self._trials() if each.state == TrialState.RUNNING]
            return [self._claimed(each._trial_id) for each in trials if not self._worked_on(each)]

    def retry_failed(self) -> int:
        """Put the failed trials back into the queue; returns their number."""
        with self._one_at_a_time:
            failed = [trial for trial in self._latest().values() if trial.state == TrialState.FAIL]
            for trial in failed:
                attributes = {_FOLDER: _folder(trial), _RETRY_OF: trial.number}
                self._study.enqueue_trial(trial.params, user_attrs=attributes)
        return len(failed)

    def next(self) -> Claim | None:
        """A trial that nobody has begun; None if all have been begun, though some may still be running."""
        with self._one_at_a_time:
            trials = self._trials()
            waiting = any(trial.state == TrialState.WAITING for trial in trials)
            begun = sum(_RETRY_OF not in trial.user_attrs for trial in trials)
            wanted = 0 if self.search.sampler == "grid" else self.search.n_trials or 0
            if not waiting and begun >= wanted:
                return None
            # A new sampler for each trial, seeded by its number: a continued sweep, or another worker, would
            # otherwise draw the same values again.
            seed = (self.search.seed * 100_003 + len(trials)) % 2**32
            if self.search.sampler == "tpe":
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ExperimentalWarning)
                    # Running trials count as bad ones, so that the next is drawn elsewhere.
                    self._study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
            else:
                self._study.sampler = optuna.samplers.RandomSampler(seed=seed)
            return self._claimed(self._study.ask()._trial_id)

    def total(self) -> int:
        """The number of trials of the whole sweep; a retried one counts once."""
        known = len(self._latest())
        return known if self.search.sampler == "grid" else max(known, self.search.n_trials or 0)

    # --- a running trial ------------------------------------------------------------------------------

    def begun(self, claim: Claim, process: str) -> None:
        """The trial has been started; `process` is its name for `gptpl.sweeps.jobs.is_alive`."""
        claim.trial.set_user_attr(_PROCESS, process)

    def report(self, claim: Claim, values: list[float]) -> None:
        """Tell the study the metric's values, one for each evaluation of the trial so far."""
        known = self._trials()[claim.trial.number].intermediate_values
        for number, value in enumerate(values, start=1):
            if number not in known and math.isfinite(value):
                claim.trial.report(value, number)

    def end(self, claim: Claim, state: State, *, value: float = math.nan, error: str = "") -> None:
        """The trial is finished (with this value), pruned, failed, or interrupted: to be continued."""
        if error:
            claim.trial.set_user_attr(_INTERRUPTED if state == "interrupted" else _ERROR, error)
        if state == "finished":
            self._study.tell(claim.trial, value)
        elif state != "interrupted":
            self._study.tell(claim.trial, state=TrialState.PRUNED if state == "pruned" else TrialState.FAIL)

    # --- results --------------------------------------------------------------------------------------

    def results(self) -> list[TrialResult]:
        """Every trial, by the number of its folder; the last attempt of one that was retried."""
        with self._one_at_a_time:  # to see whether a worker is alive takes its lock for a moment
            latest = self._latest()
            return [self._result(latest[folder]) for folder in sorted(latest, key=int)]

    def _result(self, trial: FrozenTrial) -> TrialResult:
        values = trial.params or trial.system_attrs.get("fixed_params", {})
        state, error = _STATES.get(trial.state, "running"), str(trial.user_attrs.get(_ERROR, ""))
        if state == "pruned":
            error = "stopped: others were better after as many evaluations"
        if state == "running" and not self._worked_on(trial):
            state, error = "interrupted", trial.user_attrs.get(_INTERRUPTED) or "its worker has ended"
        return TrialResult(
            folder=_folder(trial),
            overrides=overrides({name: values[name] for name in self._space if name in values}),
            state=state,
            error=error,
            value=trial.value if state == "finished" and trial.value is not None else math.nan,
        )

    def _trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _latest(self) -> dict[str, FrozenTrial]:
        return {_folder(trial): trial for trial in self._trials()}

    def _claimed(self, trial_id: int) -> Claim:
        trial = optuna.Trial(self._study, trial_id)
        trial.set_user_attr(_WORKER, self._worker)
        if trial.user_attrs.get(_INTERRUPTED):
            trial.set_user_attr(_INTERRUPTED, "")
        values = {name: drawn(trial, name, dimension) for name, dimension in self._space.items()}
        return Claim(folder=_folder(trial), overrides=overrides(values), trial=trial)

    def _worked_on(self, trial: FrozenTrial) -> bool:
        """Whether its worker is alive, or its own process, which may outlive the worker."""
        worker = trial.user_attrs.get(_WORKER, "")
        if trial.user_attrs.get(_INTERRUPTED) or not worker:
            return False
        if worker == self._worker:
            return True
        path = self._workers / f"{worker}.lock"
        if path.exists():
            try:
                FileLock(path).acquire(timeout=0).lock.release()
            except Timeout:
                return True
            path.unlink(missing_ok=True)
        return is_alive(trial.user_attrs.get(_PROCESS, ""))


_STATES: dict[TrialState, State] = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.WAITING: "waiting",
}
_PRUNERS: dict[Pruner, type[optuna.pruners.BasePruner]] = {
    "none": optuna.pruners.NopPruner,
    "median": optuna.pruners.MedianPruner,
    "hyperband": optuna.pruners.HyperbandPruner,
}


def _folder(trial: FrozenTrial | optuna.Trial) -> str:
    return str(trial.user_attrs.get(_FOLDER, trial.number))


def storage_error(folder: Path, error: BaseException) -> OSError:
    """An error of one line that names the file."""
    while error.__cause__ is not None:
        error = error.__cause__
    return OSError(f"{folder / STUDY_FILE} cannot be used ({str(error).splitlines()[0]})")
