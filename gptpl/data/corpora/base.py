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
        """Hash of the kind of corpus and of all that decides its text: the files' bytes in their order.

        Of a class that reads them in its own way, and may have settings for it, the documents themselves.
        Raises InputError when a file cannot be read.
        """
        own = type(self)
        if own.read is Corpus.read and own.documents is Corpus.documents:
            return self.files_sha256()
        digest = self._digest()
        for text in self.documents():
            data = text.encode()
            digest.update(len(data).to_bytes(8))
            digest.update(data)
        return digest.hexdigest()

    def files_sha256(self) -> str:
        """Hash of the kind of corpus, the files' bytes and their order. Raises InputError as above."""
        digest = self._digest()
        for path in self.files():
            try:
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                raise unreadable(path, error) from error
        return digest.hexdigest()

    def _digest(self) -> "hashlib._Hash":
        return hashlib.sha256(f"{type(self).__module__}.{type(self).__qualname__}".encode())
