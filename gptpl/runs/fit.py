"""Trains a run and leaves its folder complete: what it was made of, how it ended, how to resume it."""

import json
import logging
import math
import os
import platform
import shlex
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch

from gptpl.callbacks.checkpoints import return_loggers
from gptpl.callbacks.stopping import RunStopped, interrupts
from gptpl.checkpoints.adapter import export_adapter, has_base
from gptpl.checkpoints.files import set_aside
from gptpl.checkpoints.resume_state import set_random_state
from gptpl.config.groups import config_folder
from gptpl.config.overrides import key_of
from gptpl.errors import InputError
from gptpl.files.durable import write_atomically
from gptpl.files.run_record import (
    BEST,
    CHECKPOINT_FOLDER,
    LAST,
    read_run_json,
    recorded_versions,
    write_config,
    write_run_json,
)
from gptpl.model import GPTBackbone, parameters_of
from gptpl.model.parameters import TuneLowRank
from gptpl.runs.build import Run, rolled_back
from gptpl.runs.claims import PROCESS_CHECKPOINT, PROCESS_RUN_DIR, RunClaim
from gptpl.runs.trainer import PROCESS_FAST_PATH
from gptpl.settings import NEXT_STEP
from gptpl.training.costs import peak_memory_bytes
from gptpl.training.module import NonFiniteError
from gptpl.training.processes import processes
from gptpl.training.run_log import is_first_process
from gptpl.weights.adapter import FORMAT as ADAPTER
from gptpl.weights.transfer import check_is_gpt2

log = logging.getLogger(__name__)

ROLLBACK = "rollback"
MOST_IN_A_ROW = 3
"""After so many skipped steps in a row the weights are to blame, not a batch."""


def train(run: Run) -> dict[str, float]:
    """Train a run to its end and return the final metrics; skip non-finite steps if `on_nonfinite=rollback`.

    Of a finished run with no step left, tags and notes alone can change. Raises RunStopped for a stop from
    outside, and NonFiniteError after writing a report.
    """
    check_rollback(run.config, run.trainer.world_size)
    rolls_back = run.config["on_nonfinite"] == ROLLBACK
    if _nothing_left(run):
        _keep_labels(run)
        return {}
    while True:
        try:
            if not is_first_process():
                return _fit(run)
            with run.claim or RunClaim(run.run_dir):
                run.claim = None  # released with this session
                return _fit(run)
        except NonFiniteError as error:
            _write_report(run, error)
            if not rolls_back:
                log.error(
                    "lower optimizer.lr, or skip the step: %s (on_nonfinite=%s does it by itself)",
                    *(_resume_command(run, _skipping(run, error)), ROLLBACK),
                )
                raise
            run = _rolled_back(run, error)


def check_rollback(config: Mapping[str, Any], world_size: int) -> None:
    """Raise InputError for several processes of a run that is to go back by itself."""
    if config["on_nonfinite"] == ROLLBACK and world_size > 1:
        raise InputError(
            f"on_nonfinite={ROLLBACK} restarts the training within one process, this run has"
            f" {world_size}: use on_nonfinite=stop, which says how to skip the step"
        )


def _nothing_left(run: Run) -> bool:
    """Whether a run to be resumed has finished, and no setting was given that changes further steps."""
    if run.resume is None or not run.resume.finished:
        return False
    total = run.module.total_steps
    if run.start_step < total and any(change.kind == NEXT_STEP for change in run.resume.changes):
        return False
    log.info(
        "nothing left to do: %s finished at step %d of %d; give a larger trainer.max_epochs or"
        " trainer.max_steps to train longer", run.run_dir, run.start_step, total,
    )  # fmt: skip
    return True


def _keep_labels(run: Run) -> None:
    """Write the tags and notes that a finished run was given to its `run.json`."""
    changed = {each.key for each in run.resume.changes} if run.resume is not None else set()
    labels = {name: run.config[name] for name in ("tags", "notes") if name in changed}
    if labels and is_first_process():
        write_run_json(run.run_dir, **labels)


# --- one session of training ----------------------------------------------------------------------------


