"""Plain text: the story that ships with the package, a download, and the user's own files."""

import glob
import hashlib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Annotated

from gptpl.data.sources.base import Corpus, unreadable, utf8_lines
from gptpl.data.sources.records import JSON_LINES, json_lines
from gptpl.errors import InputError
from gptpl.files.download import download
from gptpl.settings import FREE


class Tale(Corpus):
    """A story of 20-30 KB of English prose, written for this project and shipped with it."""

    name = "tale"

    def files(self) -> list[Path]:
        """The one file, inside the installed package."""
        return [Path(str(resources.files("gptpl.data") / "texts" / "tale.txt"))]


class Downloaded(Corpus):
    """A text file that is downloaded once, checked, and kept in the cache folder.

    Args:
        url, sha256: http(s) address of the file, and the hash that it must have, 64 hexadecimal digits.
        name: what reports call it.
        filename: its name in the cache; None: the last part of the address.
    """

    def __init__(self, url: str, *, sha256: str, name: str, filename: str | None = None) -> None:
        self.name = name
        self._url = url
        self._sha256 = sha256
        self._filename = filename

    def files(self) -> list[Path]:
        """The cached file, downloaded first if it is not there. Raises InputError as `download`."""
        return [download(self._url, sha256=self._sha256, filename=self._filename)]


class TextFiles(Corpus):
    """The user's own UTF-8 files, sorted by path: one document each, of JSON Lines one a line.

    Args:
        path: a file; a folder, whose files that match `pattern` are taken; or a glob such as `books/*.txt`
            (`**` for any depth). `~` is the home folder. None: `files` raises InputError.
        pattern: glob below a folder.
        field: key of the text in the objects of `.jsonl` and `.ndjson` files; None: these are plain text too.

    Hidden files and folders are left out unless the glob names them; `**` follows no links to folders.
    """

    name = "text_file"

    def __init__(
        self,
        path: Annotated[str | Path | None, FREE] = None,
        pattern: str = "**/*.txt",
        field: Annotated[str | None, FREE] = "text",
    ) -> None:
        self._path = path
        self._pattern = pattern
        self._field = field

    def files(self) -> list[Path]:
        """The files. Raises InputError where the path is not set, is missing, or no file matches."""
        path = given_path(self._path, "a file, folder or glob, e.g. data.path=book.txt")
        try:
            if path.is_file():
                return [path]
            root, pattern = (path, self._pattern) if path.is_dir() else _split_glob(path)
            found = _matches(root, pattern)
        except OSError as error:
            raise unreadable(path, error) from error
        if not found:
            raise InputError(
                f"data.path={path}: no file matches {pattern}: check the path, or set data.pattern"
            )
        return found

    def documents(self) -> Iterator[str]:
        """The text of each file or line. Raises InputError for a line without a text in `field`."""
        for path in self.files():
            if self._field is not None and path.suffix.lower() in JSON_LINES:
                for record in json_lines(utf8_lines(path), path):
                    yield record.text(self._field, "set data.field to the key of the text")
            else:
                yield self.read(path)

    def content_sha256(self) -> str:
        """Hash of the bytes of the files, and of the field that is read of JSON Lines."""
        own = type(self)
        if own.read is not Corpus.read or own.documents is not TextFiles.documents:
            return super().content_sha256()
        sha256 = self.files_sha256()
        if self._field is None or not any(path.suffix.lower() in JSON_LINES for path in self.files()):
            return sha256
        return hashlib.sha256(f"{sha256} {self._field}".encode()).hexdigest()


class InstructionFile(Corpus):
    """The user's own instructions, a JSON or JSON Lines file; `~` is the home folder."""

    name = "instruction_file"

    def __init__(self, path: Annotated[str | Path | None, FREE] = None) -> None:
        self._path = path

    def files(self) -> list[Path]:
        """The file. Raises InputError where the path is not set, or is not a file."""
        path = given_path(self._path, "a JSON or JSON Lines file, e.g. data.path=mine.json")
        if not path.is_file():
            what = "is a folder" if path.is_dir() else f"does not exist (relative to {Path.cwd()})"
            raise InputError(f"data.path={path} {what}: name a JSON or JSON Lines file")
        return [path]


def given_path(path: str | Path | None, what: str) -> Path:
    """The path with `~` resolved. Raises InputError where it is not set."""
    if path is None or not str(path):
        raise InputError(f"data.path is not set: name {what}")
    return Path(path).expanduser()


def _split_glob(path: Path) -> tuple[Path, str]:
    """The leading part without wildcards, and the rest; brackets in the name of an existing folder are none.

    Raises InputError where nothing is left that could match files.
    """
    root = Path(path.anchor)
    parts = list(path.relative_to(root).parts)
    while parts and (not glob.has_magic(parts[0]) or (root / parts[0]).exists()):
        root /= parts.pop(0)
    if not parts:
        what = "is neither a file nor a folder" if path.exists() else "does not exist"
        raise InputError(f"data.path={path} {what} (relative to {Path.cwd()}): check the path")
    return root, "/".join(parts)


def _matches(root: Path, pattern: str) -> list[Path]:
    def hidden(path: Path) -> bool:
        return any(part.startswith(".") for part in path.parts)

    try:
        found = [path for path in set(root.glob(pattern)) if path.is_file()]
    except (ValueError, NotImplementedError) as error:  # how pathlib refuses a pattern
        raise InputError(f"{pattern!r} is not a glob below a folder ({error}): try '**/*.txt'") from error
    return sorted(path for path in found if hidden(Path(pattern)) or not hidden(path.relative_to(root)))
