"""`gptpl train`: compose, build, fit, record."""

import logging
import math
import os
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning as L
from omegaconf import DictConfig

from gptpl.callbacks.exact_resume import return_loggers
from gptpl.callbacks.stopping import RunStopped
from gptpl.cli.adapter_of_run import leave_adapter
from gptpl.cli.build import PROCESS_RUN_DIR, Run, build_run, is_worker_process
from gptpl.cli.console import RunLog
from gptpl.cli.hydra_app import run_under_hydra
from gptpl.cli.non_finite import (
    ROLLBACK,
    check_on_nonfinite,
    check_rollback,
    remedy,
    rolled_back,
    write_report,
)
from gptpl.cli.quoting import is_sweep
from gptpl.cli.resume_overrides import with_choices_of_run
from gptpl.cli.resume_rules import RESCHEDULABLE
from gptpl.cli.run_folder import (
    environment_record,
    make_run_dir,
    read_run_record,
    write_config,
    write_run_record,
)
from gptpl.files.folder_lock import locked_folder
from gptpl.model import count_parameters
from gptpl.training.checkpoint_files import LAST, set_aside
from gptpl.training.non_finite import NonFiniteError
from gptpl.training.peak_memory import peak_memory_bytes

log = logging.getLogger(__name__)

EXIT_FAILED = 1


def run(arguments: list[str]) -> int:
    """Trains once, or hands a sweep over; returns the exit status."""
    if is_sweep(arguments):
        from gptpl.cli import sweep  # which needs Optuna, and one run does not

        return sweep.run(arguments)

    def task(cfg: DictConfig) -> None:
        with RunLog() as run_log:
            train(cfg, run_log, arguments)

    try:
        overrides = with_choices_of_run(arguments)
        run_under_hydra("train", overrides, task, expected=(RunStopped, NonFiniteError))
    except RunStopped as stop:
        return stop.status
    except NonFiniteError:  # which has been reported
        return EXIT_FAILED
    return 0


def train(cfg: DictConfig, run_log: RunLog, arguments: list[str]) -> dict[str, float]:
    """One run from its composed config to its final record; returns the final metrics.

    `arguments` of `gptpl train` are what started it, for the record.
    """
    check_on_nonfinite(cfg)
    run = build_run(cfg)
    check_rollback(run)
    if nothing_left(run):
        return {}
    while True:
        try:
            return fit(run, run_log, arguments)
        except NonFiniteError as error:
            write_report(run, error)
            if run.config["on_nonfinite"] != ROLLBACK:
                log.error("%s", remedy(run, error))
                raise
            run = rolled_back(run, cfg, error)


def nothing_left(run: Run) -> bool:
    """Whether a run that is to be resumed has finished, and nothing was given that would make it go on."""
    if run.resume is None or not run.resume.finished:
        return False
    total = run.module.total_steps
    if run.start_step < total and any(change.kind == RESCHEDULABLE for change in run.resume.changes):
        return False
    log.info(
        "nothing left to do: %s finished at step %d of %d; to go on, give a larger trainer.max_epochs or"
        " trainer.max_steps", run.run_dir, run.start_step, total,
    )  # fmt: skip
    return True


def fit(run: Run, run_log: RunLog, arguments: list[str]) -> dict[str, float]:
    """Trains and leaves the run's folder complete; returns the final metrics.

    Raises RunStopped, with the exit status that says why, where it was stopped from outside.
    """
    make_run_dir(run.run_dir)
    if is_worker_process():
        return _fit(run, run_log, arguments)
    with locked_folder(run.run_dir):
        return _fit(run, run_log, arguments)


def _fit(run: Run, run_log: RunLog, arguments: list[str]) -> dict[str, float]:
    if not is_worker_process():
        run_log.open_file(run.run_dir)
        _write_start(run, environment_record(arguments))
        log.info("run folder: %s", run.run_dir)
        if run.resume is not None and run.trainer.is_global_zero:
            set_aside(run.resume.damaged)
            return_loggers(run.trainer, run.resume.state)
    started_seconds = time.monotonic()
    try:
        with _known_to_other_processes(run.run_dir):
            run.trainer.fit(
                run.module, datamodule=run.datamodule, ckpt_path=run.resume_from, weights_only=True
            )
    except RunStopped as stop:
        return _stopped(run, stop, started_seconds)
    except SystemExit:
        if not run.trainer.interrupted:  # after Ctrl-C Lightning leaves with status 1, which says too little
            raise
        say_how_to_go_on(run)
        raise KeyboardInterrupt from None
    except NonFiniteError as error:  # which cannot just go on: see `train`
        _record_failure(run, error, started_seconds)
        raise
    except Exception as error:
        _record_failure(run, error, started_seconds)
        say_how_to_go_on(run)
        raise
    metrics = _final_metrics(run.trainer)
    if run.trainer.is_global_zero:
        write_run_record(
            run.run_dir,
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            steps=run.trainer.global_step,
            tokens_seen=run.module.tokens_seen,
            metrics=metrics,
            **_cost(run, started_seconds),
        )
        leave_adapter(run.module, run.run_dir)
        log.info("done: %s", run.run_dir)
    return metrics


