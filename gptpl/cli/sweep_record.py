"""`sweep.yaml`: what a sweep is, so that its folder takes no trials of another one."""

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from gptpl.cli.run_folder import git_commit, package_version
from gptpl.errors import InputError
from gptpl.files.whole import write_atomically
from gptpl.records.sweep_folder import SWEEP_FILE
from gptpl.sweeps.space import SearchSpace, written
from gptpl.sweeps.study import Search

_PACKAGES = ("gptpl", "torch", "lightning")


@dataclass(frozen=True, kw_only=True)
class SweepRecord:
    """What makes two sweeps the same, and what their trials depend on beside it.

    Attributes:
        identity: the settings that are shared and swept, and how values are drawn.
        versions: of packages, and of gptpl's source.
        data: hashes of the texts, by their settings.
    """

    identity: dict[str, Any]
    versions: dict[str, Any]
    data: dict[str, str]

    @property
    def short_hash(self) -> str:
        """Eight hexadecimal digits that stand for the identity."""
        text = json.dumps(self.identity, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


def sweep_record(
    shared: Sequence[str], space: SearchSpace, search: Search, data: Mapping[str, str]
) -> SweepRecord:
    """Of the sweep that is asked for. How many trials it has may change later, and is no part of it."""
    drawn = {} if search.sampler == "grid" else {"seed": search.seed}
    return SweepRecord(
        identity={
            "shared": sorted(shared),
            "swept": written(space),
            "sampler": search.sampler,
            "pruner": search.pruner,
            **drawn,
        },
        versions={name: package_version(name) for name in _PACKAGES} | {"git_commit": git_commit()},
        data=dict(data),
    )


def settle(folder: Path, record: SweepRecord, arguments: Sequence[str], *, mix: bool) -> None:
    """Makes the folder the sweep's, or checks that it is: the same search, the same code, the same texts.

    Raises InputError where it is another's; of code and texts not with `mix`.
    """
    path = folder / SWEEP_FILE
    if not path.exists():
        if folder.exists() and (
            not folder.is_dir() or any(not each.name.startswith(".") for each in folder.iterdir())
        ):
            raise InputError(f"hydra.sweep.dir={folder} is there already and no sweep's: give a new folder")
        _write(path, record, arguments)
        return
    before = _read(path)
    if differences := _differences(before.identity, record.identity):
        raise InputError(
            f"{folder} holds another sweep ({'; '.join(differences)}): give another hydra.sweep.dir, or"
            " the settings that it has"
        )
    changed = _differences(before.versions, record.versions) + _differences(before.data, record.data)
    if changed and not mix:
        raise InputError(
            f"the trials in {folder} were made with other code or data ({'; '.join(changed)}): give another"
            " hydra.sweep.dir, or sweep.mix=true to go on all the same"
        )


def _write(path: Path, record: SweepRecord, arguments: Sequence[str]) -> None:
    content = {
        "command": shlex.join(["gptpl", "train", *arguments]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        **record.identity,
        "versions": record.versions,
        "data": record.data,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"hydra.sweep.dir={path.parent} cannot be made ({error.strerror}):"
            " choose a folder you may write to"
        ) from error
    write_atomically(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def _read(path: Path) -> SweepRecord:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        identity = {
            name: value
            for name, value in content.items()
            if name not in ("command", "started", "versions", "data")
        }
        return SweepRecord(identity=identity, versions=dict(content["versions"]), data=dict(content["data"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise InputError(f"{path} is damaged: restore it, or give another hydra.sweep.dir") from error


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Such as "sampler: grid there, tpe here"."""
    found = []
    for name in [*before, *(name for name in now if name not in before)]:
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