def _fit(run: Run) -> dict[str, float]:
    """Train from the start or the checkpoint, once, and record how that ended."""
    started_seconds = time.monotonic()
    is_first, together = is_first_process(), processes()
    with run.log_file:
        if is_first:
            run.log_file.open(run.run_dir)
            _write_start(run)
            log.info("run folder: %s", run.run_dir)
            if run.resume is not None and run.trainer.is_global_zero:
                set_aside(run.resume.damaged)
                return_loggers(run.trainer, run.resume.state)
        L.seed_everything(run.config["seed"], workers=True, verbose=False)
        set_random_state(run.random)
        checkpoint = None if run.resume is None else run.resume.checkpoint
        if together is None and is_first:
            os.environ.pop("RANK", None)  # of a group of one, which processes of Lightning's would inherit
        try:
            if is_first:  # for the processes that Lightning starts
                os.environ[PROCESS_RUN_DIR] = str(run.run_dir)
                os.environ[PROCESS_FAST_PATH] = json.dumps(run.performance)
                if checkpoint is not None:
                    os.environ[PROCESS_CHECKPOINT] = str(checkpoint)
            with interrupts():
                run.trainer.fit(
                    run.module, datamodule=run.datamodule, ckpt_path=checkpoint, weights_only=True
                )
        except RunStopped as stop:
            if is_first:
                log.info("%s", stop)
                try:
                    _record(run, started_seconds, stopped={"reason": stop.reason, "step": stop.step})
                except OSError as error:
                    if together is not None:
                        together.failed(error, reads=False)  # they would wait for this process to end
                    raise
                _log_how_to_resume(run)
            elif together is None:
                return {}  # Lightning would kill the first process for a status other than 0
            if stop.status:
                if together is not None:
                    together.wait_to_end()
                raise
            return _final_metrics(run.trainer)
        except KeyboardInterrupt:
            _log_how_to_resume(run)
            raise
        except Exception as error:
            if is_first:
                first, *_ = str(error).strip().splitlines() or [""]
                failed = {"error": f"{type(error).__name__}: {first}", "step": run.trainer.global_step}
                with suppress(OSError):  # such as a full disk, which is then what failed
                    _record(run, started_seconds, failed=failed)
            if together is not None:
                together.failed(error, reads=False)
                if run.trainer.is_global_zero:
                    for words in together.last_words():
                        log.error("%s", words)
            if not isinstance(error, NonFiniteError):  # see `train`
                _log_how_to_resume(run)
            raise
        finally:
            if is_first:
                for name in (PROCESS_RUN_DIR, PROCESS_FAST_PATH, PROCESS_CHECKPOINT):
                    os.environ.pop(name, None)
        metrics = _final_metrics(run.trainer)
        if run.trainer.is_global_zero:
            _record(
                run,
                started_seconds,
                finished=_now(),
                steps=run.trainer.global_step,
                tokens_seen=run.module.tokens_seen,
                metrics=metrics,
            )
            _leave_adapter(run)
            log.info("done: %s", run.run_dir)
        return metrics


def _final_metrics(trainer: L.Trainer) -> dict[str, float]:
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name != "step"}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        metrics |= getattr(callback, "final_metrics", {})
    for callback in trainer.checkpoint_callbacks:
        score = getattr(callback, "best_model_score", None)
        if score is not None:
            metrics[f"best_{callback.monitor}"] = float(score)  # type: ignore[attr-defined]
    return {name: value for name, value in sorted(metrics.items()) if math.isfinite(value)}


# --- the run's folder -----------------------------------------------------------------------------------


