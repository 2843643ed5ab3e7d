"""`gptpl sweep`, or `gptpl train -m`: trials of several settings, a table, a report."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from gptpl.cli.build import run_name
from gptpl.cli.configs import choices
from gptpl.cli.hydra_app import instantiate, run_under_hydra
from gptpl.cli.report import report_sweep
from gptpl.cli.sweep_arguments import SweepArguments, parse, parsed
from gptpl.cli.sweep_progress import Progress, say
from gptpl.cli.sweep_record import settle, sweep_record
from gptpl.cli.text_table import table
from gptpl.errors import InputError
from gptpl.records.sweep_folder import RESULTS_FILE
from gptpl.sweeps.jobs import Launcher
from gptpl.sweeps.results import HEADER, Row, rows, write_results
from gptpl.sweeps.space import SearchSpace, check, combinations, one_at_a_time, overrides
from gptpl.sweeps.study import Pruner, Sampler, Search, SweepStudy
from gptpl.sweeps.worker import Worker

EXIT_FAILED = 1
_SIGNAL_BASE = 128


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """The sweep's own settings, composed."""

    search: Search
    params: dict[str, str]
    retry_failed: bool
    mix: bool
    folder: Path | None
    """None: where the sweep's name and hash put it."""
    launcher: Any


def run(arguments: list[str]) -> int:
    """Runs the trials that are left; returns 0 when all are done, 1 if not, or a signal's status."""
    given = parse(arguments)
    settings = _settings(given.own)
    space = _space(settings, given)
    name, data = _check_trials(given.shared, space)
    record = sweep_record(given.shared, space, settings.search, data)
    folder = settings.folder or Path("runs/sweeps") / f"{name}_{record.short_hash}"
    folder = folder.absolute()
    launcher: Launcher = instantiate(settings.launcher, **_needs_folder(settings.launcher, folder))
    try:
        settle(folder, record, arguments, mix=settings.mix)
        with SweepStudy(folder, space, settings.search) as study:
            if settings.retry_failed:
                say(f"failed trials tried again: {study.retry_failed()}")
            return _work(folder, study, launcher, given.shared)
    finally:
        launcher.close()


def _work(folder: Path, study: SweepStudy, launcher: Launcher, shared: Sequence[str]) -> int:
    say(f"sweep folder: {folder}")
    with Progress(folder, study, launcher.n_jobs) as progress:
        worker = Worker(folder, study, launcher, shared, watcher=progress)
        worker.work()
    found = rows(folder, study.results())
    write_results(folder, found)
    print("\n".join(table([list(HEADER), *(row.cells() for row in found)])))
    print(f"\ntable   {folder / RESULTS_FILE}")
    if page := report_sweep(folder):
        print(f"report  {page}")
    return _status(found, study.total(), worker.stopped_by)


def _status(found: Sequence[Row], total: int, stopped_by: int | None) -> int:
    """The exit status, and what to do about trials that have not finished."""
    states = [row.result.state for row in found]
    left = total - sum(states.count(state) for state in ("finished", "pruned", "failed", "running"))
    if left:
        say(f"trials left: {left}; the same command goes on with them")
    if "running" in states:
        say(f"trials that another process is running: {states.count('running')}")
    if "failed" in states:
        say(f"trials failed: {states.count('failed')}; sweep.retry_failed=true tries them again")
    if stopped_by is not None:
        return _SIGNAL_BASE + stopped_by
    return 0 if set(states) <= {"finished", "pruned"} and not left else EXIT_FAILED


def _settings(own: list[str]) -> SweepSettings:
    found: list[SweepSettings] = []

    def read(cfg: DictConfig) -> None:
        conf, hydra = cfg.sweep, HydraConfig.get()
        folder = Path(hydra.sweep.dir).expanduser() if hydra.sweep.dir else None
        _check_choice("sweep.sampler", conf.sampler, get_args(Sampler))
        _check_choice("sweep.pruner", conf.pruner, get_args(Pruner))
        if conf.seed < 0:
            raise InputError(f"sweep.seed={conf.seed} is no seed: give 0 or more")
        if conf.sampler != "grid" and (conf.n_trials is None or conf.n_trials < 1):
            raise InputError(f"sweep.n_trials={conf.n_trials} draws nothing: give 1 or more")
        if not str(hydra.launcher.get("_target_")).startswith("gptpl."):
            raise InputError(
                f"hydra/launcher={hydra.runtime.choices['hydra/launcher']} starts no trials of gptpl: choose"
                f" one of {', '.join(choices('hydra/launcher'))}"
            )
        found.append(
            SweepSettings(
                search=Search(
                    sampler=conf.sampler, n_trials=conf.n_trials, pruner=conf.pruner, seed=conf.seed
                ),
                params=dict(conf.params),
                retry_failed=conf.retry_failed,
                mix=conf.mix,
                folder=folder,
                launcher=OmegaConf.create(OmegaConf.to_container(hydra.launcher, resolve=True)),
            )
        )

    run_under_hydra("sweep", own, read)
    return found[0]


def _check_choice(key: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise InputError(f"{key}={value} is unknown: choose one of {', '.join(known)}")


def _space(settings: SweepSettings, given: SweepArguments) -> SearchSpace:
    """What is swept: the search's own settings, then those of the command line, which win."""
    space = {}
    shared = {override.lstrip("+~").partition("=")[0] for override in given.shared}
    for key, text in settings.params.items():
        dimension = parsed(f"{key}={text}")
        if dimension is None:
            raise InputError(f"sweep.params has {key}={text}, which is one value: give several")
        if key not in shared:  # a value given for it takes it out of the search
            space[key] = dimension
    space |= given.swept
    if not space:
        raise InputError(
            "nothing to sweep over: give a setting several values, such as optimizer.lr=1e-4,4e-4, or a"
            " search, such as sweep=learning_rate"
        )
    check(space)
    if settings.search.sampler == "grid":
        there = len(combinations(space))
        if settings.search.n_trials not in (None, there):
            raise InputError(
                f"sweep.n_trials={settings.search.n_trials}, but the grid has {there} combinations: leave it"
                " out, or draw from them with sweep=random"
            )
    return space


def _check_trials(shared: Sequence[str], space: SearchSpace) -> tuple[str, dict[str, str]]:
    """Composes trials with each of the values, so that a misspelt one is refused before the first starts.

    Returns the name of the sweep, and the hash of each text that its trials will read, by its settings.
    """
    names: list[str] = []
    data: dict[str, str] = {}

    def note(cfg: DictConfig) -> None:
        names.append(run_name(cfg))
        corpus = cfg.data.corpus
        key = json.dumps(OmegaConf.to_container(corpus, resolve=True), sort_keys=True)
        if key not in data:
            data[key] = instantiate(corpus).content_sha256()

    for values in tqdm(one_at_a_time(space), desc="checking values", leave=False, disable=None, delay=2):
        run_under_hydra("train", [*shared, *overrides(values)], note)
    return names[0], data


def _needs_folder(launcher: Any, folder: Path) -> dict[str, str]:
    """submitit's own files lie in the sweep's folder."""
    return {"folder": str(folder / ".slurm")} if launcher._target_.endswith(".slurm") else {}
