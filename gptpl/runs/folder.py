"""A run's folder: where it is, and the two records `config.yaml` and `run.json` in it."""

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from gptpl.config.groups import config_folder
from gptpl.errors import InputError
from gptpl.records import run_record
from gptpl.records.run_record import CONFIG_FILE, is_run

RECORDED_PACKAGES = ("gptpl", "torch", "lightning", "hydra-core", "tiktoken", "numpy")


PROCESS_RUN_DIR = "GPTPL_RUN_DIR"
"""Tells the processes that Lightning starts for other devices which folder the first one chose."""


def is_worker_process() -> bool:
    """Whether this process trains for a further device of a run whose first process is another one.

    By the ranks that Lightning's launcher, torchrun and SLURM set. The folder alone says nothing: anybody may
    have exported it.
    """
    for name in ("RANK", "SLURM_PROCID"):
        if os.environ.get(name, "").isdigit() and (name == "RANK" or "SLURM_NTASKS" in os.environ):
            return int(os.environ[name]) > 0
    ranks = [os.environ.get(name, "0") for name in ("LOCAL_RANK", "NODE_RANK")]
    return any(rank not in ("", "0") for rank in ranks)


def process_run_dir() -> Path | None:
    """The folder that the first process chose, in the processes that it started; None in a first process."""
    given = os.environ.get(PROCESS_RUN_DIR)
    return Path(given) if given and is_worker_process() else None


def read_config(run_dir: Path) -> dict[str, Any]:
    """The settings of an earlier run. Raises InputError where there are none."""
    if not is_run(run_dir):
        raise InputError(
            f"resume={run_dir} is no run folder (it has no {CONFIG_FILE}): give one that gptpl train made"
        )
    return run_record.read_config(run_dir, needs=("data", "model", "optimizer", "scheduler", "trainer"))


def write_run_record(run_dir: Path, *, remove: Sequence[str] = (), **entries: Any) -> None:
    """Adds entries to `run.json`, making it where there is none, and removes others."""
    run_record.write_run_json(run_dir, entries, remove=remove)


def environment_record(command: str) -> dict[str, Any]:
    """What a run depends on beside its settings: versions, git commit, command, hardware."""
    return {
        "command": command,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()}
        | {name: package_version(name) for name in RECORDED_PACKAGES},
        "git_commit": git_commit(),
        "hardware": {
            "platform": platform.platform(),
            "cpu_threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
    }


def package_version(package: str) -> str | None:
    """The installed version; None where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """The commit of the checkout gptpl runs from, marked where files differ from it; None outside."""
    source = config_folder().resolve()
    if source.name != "conf":  # installed from a wheel: a repository around it is another project's
        return None
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=source,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()
