"""The user's own file of entries, one a line or in a list."""

from pathlib import Path
from typing import Annotated

from gptpl.data.sources.base import Corpus
from gptpl.errors import InputError
from gptpl.resuming import FREE


class InstructionFile(Corpus):
    """A JSON or JSON Lines file; `~` is the home folder. Without a path `files` raises InputError."""

    name = "instruction_file"

    def __init__(self, path: Annotated[str | Path | None, FREE] = None) -> None:
        self._path = path

    def files(self) -> list[Path]:
        """The file. Raises InputError when the path is not set, or is no file."""
        if self._path is None or not str(self._path):
            raise InputError("data.path is not set: name a JSON or JSON Lines file, e.g. data.path=mine.json")
        path = Path(self._path).expanduser()
        if not path.is_file():
            what = "is a folder" if path.is_dir() else f"does not exist (relative to {Path.cwd()})"
            raise InputError(f"data.path={path} {what}: name a JSON or JSON Lines file")
        return [path]
