"""What `gptpl train` does about a step whose loss or gradient is not finite: report, stop, or roll back."""

import logging
import shlex

from omegaconf import DictConfig

from gptpl.cli.build import Run, build_run, is_worker_process
from gptpl.errors import InputError
from gptpl.files.whole import write_atomically
from gptpl.training.checkpoint_files import LAST
from gptpl.training.non_finite import NonFiniteError

log = logging.getLogger(__name__)

STOP, ROLLBACK = "stop", "rollback"
MOST_IN_A_ROW = 3
"""Skipped steps in a row after which the weights, and not the batches, are to blame."""


def check_on_nonfinite(cfg: DictConfig) -> None:
    """Raises InputError for values of `on_nonfinite` and `skip_steps` that are none."""
    if cfg.on_nonfinite not in (STOP, ROLLBACK):
        raise InputError(f"on_nonfinite={cfg.on_nonfinite} is unknown: choose {STOP} or {ROLLBACK}")
    if any(step < 1 for step in cfg.skip_steps):
        raise InputError(f"skip_steps={cfg.skip_steps}: optimizer steps are counted from 1")


def check_rollback(run: Run) -> None:
    """Raises InputError for a run that cannot be rolled back and is asked to."""
    if run.config["on_nonfinite"] == ROLLBACK and run.trainer.world_size > 1:
        raise InputError(
            f"on_nonfinite={ROLLBACK} restarts the training within one process, this run has"
            f" {run.trainer.world_size}: use on_nonfinite={STOP}, which says how to skip the step"
        )


def write_report(run: Run, error: NonFiniteError) -> None:
    """`nonfinite_step_51.txt` in the run's folder, its beginning and the remedies in the log."""
    if is_worker_process():
        return
    path = run.run_dir / f"nonfinite_step_{error.step}.txt"
    last = run.run_dir / "checkpoints" / LAST
    good = f"last good checkpoint: {last.resolve() if last.exists() else 'none yet'}"
    write_atomically(path, "\n".join([good, *error.report, ""]))
    log.error("%s: %s", error, error.report[0])
    log.error("%s", good)
    log.error("the batch and the norms of every parameter and gradient: %s", path)


def remedy(run: Run, error: NonFiniteError) -> str:
    """How to go on without the step."""
    skipped = sorted({*run.config["skip_steps"], error.step})
    return (
        "lower optimizer.lr, or leave the step out:"
        f" gptpl train {shlex.quote(f'resume={run.run_dir}')} 'skip_steps={skipped}'"
        f" (on_nonfinite={ROLLBACK} does it by itself)"
    )


def rolled_back(run: Run, cfg: DictConfig, error: NonFiniteError) -> Run:
    """The run from its last good checkpoint on, without the step that failed.

    `cfg` is what Hydra composed for the command. Raises the error again where that has been tried too often.
    """
    skipped = sorted({*run.config["skip_steps"], error.step})
    row = range(error.step - MOST_IN_A_ROW, error.step)
    if set(row) <= set(run.config["skip_steps"]):
        log.error(
            "steps %d to %d were not finite either: the weights are the reason, not a batch;"
            " resume from an earlier checkpoint with a lower optimizer.lr", row[0], row[-1],
        )  # fmt: skip
        raise error
    cfg.resume = str(run.run_dir)
    cfg.skip_steps = skipped
    again = build_run(cfg, overrides=[f"skip_steps={skipped}"])
    log.warning(
        "rolled back to step %d; step %d leaves the weights as they are", again.start_step, error.step
    )
    return again
