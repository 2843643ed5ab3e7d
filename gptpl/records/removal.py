"""Runs removed: out of sight in one move, and only then file by file."""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from gptpl.records.disk import CHECKPOINT_FOLDER, DiskUse
from gptpl.records.run_record import RunError, RunRecord, read_run

BEST = "best.ckpt"


def rest_of(folder: Path) -> Path:
    """Where a folder lies while it is removed: beside it, hidden, so that no command takes it for a run."""
    return folder.with_name(f".{folder.name}.removed")


def _folder_of_rest(hidden: Path) -> Path | None:
    """The inverse of `rest_of`; None for a folder that is not such a one."""
    name = hidden.name
    own = name.startswith(".") and name.endswith(".removed") and len(name) > len("..removed")
    return hidden.with_name(name[1 : -len(".removed")]) if own else None


def rests_below(folder: Path) -> list[Path]:
    """What interrupted removals left below a folder: the folders that were being removed."""
    hidden = sorted(path for path in folder.rglob(".*.removed") if path.is_dir() and not path.is_symlink())
    return [removed for path in hidden if (removed := _folder_of_rest(path)) is not None]


def remove_folder(folder: Path) -> None:
    """Removes a folder. Others see it whole or not at all; what an interruption leaves, the next call takes.

    Links in it are removed, and not what they point at.
    """
    hidden = rest_of(folder)
    if hidden.is_dir():
        shutil.rmtree(hidden)
    if folder.is_dir():
        folder.rename(hidden)
        shutil.rmtree(hidden)


def needless_checkpoints(use: DiskUse) -> Mapping[str, int]:
    """The checkpoints but `best.ckpt`, with their sizes in bytes, by name, the order to remove them in.

    So `last.ckpt` goes before what it points at, and a file before its SHA-256.
    """
    best = f"{CHECKPOINT_FOLDER}/{BEST}"
    return {name: size for name, size in use.checkpoints.items() if name not in (best, f"{best}.sha256")}


def remove_checkpoints(run: Path, use: DiskUse) -> None:
    """Removes them, one after the other: what is left of an interrupted removal are whole files."""
    for name in needless_checkpoints(use):
        (run / name).unlink(missing_ok=True)


def dependents(doomed: Sequence[Path], among: Iterable[Path]) -> list[tuple[RunRecord, Path]]:
    """The runs among others that began with weights in one of the doomed folders, with the weights' file.

    Doomed ones are left out; one that cannot be read depends on nothing.
    """
    folders = [folder.resolve() for folder in doomed]
    others = {run.resolve(): run for run in among}
    kept = [run for full, run in others.items() if not any(full.is_relative_to(each) for each in folders)]
    found = [(record, _first_weights(record)) for run in kept if (record := _readable(run)) is not None]
    return [
        (record, place)
        for record, place in found
        if place is not None and any(place.is_relative_to(folder) for folder in folders)
    ]


def _readable(run: Path) -> RunRecord | None:
    try:
        return read_run(run)
    except (RunError, OSError):
        return None


def _first_weights(record: RunRecord) -> Path | None:
    start = record.record.get("start")
    place = (start.get("checkpoint") or start.get("path")) if isinstance(start, Mapping) else None
    return Path(place) if isinstance(place, str) else None
