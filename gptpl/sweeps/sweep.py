"""A sweep: trials of several settings, each a run of its own, and their ranking; it can be continued."""

import hashlib
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from gptpl.config.check import check_launcher
from gptpl.config.compose import Composed, Glob, IntervalSweep, composed, plain
from gptpl.config.groups import Folder, choices, is_group
from gptpl.config.instantiate import instantiate
from gptpl.config.overrides import is_path, key_of, parsed, readable
from gptpl.config.signatures import locate, signature_of
from gptpl.data.pretraining.mixture import Source
from gptpl.errors import SIGNAL_STATUS, InputError
from gptpl.files.durable import write_atomically
from gptpl.files.run_record import LOSS, package_version
from gptpl.runs.build import run_name
from gptpl.runs.fit import git_commit
from gptpl.runs.listing import RESULTS_FILE, SWEEP_FILE, runs_folder
from gptpl.runs.parts import class_of
from gptpl.sweeps import study as spaces
from gptpl.sweeps.jobs import Launcher
from gptpl.sweeps.outcomes import RankedTrial, header, ranked, write_results
from gptpl.sweeps.study import Dimension, Search, SearchSpace, SweepStudy
from gptpl.sweeps.worker import Watcher, Worker
from gptpl.training.task import Better, better, known_metrics

EXIT_FAILED = 1
_OWN_KEYS = ("sweep", "hydra/launcher")
_OWN_PREFIXES = ("sweep.", "hydra.launcher.", "hydra.sweep.")
_SET_BY_THE_SWEEP = {
    "run_dir": "each trial has a folder of its own in the sweep's: give hydra.sweep.dir, or leave -m out",
    "resume": "it continues a single run, which a sweep cannot: leave -m out",
}
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """The result of a sweep of `total` trials, whose runs are `folder / "0"`, ...

    `trials` are ranked, the best first; `stopped_by` is the signal that ended the sweep early.
    """

    folder: Path
    trials: Sequence[RankedTrial]
    search: Search
    total: int
    stopped_by: int | None

    @property
    def table(self) -> Path:
        """The ranking as a CSV file."""
        return self.folder / RESULTS_FILE

    @property
    def best(self) -> RankedTrial | None:
        """The best trial that has finished."""
        return next((trial for trial in self.trials if trial.result.state == "finished"), None)

    def rows(self) -> list[list[str]]:
        """The ranking as texts, its header first."""
        return [header(self.search), *(trial.cells() for trial in self.trials)]

    def status(self, say: Say = lambda line: None) -> int:
        """The exit status; `say` is told what to do about trials that have not finished."""
        states = [trial.result.state for trial in self.trials]
        left = self.total - sum(states.count(each) for each in ("finished", "pruned", "failed", "running"))
        if left:
            say(f"trials left: {left}; run the same command again to continue")
        if "running" in states:
            say(f"trials that another process is running: {states.count('running')}")
        if "failed" in states:
            say(f"trials failed: {states.count('failed')}; sweep.retry_failed=true tries them again")
        if self.stopped_by is not None:
            return SIGNAL_STATUS + self.stopped_by
        return 0 if set(states) <= {"finished", "pruned"} and not left else EXIT_FAILED


