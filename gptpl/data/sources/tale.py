"""The story that ships with the package: the default corpus, and never a download."""

from importlib import resources
from pathlib import Path

from gptpl.data.sources.base import Corpus


class Tale(Corpus):
    """One story of 20-30 KB of English prose, written for this project."""

    name = "tale"

    def files(self) -> list[Path]:
        """The one file, inside the installed package."""
        return [Path(str(resources.files("gptpl.data") / "texts" / "tale.txt"))]
