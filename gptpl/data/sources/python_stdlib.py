"""The running interpreter's own source: tens of MB of real text that every machine has."""

import hashlib
import logging
import os
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from gptpl.data.sources.base import Corpus, not_blank
from gptpl.errors import InputError

log = logging.getLogger(__name__)

_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__"})


class PythonStdlib(Corpus):
    """Every `.py` file of the standard library, its tests included, one document each.

    The order is that of the SHA-256 of the path below the library: the same on every machine, and the
    validation part, which is the end of the corpus, is a random sample of the files and not the end of the
    alphabet. `root` is the folder of the library; None: the running interpreter's.
    """

    name = "python_stdlib"

    def __init__(self, root: str | Path | None = None) -> None:
        self._root = Path(root or sysconfig.get_path("stdlib"))
        self._reported = False

    def files(self) -> list[Path]:
        """All `.py` files, also those that `documents` skips. Raises InputError where there are none."""
        found = []
        for folder, subfolders, names in os.walk(self._root):
            subfolders[:] = [name for name in subfolders if name not in _NOT_STDLIB]
            found += [Path(folder, name) for name in names if name.endswith(".py")]
        if not found:
            raise InputError(f"{self._root} holds no .py files: choose another data=...")
        return sorted(found, key=self._place)

    def read(self, path: Path) -> str:
        """Text of a file in the encoding that it declares (PEP 263). Raises InputError where it has none."""
        try:
            with tokenize.open(path) as file:
                text = file.read()
        except (OSError, SyntaxError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read {path} ({error}): it is not a Python source file") from error
        if "\0" in text:
            raise InputError(f"{path} is binary: it is not a Python source file")
        return not_blank(text, path)

    def documents(self) -> Iterator[str]:
        """Text of every file that has one; empty ones and broken encodings are skipped and counted."""
        skipped = 0
        files = self.files()
        for path in files:
            try:
                text = self.read(path)
            except InputError as error:  # the library ships such files on purpose, to test the compiler with
                log.debug("skipped: %s", error)
                skipped += 1
            else:
                yield text
        if skipped and not self._reported:
            log.info("python_stdlib: %d of %d files skipped, empty or not decodable", skipped, len(files))
            self._reported = True

    def content_sha256(self) -> str:
        """Hash of the files: nothing else decides how they are read."""
        return self.files_sha256()

    def _place(self, path: Path) -> bytes:
        return hashlib.sha256(path.relative_to(self._root).as_posix().encode()).digest()
