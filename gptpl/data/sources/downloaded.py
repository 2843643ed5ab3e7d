"""A corpus of one file on the network."""

from pathlib import Path

from gptpl.data.sources.base import Corpus
from gptpl.files.download import download


class Downloaded(Corpus):
    """A text file that is downloaded once, checked, and kept in the cache folder.

    Args:
        url, sha256: http(s) address of the file, and the hash that it must have, 64 hexadecimal digits.
        name: how reports call it.
        filename: its name in the cache; None: the last part of the address.
    """

    def __init__(self, url: str, *, sha256: str, name: str, filename: str | None = None) -> None:
        self.name = name
        self._url = url
        self._sha256 = sha256
        self._filename = filename

    def files(self) -> list[Path]:
        """The cached file, downloaded first if it is not there. Raises InputError as `download` does."""
        return [download(self._url, sha256=self._sha256, filename=self._filename)]
