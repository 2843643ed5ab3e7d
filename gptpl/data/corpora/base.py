"""What every corpus promises: a list of files in a stable order, and the text in each."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

from gptpl.data.corpora.reading import read_utf8, unreadable


class Corpus(ABC):
    """Documents, one a file, always in the same order. `name` stands for it in reports."""

    name: str

    @abstractmethod
    def files(self) -> list[Path]:
        """The files in their order, downloaded if need be. Raises InputError when there are none."""

    def read(self, path: Path) -> str:
        """Text of one of the files. Raises InputError that names the file and the remedy when it has none."""
        return read_utf8(path)

    def documents(self) -> Iterator[str]:
        """Text of every file in order, one at a time."""
        for path in self.files():
            yield self.read(path)

    def content_sha256(self) -> str:
        """Hash of the files' bytes, their order and the kind of corpus, which decides how they are read.

        Raises InputError when a file cannot be read.
        """
        digest = hashlib.sha256(f"{type(self).__module__}.{type(self).__qualname__}".encode())
        for path in self.files():
            try:
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                raise unreadable(path, error) from error
        return digest.hexdigest()