@contextmanager
def _known_to_other_processes(run_dir: Path) -> Iterator[None]:
    """Tells processes that Lightning starts for further devices the folder of the run."""
    previous = os.environ.get(PROCESS_RUN_DIR)
    os.environ[PROCESS_RUN_DIR] = str(run_dir)
    try:
        yield
    finally:
        if previous is None:
            os.environ.pop(PROCESS_RUN_DIR, None)


def _cost(run: Run, started_seconds: float) -> dict[str, Any]:
    """The time of training, with that of earlier sessions as far as they wrote it, and the peak of memory."""
    before = 0.0 if run.resume is None else read_run_record(run.run_dir).get("seconds", 0.0)
    return {
        "seconds": round(before + time.monotonic() - started_seconds, 1),
        "peak_memory_bytes": peak_memory_bytes(run.trainer.strategy.root_device),
    }


def _stopped(run: Run, stop: RunStopped, started_seconds: float) -> dict[str, float]:
    """Says where the run stands; raises the stop again if it was not the settings that asked for it."""
    if is_worker_process():
        return {}  # Lightning would kill the first process for a status other than 0
    log.info("%s", stop)
    stopped = {"reason": stop.reason, "step": stop.step}
    write_run_record(run.run_dir, stopped=stopped, **_cost(run, started_seconds))
    say_how_to_go_on(run)
    if stop.status:
        raise stop
    return _final_metrics(run.trainer)


def _record_failure(run: Run, error: Exception, started_seconds: float) -> None:
    """Leaves in `run.json` what ended the run, where that can be written at all."""
    if is_worker_process():
        return
    lines = str(error).strip().splitlines() or [""]
    with suppress(OSError):  # of a full disk, say, which is then what the run failed of
        write_run_record(
            run.run_dir,
            failed={"error": f"{type(error).__name__}: {lines[0]}", "step": run.trainer.global_step},
            **_cost(run, started_seconds),
        )


def say_how_to_go_on(run: Run) -> None:
    """The command that resumes the run, where it has saved anything."""
    if is_worker_process() or not (run.run_dir / "checkpoints" / LAST).exists():
        return
    log.info("to go on: gptpl train %s", shlex.quote(f"resume={run.run_dir}"))


def _write_start(run: Run, environment: dict[str, Any]) -> None:
    """The settings, and what the run depends on beside them; a resumed run adds how it was resumed."""
    write_config(run.run_dir, run.config)
    run.datamodule.write_record(run.run_dir)
    planned = run.module.total_steps
    if run.resume is None:
        write_run_record(run.run_dir, **environment, **_data_record(run), planned_steps=planned)
    else:
        earlier = read_run_record(run.run_dir).get("resumed", [])
        changes = {change.key: change.new for change in run.resume.changes}
        now = {"step": run.start_step, "changes": changes, **environment}
        ended = ("finished", "stopped", "failed", "steps", "tokens_seen", "metrics")
        write_run_record(run.run_dir, remove=ended, resumed=[*earlier, now], planned_steps=planned)


def _data_record(run: Run) -> dict[str, Any]:
    tokenizer = run.datamodule.tokenizer
    return {
        "data": {"name": run.datamodule.name, "sha256": run.datamodule.content_sha256()},
        "tokenizer": {"name": tokenizer.name, "vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256},
        "parameters": count_parameters(run.module.net.config).total,
        "start": dict(run.module.start),
    }


def _final_metrics(trainer: L.Trainer) -> dict[str, float]:
    """The last value of every metric that is a number."""
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name != "step"}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        metrics |= getattr(callback, "final_metrics", {})
    for callback in trainer.checkpoint_callbacks:
        score = getattr(callback, "best_model_score", None)
        if score is not None:
            metrics[f"best_{callback.monitor}"] = float(score)  # type: ignore[attr-defined]
    return {name: value for name, value in sorted(metrics.items()) if math.isfinite(value)}
