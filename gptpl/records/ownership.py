"""What is gptpl's: folders that it made, and the files that it writes into them."""

import json
import re
from pathlib import Path
from typing import Any

from gptpl.records.disk import DiskUse
from gptpl.records.run_record import CONFIG_FILE, RUN_FILE, RunError, is_run, parse_yaml, read_mapping
from gptpl.records.sweep_folder import is_sweep, trials

_OWN = re.compile(
    r"(.*/)?\.[^/]+\.tmp|metrics\.csv\.tmp"  # what a write that was cut short leaves
    r"|(config\.yaml|run\.json|metrics\.csv|samples\.jsonl|steps\.jsonl|train\.log|(loss|confusion|calibration)\.png)"
    r"|data/(train|validation|test)\.csv"
    r"|report(\.html|\.md|-.*\.png)"
    r"|(scores|comparison)(\.json|\.png)|judgements\.jsonl"
    r"|data/(train|validation|test)\.json"
    r"|nonfinite_step_\d+\.txt"
    r"|checkpoints/(best|last|step-\d+)\.ckpt(\.sha256)?(\.damaged)?"
    r"|adapter/(adapter_model\.safetensors|adapter_config\.json|gptpl\.json)"
    r"|tensorboard/(.*/)?(events\.out\.tfevents\..*|hparams\.yaml)"
)
"""The files of a run, by their paths in its folder."""

_OWN_OF_SWEEP = re.compile(
    r"results\.csv|multirun\.yaml|sweep\.yaml|sweep\.db(-journal)?|\.[^/]+\.tmp"
    r"|report(\.html|\.md|-.*\.png)"
    r"|output/\d+\.(log|stop)|\.workers/[^/]+\.lock|\.slurm/.*"
)
"""The files of a sweep's folder that are no trial's."""


def is_gptpls(folder: Path) -> bool:
    """Whether a folder is a run or a sweep of gptpl's by more than its files' names.

    Many programs write a `config.yaml`.
    """
    if is_sweep(folder):
        return True
    of_config = _keys(folder / CONFIG_FILE, parse_yaml) >= {"run_dir", "model", "trainer"}
    return is_run(folder) and (of_config or _keys(folder / RUN_FILE, json.loads) >= {"command", "versions"})


def foreign_files(folder: Path, use: DiskUse) -> list[str]:
    """The files of a run's or a sweep's folder that gptpl did not write, as far as names tell."""
    runs = [] if is_run(folder) else [run.name for run in trials(folder)]
    return [name for name in use.files if not _is_own(name, runs, of_run=is_run(folder))]


def _is_own(name: str, trial_names: list[str], *, of_run: bool) -> bool:
    first, _, rest = name.partition("/")
    if of_run or first in trial_names:
        return _OWN.fullmatch(name if of_run else rest) is not None
    return _OWN_OF_SWEEP.fullmatch(name) is not None


def _keys(path: Path, parse: Any) -> set[str]:
    try:
        return set(read_mapping(path, parse))
    except RunError:
        return set()
