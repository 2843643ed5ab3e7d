"""`gptpl train`: compose, build, fit, record."""

import logging
import math
import os
import time
from datetime import UTC, datetime
from typing import Any

import lightning as L
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from gptpl.cli.build import PROCESS_RUN_DIR, Run, build_run, is_worker_process
from gptpl.cli.console import RunLog
from gptpl.cli.hydra_app import run_under_hydra
from gptpl.cli.run_folder import (
    environment_record,
    fresh_run_dir,
    make_run_dir,
    read_run_record,
    write_config,
    write_run_record,
)
from gptpl.cli.sweep import SweepTable
from gptpl.errors import InputError
from gptpl.model import count_parameters

log = logging.getLogger(__name__)


def run(arguments: list[str]) -> int:
    """Trains once, or once for each trial of a sweep; returns the exit status."""
    sweep_folder = fresh_run_dir("sweeps")
    sweep = SweepTable(sweep_folder)

    def task(cfg: DictConfig) -> None:
        run_log = RunLog()
        try:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                sweep.trial(lambda: train(cfg, run_log, list(HydraConfig.get().overrides.task)))
            else:
                train(cfg, run_log, arguments)
        finally:
            run_log.close()

    try:
        # First, so that a folder given by the user wins.
        run_under_hydra("train", [f"hydra.sweep.dir={sweep_folder}", *arguments], task)
    except InputError:
        sweep.discard_unused_folder()
        raise
    return sweep.finish()


def train(cfg: DictConfig, run_log: RunLog, arguments: list[str]) -> dict[str, float]:
    """One run from its composed config to its final record; returns the final metrics.

    `arguments` of `gptpl train` are what started it, for the record.
    """
    run = build_run(cfg)
    if run.start_step and run.start_step >= run.module.total_steps:
        log.info(
            "nothing left to do: %s is at step %d of %d; to go on, give a larger trainer.max_epochs or"
            " trainer.max_steps", run.run_dir, run.start_step, run.module.total_steps,
        )  # fmt: skip
        return {}
    return fit(run, run_log, arguments)


def fit(run: Run, run_log: RunLog, arguments: list[str]) -> dict[str, float]:
    """Trains and leaves the run's folder complete; returns the final metrics."""
    make_run_dir(run.run_dir)
    if not is_worker_process():
        run_log.open_file(run.run_dir)
        _write_start(run, environment_record(arguments))
        log.info("run folder: %s", run.run_dir)
    started_seconds = time.monotonic()
    previous = os.environ.get(PROCESS_RUN_DIR)
    os.environ[PROCESS_RUN_DIR] = str(run.run_dir)
    try:
        run.trainer.fit(run.module, datamodule=run.datamodule, ckpt_path=run.resume_from, weights_only=True)
    except SystemExit:
        if not run.trainer.interrupted:  # after Ctrl-C Lightning leaves with status 1, which says too little
            raise
    finally:
        if previous is None:
            os.environ.pop(PROCESS_RUN_DIR, None)
    if run.trainer.interrupted:
        log.info("to go on: gptpl train resume=%s", run.run_dir)
        raise KeyboardInterrupt
    metrics = _final_metrics(run.trainer)
    if run.trainer.is_global_zero:
        write_run_record(
            run.run_dir,
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - started_seconds, 1),
            steps=run.trainer.global_step,
            tokens_seen=run.module.tokens_seen,
            metrics=metrics,
        )
        log.info("done: %s", run.run_dir)
    return metrics


def _write_start(run: Run, environment: dict[str, Any]) -> None:
    """The settings, and what the run depends on beside them; a resumed run adds how it was resumed."""
    write_config(run.run_dir, run.config)
    if run.resume_from is None:
        write_run_record(run.run_dir, **environment, **_data_record(run))
    else:
        earlier = read_run_record(run.run_dir).get("resumed", [])
        now = {"step": run.start_step, **environment}
        write_run_record(run.run_dir, resumed=[*earlier, now])


def _data_record(run: Run) -> dict[str, Any]:
    tokenizer = run.datamodule.tokenizer
    return {
        "data": {"name": run.datamodule.corpus.name, "sha256": run.datamodule.encoded.stats.content_sha256},
        "tokenizer": {"name": tokenizer.name, "vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256},
        "parameters": count_parameters(run.module.net.config).total,
    }


def _final_metrics(trainer: L.Trainer) -> dict[str, float]:
    """The last value of every metric that is a number."""
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name != "step"}
    for callback in trainer.checkpoint_callbacks:
        score = getattr(callback, "best_model_score", None)
        if score is not None:
            metrics[f"best_{callback.monitor}"] = float(score)  # type: ignore[attr-defined]
    return {name: value for name, value in sorted(metrics.items()) if math.isfinite(value)}
