"""A run's folder: where it is, and the two records `config.yaml` and `run.json` in it."""

import json
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from yaml import YAMLError  # type: ignore[import-untyped]

from gptpl.cli.configs import config_folder
from gptpl.errors import InputError
from gptpl.files.whole import write_atomically
from gptpl.records.run_record import CONFIG_FILE, RUN_FILE

RECORDED_PACKAGES = ("gptpl", "torch", "lightning", "hydra-core", "tiktoken", "numpy")


def fresh_run_dir(name: str) -> Path:
    """`runs/<name>/<date>_<time>`; a second run within the same second gets a number behind it."""
    base = Path("runs") / name / datetime.now().astimezone().strftime("%Y-%m-%d_%H-%M-%S")
    candidate, number = base, 2
    while candidate.exists():
        candidate, number = base.with_name(f"{base.name}_{number}"), number + 1
    return candidate


def check_new_run_dir(run_dir: Path) -> None:
    """Refuses a folder that holds a run already, and one that cannot be written."""
    if (run_dir / CONFIG_FILE).exists():
        raise InputError(
            f"run_dir={run_dir} holds a run already: continue it with resume={run_dir}, or choose another"
        )
    if run_dir.exists() and not run_dir.is_dir():
        raise InputError(f"run_dir={run_dir} is a file: give a folder")
    parent = next(folder for folder in (run_dir, *run_dir.absolute().parents) if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"run_dir={run_dir} cannot be written: choose a folder you may write to")


def make_run_dir(run_dir: Path) -> None:
    """Makes the folder; raises InputError where the system refuses."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"run_dir={run_dir} cannot be made ({error.strerror}): choose a folder you may write to"
        ) from error


def write_config(run_dir: Path, config: dict[str, Any]) -> None:
    """`config.yaml`: every setting with its value, without interpolations."""
    write_atomically(run_dir / CONFIG_FILE, OmegaConf.to_yaml(OmegaConf.create(config)))


def read_config(run_dir: Path) -> dict[str, Any]:
    """The settings of an earlier run. Raises InputError where there are none."""
    path = run_dir / CONFIG_FILE
    if not path.is_file():
        raise InputError(
            f"resume={run_dir} is no run folder (it has no {CONFIG_FILE}): give one that gptpl train made"
        )
    try:
        config = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, UnicodeDecodeError, OSError):
        config = None
    if not isinstance(config, dict):
        raise InputError(f"{path} holds no settings: restore it, or start a new run")
    return {str(key): value for key, value in config.items()}


def read_run_record(run_dir: Path) -> dict[str, Any]:
    """What `run.json` holds; nothing where there is none."""
    path = run_dir / RUN_FILE
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def write_run_record(run_dir: Path, *, remove: Sequence[str] = (), **entries: Any) -> None:
    """Adds entries to `run.json`, making it where there is none, and removes others."""
    kept = {name: value for name, value in read_run_record(run_dir).items() if name not in remove}
    record = kept | entries
    write_atomically(run_dir / RUN_FILE, json.dumps(record, indent=2) + "\n")


def environment_record(arguments: list[str]) -> dict[str, Any]:
    """What a run depends on beside its settings: versions, git commit, command, hardware.

    `arguments` are those of `gptpl train`; of a sweep's trial, the ones that would run it alone.
    """
    return {
        "command": shlex.join(["gptpl", "train", *arguments]),
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
