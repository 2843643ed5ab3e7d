"""Where labelled texts come from: the user's own files, or the SMS Spam Collection."""

import hashlib
import json
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated

from gptpl.data.classification.table import Example, Table
from gptpl.errors import InputError
from gptpl.files.download import cache_dir, download, file_name
from gptpl.files.durable import record_file, sha256_of, write_atomically
from gptpl.resuming import FREE

_MOST_BYTES = 1 << 24
"""So much is read of a file in an archive: an archive can say that it holds terabytes."""
WHOLE = "all"
"""In place of a split's name: a table that is still to be split."""


class LabelledCorpus(ABC):
    """Tables with a text and a label in each row. `name` stands for it in reports."""

    name: str
    text_column: str
    label_column: str

    @abstractmethod
    def tables(self) -> dict[str, Table]:
        """One table under `WHOLE`, or one for each split. Raises InputError when there are none."""

    def content_sha256(self) -> str:
        """Hash of what is read of the tables. Raises InputError as `examples` does."""
        digest = hashlib.sha256()
        for name, examples in self.examples().items():
            lines = [json.dumps([name, example.label, example.text]) for example in examples]
            digest.update("\n".join(lines).encode())
        return digest.hexdigest()

    def examples(self) -> dict[str, list[Example]]:
        """All rows of the tables in order. Raises InputError as `Table.rows` does."""
        columns = self.text_column, self.label_column
        return {name: list(table.rows(*columns)) for name, table in self.tables().items()}


class LabelledFiles(LabelledCorpus):
    """The user's own CSV, TSV or JSONL: one file that is to be split, or a file for each split.

    Args:
        path: the one file.
        train_path, val_path, test_path: a file for each, instead; there need be no test.
        text_column, label_column: names of the columns, or keys.
        format, columns: see `Table`.
        name: how reports call it.
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
            raise InputError(
                f"data.text_column and data.label_column are both {text_column!r}: name two columns"
            )
        self.name = name
        self.text_column, self.label_column = text_column, label_column
        self._path = path
        self._given = {"train": train_path, "val": val_path, "test": test_path}
        self._format, self._columns = format, columns

    def tables(self) -> dict[str, Table]:
        """The files. Raises InputError where none are set, or some of those that belong together."""
        given: dict[str, str] = {name: path for name, path in self._given.items() if path}
        if self._path and given:
            name, path = next(iter(given.items()))
            raise InputError(f"data.path={self._path} and data.{name}_path={path} are both set: give one")
        if self._path:
            return {WHOLE: self._table(self._path)}
        if not given:
            raise InputError("data.path is not set: give data.path=FILE, a labelled CSV, TSV or JSONL file")
        if missing := [name for name in ("train", "val") if name not in given]:
            raise InputError(f"data.{missing[0]}_path is not set: give it, or one file as data.path")
        return {name: self._table(path) for name, path in given.items()}

    def _table(self, path: str) -> Table:
        return Table(path=Path(path).expanduser(), format=self._format, columns=self._columns)


class SmsSpam(LabelledCorpus):
    """The SMS Spam Collection (Almeida, Gomez Hidalgo, Yamakami 2011): 5,574 messages, "ham" or "spam".

    `path` is a copy of the file `SMSSpamCollection`; None: it is downloaded once, as the `member` of the zip
    archive at `url` whose published hash is `sha256`.
    """

    name = "sms_spam"
    text_column = "text"
    label_column = "label"

    def __init__(
        self, *, path: Annotated[str | None, FREE] = None, url: str, member: str, sha256: str
    ) -> None:
        self._path, self._url, self._member, self._sha256 = path, url, member, sha256

    def tables(self) -> dict[str, Table]:
        """The one file. Raises InputError where it cannot be had, or what comes is not the published one."""
        path = Path(self._path).expanduser() if self._path else self._extracted()
        # Quotes are characters of the messages: what reads them as CSV's loses two of the lines.
        return {WHOLE: Table(path=path, format="tsv", columns=(self.label_column, self.text_column))}

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
            what, cause = f"is no archive with {self._member} in it", error
        for useless in (archive, record_file(archive)):  # so that another one can come
            useless.unlink(missing_ok=True)
        raise InputError(
            f"{self._url} {what}: try again later, or give a copy of the file as data.path=FILE"
        ) from cause
