"""The folder of a run's checkpoints: which to keep, which is the newest, and which can be trusted."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from gptpl.errors import InputError
from gptpl.files.durable import record_file, sync_folder
from gptpl.files.plain import read_plain
from gptpl.training.checkpoint_io import verify

LAST = "last.ckpt"
EXPORTED = "model.ckpt"
"""What an export in gptpl's own format is called."""
_STEP_FILE = re.compile(r"step-(\d+)\.ckpt")


@dataclass(frozen=True, kw_only=True)
class Damaged:
    """A checkpoint that cannot be used, and why, in words that follow its name: "is missing"."""

    path: Path
    reason: str


@dataclass(frozen=True, kw_only=True)
class GoodCheckpoint:
    """The newest checkpoint that can be used."""

    path: Path
    step: int
    """-1 for the only file of an older format, which has no step in its name."""
    damaged: list[Damaged]
    """Newer ones that cannot."""
    unverified: bool
    """Whether no SHA-256 is recorded for it, so that it could only be read."""


def checkpoint_file(given: str, *, key: str = "checkpoint") -> Path:
    """The file meant by a setting: itself, or of a run's folder `last.ckpt`, else `best.ckpt`.

    Of the folder of an export it is `model.ckpt`. Raises InputError for a folder without any of them.
    """
    path = Path(given).expanduser()
    if not path.is_dir():
        return path
    for candidate in (f"checkpoints/{LAST}", "checkpoints/best.ckpt", EXPORTED):
        if (path / candidate).is_file():
            return path / candidate
    raise InputError(
        f"{key}={given} holds no checkpoints/last.ckpt or best.ckpt: give a run folder or a .ckpt file"
    )


class CheckpointFolder:
    """`step-00000050.ckpt`, the newest `keep` of them by step, and `last.ckpt`, a link to the newest.

    The times of the files play no role: a clock may go back.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        if keep < 1:
            raise InputError(f"callbacks.checkpoint_last.keep={keep} keeps no checkpoint: give 1 or more")
        self.folder = folder
        self.keep = keep

    def path(self, step: int) -> Path:
        """The file of a step."""
        return self.folder / f"step-{step:08d}.ckpt"

    def steps(self) -> list[int]:
        """The steps of the files that are there, ascending."""
        names = [path.name for path in self.folder.glob("step-*.ckpt")]
        return sorted(int(match[1]) for name in names if (match := _STEP_FILE.fullmatch(name)))

    def settle(self, step: int) -> None:
        """To be called when the file of `step` is written: `last.ckpt` becomes it, the oldest are removed."""
        _link(self.path(step), self.folder / LAST)
        sync_folder(self.folder)
        for old in [other for other in self.steps() if other != step][: -self.keep + 1 or None]:
            self.path(old).unlink(missing_ok=True)
            record_file(self.path(old)).unlink(missing_ok=True)

    def newest_good(self) -> GoodCheckpoint | None:
        """The newest file that is whole, by its SHA-256; None where there is none at all.

        Raises InputError where there are some, and all are damaged.
        """
        last = self.folder / LAST
        damaged: list[Damaged] = []
        if last.is_symlink() and not last.exists():
            damaged.append(Damaged(path=self.folder / last.readlink(), reason="is missing"))
        candidates = [(step, self.path(step)) for step in reversed(self.steps())]
        if not candidates and last.is_file():
            candidates = [(-1, last)]  # of an older format
        for step, path in candidates:
            reason, unverified = _checked(path)
            if reason is None:
                return GoodCheckpoint(path=path, step=step, damaged=damaged, unverified=unverified)
            damaged.append(Damaged(path=path, reason=reason))
        if not damaged:
            return None
        others = f", and {len(damaged) - 1} more cannot be used either" if len(damaged) > 1 else ""
        whole = whole_beside(damaged[0].path)
        new = f"start a new run from init=run init.checkpoint={whole}" if whole else "start a new run"
        raise InputError(f"checkpoint {damaged[0].path} {damaged[0].reason}{others}: restore one, or {new}")


def whole_beside(path: Path) -> Path | None:
    """Another checkpoint of the folder that is whole, by its SHA-256: the best, else the newest."""
    folder = CheckpointFolder(path.parent, keep=1)
    others = [path.parent / "best.ckpt", *(folder.path(step) for step in reversed(folder.steps()))]
    for other in others:
        if other.is_file() and other.resolve() != path.resolve():
            with suppress(FileNotFoundError):
                if verify(other) is None:
                    return other
    return None


@contextmanager
def whole_one_named(path: Path) -> Iterator[None]:
    """Where a checkpoint turns out to be no good, the error names one beside it that is."""
    try:
        yield
    except InputError as error:
        fact, found, _ = str(error).rpartition("use another ")
        whole = whole_beside(path) if found else None
        if whole is None:
            raise
        raise InputError(f"{fact}use {whole}, which is whole") from error


def set_aside(damaged: Sequence[Damaged]) -> None:
    """Renames them to `*.damaged`, so that they neither count as the newest nor are overwritten."""
    for item in damaged:
        for path in (item.path, record_file(item.path)):
            with suppress(FileNotFoundError):
                path.replace(path.with_name(f"{path.name}.damaged"))


def _checked(path: Path) -> tuple[str | None, bool]:
    """Why a file cannot be used (None: it can), and whether that could not be told by its SHA-256."""
    try:
        return verify(path), False
    except FileNotFoundError:
        return _unreadable(path), True


def _unreadable(path: Path) -> str | None:
    try:
        read_plain(path)
    except InputError as error:
        return str(error).removeprefix(f"{path} ").rpartition(": ")[0]
    return None


def _link(target: Path, link: Path) -> None:
    """Makes `link` point at a file of its folder, in one move."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(target.name)
    except (OSError, NotImplementedError):  # Windows, FAT
        os.link(target, temporary)
    try:
        temporary.replace(link)
    finally:
        temporary.unlink(missing_ok=True)