def sweep(
    *overrides: str,
    config_dir: Folder | None = None,
    config_name: str = "train",
    watch: Callable[[Path, SweepStudy, int], Watcher] = lambda folder, study, n_jobs: Watcher(),
    say: Say = lambda line: None,
) -> SweepResult:
    """Run the trials that are left: `sweep("experiment=quick", "optimizer.lr=1e-4,4e-4", "sweep=grid")`.

    Args:
        overrides: those of `gptpl train`, of which some have several values, and those of the sweep itself:
            `sweep=tpe`, `sweep.n_trials=20`, `hydra/launcher=slurm`, `hydra.launcher.n_jobs=2`,
            `hydra.sweep.dir=FOLDER`.
        config_dir: the user's own config folder.
        config_name: the root config of the trials: one in the user's folder that extends `train`.
        watch: makes the watcher of the trials from the folder, the study and the trials at a time.
        say: is told what else a person wants to know.

    Raises InputError for invalid settings, before the first trial starts.
    """
    given = sort_overrides(overrides, config_dir)
    asked = composed(given.own, "sweep", config_dir=config_dir)
    own, launcher_settings = plain(asked.cfg.sweep), _launcher_settings(asked)
    search = Search(**{key: own[key] for key in ("sampler", "n_trials", "pruner", "seed", "metric")})
    space = _space(own, given)
    name, data, metrics = _check_trials(given.shared, space, config_dir, config_name)
    search = replace(search, mode=own["mode"] or better(search.metric, metrics))
    flags = [] if asked.config_dir is None else [f"--config-dir={asked.config_dir}"]
    flags += [] if config_name == "train" else [f"--config-name={config_name}"]
    shared = [*flags, *given.shared]
    # What makes two sweeps the same: not the number of their trials, which may change later.
    identity = {
        "shared": sorted(shared),
        "swept": {key: spaces.as_text(dimension) for key, dimension in space.items()},
        "sampler": search.sampler,
        "pruner": search.pruner,
        **({} if search.sampler == "grid" else {"seed": search.seed}),
        **({} if search.metric == LOSS else {"metric": search.metric, "mode": search.mode}),
    }
    short_hash = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    folder = Path(asked.hydra.sweep.dir or runs_folder() / "sweeps" / f"{name}_{short_hash}")
    folder = folder.expanduser().absolute()
    kind = locate(launcher_settings["_target_"], "hydra.launcher._target_")
    # A launcher with files of its own, as submitit has, puts them into the sweep's folder.
    files = {"folder": str(folder / ".slurm")} if "folder" in signature_of(kind).parameters else {}
    launcher: Launcher = instantiate(launcher_settings, **files)
    with closing(launcher):
        _settle(folder, identity, data, shlex.join(["gptpl", "train", *overrides]), mix=own["mix"])
        with SweepStudy(folder, space, search) as study:
            if own["retry_failed"]:
                say(f"failed trials tried again: {study.retry_failed()}")
            say(f"sweep folder: {folder}")
            with closing(watch(folder, study, launcher.n_jobs)) as watcher:
                worker = Worker(folder, study, launcher, shared, watcher=watcher)
                worker.work()
            trials = ranked(folder, study.results(), search)
            write_results(folder, trials, search)
            return SweepResult(
                folder=folder,
                trials=trials,
                search=search,
                total=study.total(),
                stopped_by=worker.stopped_by,
            )


# --- the settings ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Given:
    """Overrides of the sweep itself, those that every trial shares, and those with several values."""

    own: list[str] = field(default_factory=list)
    shared: list[str] = field(default_factory=list)
    swept: dict[str, Dimension] = field(default_factory=dict)


def sort_overrides(overrides: Sequence[str], config_dir: Folder | None = None) -> _Given:
    """Sort the overrides. Raises InputError for those that a sweep cannot have."""
    found = _Given()
    seen: set[str] = set()
    for override in overrides:
        written_key = override.partition("=")[0]
        key = written_key.lstrip("+~")
        if key in seen:
            raise InputError(f"{key} is given twice: leave one out")
        seen.add(key)
        if key in _SET_BY_THE_SWEEP:
            raise InputError(f"{override} in a sweep: {_SET_BY_THE_SWEEP[key]}")
        if key in _OWN_KEYS or key.startswith(_OWN_PREFIXES):
            if key != "hydra.sweep.dir" and _dimension(override, config_dir) is not None:
                raise InputError(f"{override}: a setting of the sweep itself takes one value")
            found.own.append(override)
        elif key == "hydra/sweeper" or key.startswith("hydra.sweeper"):
            raise InputError(
                f"{override}: sweeps are gptpl's own, choose one of sweep={', '.join(choices('sweep'))}"
            )
        elif key.startswith("hydra") and not key.startswith("hydra.searchpath"):
            raise InputError(f"{override} has no meaning in a sweep: leave it out")
        elif (dimension := _dimension(override, config_dir)) is not None:
            found.swept[written_key] = dimension
        else:
            found.shared.append(override)
    return found


def _dimension(text: str, config_dir: Folder | None) -> Dimension | None:
    """The values of an override that has several; None if it has one."""
    key, _, written = text.lstrip("+~").partition("=")
    if is_path(key) and "," in written and not Path(written).expanduser().exists():
        override = parsed(text)  # several paths
    else:
        for_hydra = readable(text, is_group=lambda key: is_group(key, config_dir))
        override = parsed(for_hydra)
    if not override.is_sweep_override():
        return None
    value: Any = override.value()
    if isinstance(value, IntervalSweep):
        assert value.start is not None
        assert value.end is not None
        return spaces.interval(key, value.start, value.end, log="log" in value.tags)
    if getattr(value, "shuffle", False):
        raise InputError(
            f"{text}: the same command must find the same trials, so leave out shuffle, or draw from the"
            " values with sweep=random"
        )
    if isinstance(value, Glob):
        offered = choices(key, config_dir)
        found = value.filter(offered)
        if not found:
            known = f"its choices are {', '.join(offered)}" if offered else f"{key} is no config group"
            raise InputError(f"{text} matches nothing: {known}; give a list of values")
        return spaces.values(key, found)
    return spaces.values(key, list(override.sweep_string_iterator()))


