"""The user's own text: a file, a folder or a glob."""

import glob
from pathlib import Path
from typing import Annotated

from gptpl.data.sources.base import Corpus, unreadable
from gptpl.errors import InputError
from gptpl.resuming import FREE


class TextFiles(Corpus):
    """UTF-8 text files, one document each, sorted by path.

    Args:
        path: a file; a folder, whose files that match `pattern` are taken; or a glob such as `books/*.txt`
            (`**` for any depth). `~` is the home folder. None: `files` raises InputError.
        pattern: glob below a folder.

    Hidden files and folders are left out unless the glob names them; `**` follows no links to folders.
    """

    name = "text_file"

    def __init__(self, path: Annotated[str | Path | None, FREE] = None, pattern: str = "**/*.txt") -> None:
        self._path = path
        self._pattern = pattern

    def files(self) -> list[Path]:
        """The files. Raises InputError when the path is not set, is missing, or no file matches."""
        if self._path is None or not str(self._path):
            raise InputError("data.path is not set: name a file, folder or glob, e.g. data.path=book.txt")
        path = Path(self._path).expanduser()
        try:
            return _find(path, self._pattern)
        except OSError as error:
            raise unreadable(path, error) from error


def _find(path: Path, pattern: str) -> list[Path]:
    if path.is_file():
        return [path]
    if path.is_dir():
        if not (found := _matches(path, pattern)):
            raise InputError(f"data.path={path}: no file in this folder matches {pattern}; set data.pattern")
        return found
    if path.exists():
        raise InputError(f"data.path={path} is neither a file nor a folder: save the text in a file first")
    root, below = _split_glob(path)
    if not below:
        raise InputError(f"data.path={path} does not exist (relative to {Path.cwd()}): check the path")
    if not (found := _matches(root, below)):
        raise InputError(f"data.path={path}: no file matches this glob; check it (** is any depth)")
    return found


def _split_glob(path: Path) -> tuple[Path, str]:
    """The leading part without wildcards, and the rest; a folder whose real name is `[x]` is no wildcard."""
    root = Path(path.anchor)
    parts = list(path.relative_to(root).parts)
    while parts and (not glob.has_magic(parts[0]) or (root / parts[0]).exists()):
        root /= parts.pop(0)
    return root, "/".join(parts)


def _matches(root: Path, pattern: str) -> list[Path]:
    wants_hidden = _is_hidden(Path(pattern))
    try:
        found = set(root.glob(pattern))
    except (ValueError, NotImplementedError) as error:  # how pathlib refuses a pattern
        raise InputError(f"{pattern!r} is not a glob below a folder ({error}): try '**/*.txt'") from error
    return sorted(
        path for path in found if path.is_file() and (wants_hidden or not _is_hidden(path.relative_to(root)))
    )


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
