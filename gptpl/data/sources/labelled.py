"""Labelled texts: the user's own files, or the SMS Spam Collection."""

import hashlib
import json
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path, PurePosixPath
from typing import Annotated

from gptpl.data.sources.records import Example, TextTable
from gptpl.errors import InputError
from gptpl.files.download import cache_dir, download, file_name
from gptpl.files.durable import record_file, sha256_of, write_atomically
from gptpl.settings import FREE

WHOLE = "all"
"""In place of a split's name: a table that is still to be split."""
_MOST_BYTES = 1 << 24
"""Read of a file in an archive, which can claim to hold terabytes."""


class LabelledCorpus(ABC):
    """Texts with a label each. `name` is what reports call it."""

    name: str

    @abstractmethod
    def examples(self) -> dict[str, list[Example]]:
        """The examples in order, under `WHOLE` or under the name of each split.

        Raises InputError where there are none, and as `TextTable.rows`.
        """

    def check_path(self) -> None:  # noqa: B027  # most need none
        """See `gptpl.data.sources.Corpus.check_path`."""

    def content_sha256(self) -> str:
        """Hash of the texts and labels. Raises InputError as `examples`."""
        digest = hashlib.sha256()
        for name, examples in self.examples().items():
            lines = [json.dumps([name, example.label, example.text]) for example in examples]
            digest.update("\n".join(lines).encode())
        return digest.hexdigest()


class LabelledFiles(LabelledCorpus):
    """The user's own CSV, TSV or JSONL: one file that is to be split, or a file for each split.

    Args:
        path: the one file.
        train_path, val_path, test_path: a file for each instead; the test is optional.
        text_column, label_column: names of the columns, or keys.
        format, columns: see `TextTable`.
        name: what reports call it.
    """

    def __init__(
        self,
        *,
        path: Annotated[str | None, FREE] = None,
        train_path: Annotated[str | None, FREE] = None,
        val_path: Annotated[str | None, FREE] = None,
        test_path: Annotated[str | None, FREE] = None,
        text_column: Annotated[str, FREE] = "text",
        label_column: Annotated[str, FREE] = "label",
        format: Annotated[str | None, FREE] = None,
        columns: Annotated[Sequence[str] | None, FREE] = None,
        name: str = "labelled",
    ) -> None:
        if text_column == label_column:
            raise InputError(f"data.text_column and data.label_column are both {text_column!r}: name two")
        self.name = name
        self._names = text_column, label_column
        given = {WHOLE: path, "train": train_path, "val": val_path, "test": test_path}
        self._paths = {split: each for split, each in given.items() if each}
        self._format, self._columns = format, columns

    def examples(self) -> dict[str, list[Example]]:
        """The rows of the files. Raises InputError also where not those that belong together are set."""
        return {split: list(table.rows(*self._names)) for split, table in self._tables().items()}

    def check_path(self) -> None:
        """Raise InputError as `examples` does, as far as the first row of each file tells."""
        for table in self._tables().values():
            with closing(table.rows(*self._names)) as rows:
                next(rows)

    def _tables(self) -> dict[str, TextTable]:
        if not self._paths:
            raise InputError("data.path is not set: give data.path=FILE, a labelled CSV, TSV or JSONL file")
        if WHOLE in self._paths and len(self._paths) > 1:
            _, other, *_ = self._paths
            raise InputError(f"data.path and data.{other}_path are both set: give one")
        for split in () if WHOLE in self._paths else ("train", "val"):
            if split not in self._paths:
                raise InputError(f"data.{split}_path is not set: give it, or one file as data.path")
        return {
            split: TextTable(path=Path(path).expanduser(), format=self._format, columns=self._columns)
            for split, path in self._paths.items()
        }


class SmsSpam(LabelledCorpus):
    """The SMS Spam Collection (Almeida, Gomez Hidalgo, Yamakami 2011): 5,574 messages, "ham" or "spam".

    `path` is a copy of the file `SMSSpamCollection`; None: it is downloaded once, as the `member` of the zip
    archive at `url` with the published hash `sha256`.
    """

    name = "sms_spam"

    def __init__(
        self, *, path: Annotated[str | None, FREE] = None, url: str, member: str, sha256: str
    ) -> None:
        self._path, self._url, self._member, self._sha256 = path, url, member, sha256

    def examples(self) -> dict[str, list[Example]]:
        """All messages. Raises InputError for a wrong file, or where it cannot be downloaded."""
        path = Path(self._path).expanduser() if self._path else self._extracted()
        # Quotes are characters of the messages: read as CSV, two of the lines are lost.
        table = TextTable(path=path, format="tsv", columns=("label", "text"))
        try:
            return {WHOLE: list(table.rows("text", "label"))}
        except InputError as error:
            if not self._path:
                raise
            remedy = f"; if it is not a copy of {self._member} but a file of your own, choose data=labelled"
            raise InputError(f"{error}{remedy}") from error

    def check_path(self) -> None:
        """Raise InputError for a wrong file; nothing is downloaded."""
        if self._path:
            self.examples()

    def _extracted(self) -> Path:
        path = cache_dir() / file_name(PurePosixPath(self._member).name)
        if path.is_file() and sha256_of(path) == self._sha256:
            return path
        # Nobody publishes a hash of the archive; the file in it has one.
        archive = download(self._url, sha256=None, filename=f"{self.name}.zip")
        cause: Exception | None = None
        try:
            with zipfile.ZipFile(archive) as opened, opened.open(self._member) as member:
                content = member.read(_MOST_BYTES)
            if (actual := hashlib.sha256(content).hexdigest()) == self._sha256:
                write_atomically(path, content)
                return path
            what = f"holds {self._member} with SHA-256 {actual}, not {self._sha256}"
        # Damaged, without the member, encrypted or packed in an unknown way, or with wrong bytes in it.
        except (zipfile.BadZipFile, KeyError, RuntimeError, EOFError, ValueError, zlib.error) as error:
            what, cause = f"is not an archive with {self._member} in it", error
        for useless in (archive, record_file(archive)):  # to be downloaded again
            useless.unlink(missing_ok=True)
        raise InputError(
            f"{self._url} {what}: try again later, or give a copy of the file as data.path=FILE"
        ) from cause
