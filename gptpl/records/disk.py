"""What a folder takes on disk."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

CHECKPOINT_FOLDER = "checkpoints"


@dataclass(frozen=True, kw_only=True)
class DiskUse:
    """The sizes, in bytes, of the files below a folder, by their paths in it; 0 for a link."""

    files: Mapping[str, int]
    newest: float
    """When the last of them was written, in seconds since 1970; 0 where there is none."""

    @property
    def total(self) -> int:
        """All files, in bytes."""
        return sum(self.files.values())

    @property
    def checkpoints(self) -> Mapping[str, int]:
        """Those of a run's checkpoints."""
        return {name: size for name, size in self.files.items() if name.startswith(f"{CHECKPOINT_FOLDER}/")}


def disk_use(folder: Path) -> DiskUse:
    """Measures a folder. A file with two names counts once; links are not followed.

    What vanishes meanwhile, as the files of a running run do, counts nothing, nor what may not be read.
    """
    files: dict[str, int] = {}
    newest = 0.0
    seen: set[tuple[int, int]] = set()
    for entry in _entries(folder):
        try:
            found = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            continue
        again = entry.is_symlink() or (found.st_dev, found.st_ino) in seen
        seen.add((found.st_dev, found.st_ino))
        files[Path(entry.path).relative_to(folder).as_posix()] = 0 if again else found.st_size
        newest = max(newest, found.st_mtime)
    return DiskUse(files=dict(sorted(files.items())), newest=newest)


def _entries(folder: Path) -> Iterator["os.DirEntry[str]"]:
    """All that is below a folder but folders themselves; of links only the links."""
    try:
        with os.scandir(folder) as entries:
            found = list(entries)
    except (FileNotFoundError, PermissionError):
        return
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            yield from _entries(Path(entry.path))
        else:
            yield entry