def _launcher_settings(asked: Composed) -> dict[str, Any]:
    launcher = plain(asked.hydra.launcher)
    if not str(launcher.get("_target_")).startswith("gptpl."):
        name, offered = asked.hydra.runtime.choices["hydra/launcher"], ", ".join(choices("hydra/launcher"))
        raise InputError(f"hydra/launcher={name} cannot start gptpl's trials: choose one of {offered}")
    return check_launcher(launcher)


def _space(own: Mapping[str, Any], given: _Given) -> SearchSpace:
    """The search's own settings, then those of the command line, which take precedence."""
    space = {}
    shared = {key_of(override) for override in given.shared}
    for key, text in own["params"].items():
        dimension = _dimension(f"{key}={text}", None)
        if dimension is None:
            raise InputError(f"sweep.params has {key}={text}, which is one value: give several")
        if key not in shared:  # a setting with a given value is not searched
            space[key] = dimension
    space |= given.swept
    if not space:
        raise InputError(
            "nothing to sweep over: give a setting several values, such as optimizer.lr=1e-4,4e-4, or a"
            " search, such as sweep=learning_rate"
        )
    if own["sampler"] == "grid" and own["n_trials"] not in (None, count := len(spaces.combinations(space))):
        raise InputError(
            f"sweep.n_trials={own['n_trials']}, but the grid has {count} combinations: leave it out, or draw"
            " from them with sweep=random"
        )
    return space


def _check_trials(
    shared: Sequence[str], space: SearchSpace, config_dir: Folder | None, config_name: str
) -> tuple[str, dict[str, str], dict[str, Better]]:
    """Compose trials with each of the values, so that an invalid one is refused before the first starts.

    Returns the name of the sweep, the hash of each text that its trials will read, by its settings, and the
    metrics of its task.
    """
    names: list[str] = []
    data: dict[str, str] = {}
    metrics: dict[str, Better] = {}
    for values in tqdm(
        spaces.one_at_a_time(space), desc="checking values", leave=False, disable=None, delay=2
    ):
        cfg = composed([*shared, *spaces.overrides(values)], config_name, config_dir=config_dir).cfg
        names.append(run_name(cfg))
        callbacks = [locate(str(node._target_), "callbacks") for node in cfg.callbacks.values() if node]
        metrics |= known_metrics(class_of(cfg, "task"), callbacks)
        settings = plain(cfg).get("data", {})
        corpora = [(settings["corpus"], settings.get("split"))] if settings.get("corpus") else []
        corpora += [(source, "documents") for source in (settings.get("sources") or {}).values()]
        for corpus, split in corpora:
            key = json.dumps(corpus, sort_keys=True)
            if key not in data:
                named = "_target_" in corpus
                made = instantiate(corpus) if named else Source.of("", instantiate(corpus)).corpus
                data[key] = made.listing_sha256() if split == "documents" else made.content_sha256()
    return names[0], data, metrics


# --- sweep.yaml: the identity of a sweep, so that its folder takes no trials of another one -------------


def _settle(
    folder: Path, identity: Mapping[str, Any], data: dict[str, str], command: str, *, mix: bool
) -> None:
    """Make the folder the sweep's, or check that it is: the same search, code and texts.

    Raises InputError for another search; for other code or texts unless `mix`.
    """
    versions = {name: package_version(name) for name in ("gptpl", "torch", "lightning")}
    dependencies = {"versions": {**versions, "git_commit": git_commit()}, "data": data}
    path = folder / SWEEP_FILE
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            foreign = any(not each.name.startswith(".") for each in folder.iterdir())
        except OSError as error:
            raise InputError(
                f"hydra.sweep.dir={folder} cannot be created ({error.strerror}):"
                " choose a folder that you may write to"
            ) from error
        if foreign:
            raise InputError(f"hydra.sweep.dir={folder} exists and is not a sweep: give a new folder")
        started = datetime.now(UTC).isoformat(timespec="seconds")
        content = {"command": command, "started": started, **identity, **dependencies}
        write_atomically(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
        return
    try:
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
        code_and_texts = {name: dict(before.pop(name)) for name in dependencies}
        search = {name: value for name, value in before.items() if name not in ("command", "started")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise InputError(f"{path} is damaged: restore it, or give another hydra.sweep.dir") from error
    if differences := _differences(search, identity):
        raise InputError(
            f"{folder} holds another sweep ({'; '.join(differences)}): give another hydra.sweep.dir, or"
            " the settings that it has"
        )
    changed = _differences(code_and_texts, dependencies)
    if changed and not mix:
        raise InputError(
            f"the trials in {folder} were made with other code or data ({'; '.join(changed)}): give another"
            " hydra.sweep.dir, or sweep.mix=true to continue all the same"
        )


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Such as "sampler: grid there, tpe here"."""
    found = []
    for name in dict.fromkeys([*before, *now]):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new)
        elif old != new:
            found.append(f"{name}: {_text(old)} there, {_text(new)} here")
    return found


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