def _write_start(run: Run) -> None:
    """`config.yaml`, and in `run.json` what the run, or its resumption, starts with."""
    write_config(run.run_dir, run.config)
    run.datamodule.write_record(run.run_dir)
    environment: dict[str, Any] = {
        "command": run.command,
        "started": _now(),
        "versions": recorded_versions(),
        "git_commit": git_commit(),
        "hardware": {
            "platform": platform.platform(),
            "cpu_threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
    }
    decided: dict[str, Any] = {"planned_steps": run.module.total_steps, "performance": dict(run.performance)}
    if run.resume is not None:
        record = read_run_json(run.run_dir)
        earlier, before = record.get("resumed", []), record.get("overrides", [])
        changes = {change.key: change.new for change in run.resume.changes}
        now = {"step": run.start_step, "changes": changes, **environment}
        ended = ("finished", "stopped", "failed", "steps", "tokens_seen", "metrics")
        write_run_json(
            run.run_dir,
            remove=ended,
            resumed=[*earlier, now],
            overrides=[each for each in before if each in run.overrides or not _changes(changes, each)],
            **decided,
        )
        return
    tokenizer = run.datamodule.tokenizer
    write_run_json(
        run.run_dir,
        **environment,
        overrides=list(run.overrides),
        data={
            "name": run.datamodule.name,
            "sha256": run.datamodule.content_sha256(),
            "rows": run.datamodule.row_count,
        },
        tokenizer={name: getattr(tokenizer, name) for name in ("name", "vocab_size", "sha256")},
        parameters=parameters_of(run.module.net),
        use=getattr(run.module, "use", None),
        start=dict(run.module.start),
        **decided,
        measured_seconds=run.measured,
        choices=run.config.get("choices"),
    )


def _changes(changes: Mapping[str, Any], override: str) -> bool:
    """Whether settings that an override gave have changed since."""
    key = key_of(override)
    return any(changed == key or changed.startswith(f"{key}.") for changed in changes)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def git_commit() -> str | None:
    """The commit of the checkout that gptpl runs from, marked where files differ from it; None outside."""
    source = config_folder().resolve()
    if source.name != "conf":  # installed from a wheel: a repository around it is another project's
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _record(run: Run, started_seconds: float, **entries: Any) -> None:
    """Write to `run.json` how the run ended, with the time of all sessions and the peak of memory."""
    before = 0.0 if run.resume is None else read_run_json(run.run_dir).get("seconds", 0.0)
    write_run_json(
        run.run_dir,
        seconds=round(before + time.monotonic() - started_seconds, 1),
        peak_memory_bytes=peak_memory_bytes(run.trainer.strategy.root_device),
        **entries,
    )


def _log_how_to_resume(run: Run) -> None:
    if is_first_process() and (run.run_dir / CHECKPOINT_FOLDER / LAST).exists():
        log.info("to resume: %s", _resume_command(run))


def _resume_command(run: Run, *more: str) -> str:
    """The command that resumes the run, from any folder."""
    folder = ["--config-dir", str(Path(run.config_dir).expanduser().absolute())] if run.config_dir else []
    return shlex.join(["gptpl", "train", *folder, f"resume={run.run_dir}", *more])


def _leave_adapter(run: Run) -> None:
    """Write the adapter of a LoRA run's best weights, or of its last where no best were kept."""
    if run.module.tune["name"] != TuneLowRank.name:
        return
    if not has_base(run.module.start):
        kind = run.module.start.get("init")
        log.info("no adapter: the run started from %s weights, which no file holds", kind)
        return
    try:
        check_is_gpt2(cast(GPTBackbone, run.module.net).config, "format=adapter")
    except InputError as error:
        log.info("no adapter: %s", error)
        return
    kept = [path for name in (BEST, LAST) if (path := run.run_dir / CHECKPOINT_FOLDER / name).is_file()]
    if not kept:
        log.info("no adapter: the run kept no checkpoint")
    for path in kept:
        try:
            export_adapter(path, run.run_dir / ADAPTER)
        except InputError as error:  # a damaged checkpoint is no reason to fail a run that has finished
            log.warning("no adapter of %s: %s", path.name, error)
        else:
            log.info("adapter: %s, of %s", run.run_dir / ADAPTER, path.name)
            return


# --- steps that are not finite --------------------------------------------------------------------------


def _write_report(run: Run, error: NonFiniteError) -> None:
    """Write `nonfinite_step_51.txt` to the run's folder; its first line and the remedies go to the log."""
    if not is_first_process():
        return
    path = run.run_dir / f"nonfinite_step_{error.step}.txt"
    last = run.run_dir / CHECKPOINT_FOLDER / LAST
    good = f"last good checkpoint: {last.resolve() if last.exists() else 'none yet'}"
    write_atomically(path, "\n".join([good, *error.report, ""]))
    log.error("%s: %s", error, error.report[0])
    log.error("%s", good)
    log.error("the batch and the norms of every parameter and gradient: %s", path)


def _skipping(run: Run, error: NonFiniteError) -> str:
    return f"skip_steps={sorted({*run.config['skip_steps'], error.step})}"


def _rolled_back(run: Run, error: NonFiniteError) -> Run:
    """The run from its last good checkpoint on, without the step that failed.

    Raises the error again after `MOST_IN_A_ROW` such steps.
    """
    row = range(error.step - MOST_IN_A_ROW, error.step)
    if set(row) <= set(run.config["skip_steps"]):
        log.error(
            "steps %d to %d were not finite either: the weights are the reason, not a batch;"
            " resume from an earlier checkpoint with a lower optimizer.lr", row[0], row[-1],
        )  # fmt: skip
        raise error
    again = rolled_back(run, _skipping(run, error))
    log.warning("rolled back to step %d; step %d will be skipped", again.start_step, error.step)
    return again
