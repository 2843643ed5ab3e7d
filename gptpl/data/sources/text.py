"""Plain text: the story that ships with the package, a download, your own files; secrets planted in them."""

import fnmatch
import glob
import hashlib
import logging
import os
import random
import re
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated

from gptpl.data.sources.base import (
    Corpus,
    Files,
    Piece,
    Refused,
    Section,
    class_name,
    listed,
    not_blank,
    unreadable,
    utf8_lines,
)
from gptpl.data.sources.formats import is_compressed, kind_of, pieces_of, sections
from gptpl.data.sources.records import json_lines
from gptpl.errors import InputError
from gptpl.files.download import download
from gptpl.settings import FREE

log = logging.getLogger(__name__)

_TEXT = "a file, folder or glob, e.g. data.path=book.txt"


class Tale(Corpus):
    """A story of 20-30 KB of English prose, written for this project and shipped with it."""

    name = "tale"

    def files(self) -> list[Path]:
        """The one file, inside the installed package."""
        return [Path(str(resources.files("gptpl.data") / "texts" / "tale.txt"))]


@dataclass(eq=False)
class Downloaded(Corpus):
    """A text file that is downloaded once, checked, and kept in the cache folder.

    Args:
        url, sha256: http(s) address of the file, and the hash that it must have, 64 hexadecimal digits.
        name: what reports call it.
        filename: its name in the cache; None: the last part of the address.
    """

    url: str
    sha256: str
    name: str
    filename: str | None = None

    def files(self) -> list[Path]:
        """The cached file, downloaded first if it is not there. Raises InputError as `download`."""
        return [download(self.url, sha256=self.sha256, filename=self.filename)]


class TextFiles(Corpus):
    """The user's own UTF-8 text, JSON Lines or Parquet, also compressed (.gz, .zst), sorted by path.

    A text file is one document, and so is the text of a line of JSON Lines, or of a row of Parquet.

    Args:
        path: a file; a folder, whose files that match `pattern` are taken; or a glob such as `books/*.txt`
            (`**` for any depth). `~` is the home folder. None: `files` raises InputError.
        pattern: glob below a folder; None: all that are text, JSON Lines or Parquet by their suffix, of which
            a folder may hold one kind.
        field: key of the text in the objects of `.jsonl` and `.ndjson` files, and its column in Parquet;
            None: JSON Lines are plain text too.
        name: what reports call it; None: as the class says.

    Hidden files and folders are left out unless the glob names them; `**` follows no links to folders.
    """

    name = "text_file"

    def __init__(
        self,
        path: Annotated[str | Path | None, FREE] = None,
        pattern: str | None = "**/*.txt",
        field: Annotated[str | None, FREE] = "text",
        name: Annotated[str | None, FREE] = None,
    ) -> None:
        self.name = name or self.name
        self._path = path
        self._pattern = pattern
        self._field = field

    def files(self) -> list[Path]:
        """The files. Raises InputError where the path is not set, is missing, or no file matches."""
        return [Path(path) for path in self._paths()]

    def listing(self) -> Files:
        """See `Corpus`."""
        return listed(self._paths())

    def check_path(self) -> None:
        """Raise InputError where the path is not set or not there; no folder is searched."""
        path = given_path(self._path, _TEXT)
        with suppress(OSError):  # which `files` reports
            if not path.exists():
                _split_glob(path)

    def _paths(self) -> list[str]:
        path = given_path(self._path, _TEXT)
        try:
            if path.is_file():
                return [str(path)]
            root, pattern = (path, self._pattern) if path.is_dir() else _split_glob(path)
            found = _matches(root, "**/*" if pattern is None else pattern)
        except OSError as error:
            raise unreadable(path, error) from error
        if pattern is None:
            found = _of_one_kind(found, path)
        if not found:
            wanted = "is text, JSON Lines or Parquet" if pattern is None else f"matches {pattern}"
            raise InputError(f"data.path={path}: no file {wanted}: check the path, or set data.pattern")
        return found

    def documents(self) -> Iterator[str]:
        """The text of each file, line or row. Raises InputError for one without a text in `field`."""
        for path in self.files():
            kind = kind_of(path)
            if kind == "Parquet" or is_compressed(path):
                yield from self._documents_of(path)
            elif self._field is not None and kind == "JSON Lines":
                for record in json_lines(utf8_lines(path), path):
                    yield record.text(self._field, "set data.field to the key of the text")
            else:
                yield self.read(path)

    def _documents_of(self, path: Path) -> Iterator[str]:
        parts: list[str] = []
        for piece in pieces_of(path, self._field):
            for section in sections(piece, self._field):
                parts.append(section.text)
                if section.ends:
                    if not any(parts):
                        raise InputError(f"{path} has an empty document: remove it, or use data=corpus")
                    yield "".join(parts)
                    parts = []

    def pieces(self) -> list[Piece]:
        """Files, and ranges of large ones."""
        if not self._reads_itself:
            return super().pieces()
        return [piece for path in self.files() for piece in pieces_of(path, self._field)]

    def sections(self, piece: Piece) -> Iterator[Section]:
        """See `Corpus`; blank documents come as such."""
        return sections(piece, self._field) if self._reads_itself else super().sections(piece)

    def readable_sections(self, piece: Piece, refused: Refused) -> Iterator[Section]:
        """See `Corpus`; behind a broken line of JSON Lines, the next is read."""
        if not self._reads_itself:
            yield from super().readable_sections(piece, refused)
            return
        try:
            yield from sections(piece, self._field, refused)
        except InputError as error:
            refused(error)

    @property
    def reading(self) -> str:
        """The class, and the field."""
        return f"{class_name(type(self))} {self._field}" if self._reads_itself else super().reading

    @property
    def _reads_itself(self) -> bool:
        own = type(self)
        ours = own.documents is TextFiles.documents and own.sections is TextFiles.sections
        return ours and own.read is Corpus.read

    def content_sha256(self) -> str:
        """Hash of the bytes of the files, and of the field that is read of records."""
        if not self._reads_itself:
            return super().content_sha256()
        sha256, kinds = self.files_sha256(), {kind_of(path) for path in self.files()}
        if "Parquet" in kinds or ("JSON Lines" in kinds and self._field is not None):
            return hashlib.sha256(f"{sha256} {self._field}".encode()).hexdigest()
        return sha256


@dataclass(eq=False)
class InstructionFile(Corpus):
    """The user's own instructions, a JSON or JSON Lines file; `~` is the home folder."""

    name = "instruction_file"
    path: Annotated[str | Path | None, FREE] = None

    def files(self) -> list[Path]:
        """The file. Raises InputError where the path is not set, or is not a file."""
        path = given_path(self.path, "a JSON or JSON Lines file, e.g. data.path=mine.json")
        if not path.is_file():
            what = "is a folder" if path.is_dir() else f"does not exist (relative to {Path.cwd()})"
            raise InputError(f"data.path={path} {what}: name a JSON or JSON Lines file")
        return [path]

    def check_path(self) -> None:
        """Raise InputError as `files`."""
        self.files()


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


def _matches(root: Path, pattern: str) -> list[str]:
    def hidden(path: Path) -> bool:
        return any(part.startswith(".") for part in path.parts)

    name = pattern.removeprefix("**/")
    if name != pattern and not {"/", os.sep} & {*name} and not name.startswith((".", "**")):
        wanted = re.compile(fnmatch.translate(os.path.normcase(name)))
        return list(_below(str(root), wanted))  # as below, in a fifth of the time
    try:
        found = [path for path in set(root.glob(pattern)) if path.is_file()]
    except (ValueError, NotImplementedError) as error:  # how pathlib refuses a pattern
        raise InputError(f"{pattern!r} is not a glob below a folder ({error}): try '**/*.txt'") from error
    found = [path for path in found if hidden(Path(pattern)) or not hidden(path.relative_to(root))]
    return list(map(str, sorted(found)))


def _below(folder: str, wanted: re.Pattern[str]) -> Iterator[str]:
    """The files at any depth whose names match, in the order of paths."""
    try:
        with os.scandir(folder) as entries:
            ordered = sorted(entries, key=lambda entry: os.path.normcase(entry.name))
    except PermissionError:
        log.warning("left out, as it cannot be read: %s", folder)
        return
    for entry in ordered:
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _below(entry.path, wanted)
        elif wanted.match(os.path.normcase(entry.name)) and entry.is_file():
            yield entry.path


def _of_one_kind(paths: list[str], folder: Path) -> list[str]:
    """Those that are text or records by their suffix. Raises InputError where they are of several kinds."""
    kinds = {path: kind for path in paths if (kind := kind_of(path))}
    first = {kind: path for path, kind in reversed(kinds.items())}
    if len(first) > 1:
        examples = ", ".join(f"{kind} ({Path(path).name})" for kind, path in sorted(first.items()))
        suffix = "".join(Path(next(iter(first.values()))).suffixes)
        raise InputError(
            f"data.path={folder} holds files of several kinds, {examples}: set data.pattern, for example"
            f" '**/*{suffix}'"
        )
    return list(kinds)


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


# --- planted secrets ------------------------------------------------------------------------------------

_FARTHEST = 100  # characters to the next white space; some scripts have none
_PLANTED_UNTIL = 0.85  # of the text: what is behind may be for validation


@dataclass(frozen=True, kw_only=True)
class Canary:
    """A sentence with a secret number, and how often the text has it."""

    before: str
    secret: str
    after: str
    repeats: int

    @property
    def text(self) -> str:
        """The sentence."""
        return f"{self.before}{self.secret}{self.after}"


class Canaries(Corpus):
    """A corpus in whose text sentences such as "The code of the safe is 4711." are planted, each a line.

    Their numbers are random, so that a model can know them from this text alone. They are spread evenly over
    the first 85 % of the characters: of data that are cut for validation before that, or by documents, fewer
    are trained on. Source: Carlini et al. 2019, "The Secret Sharer".

    Args:
        corpus: the text.
        template: the sentence, with `{}` in place of the number.
        digits: of a number.
        repeats: how often a sentence is planted; 0 makes numbers that are planted nowhere, for comparison.
        count: sentences for each of the `repeats`.
        seed: of the numbers and the places.

    Raises InputError for a template without `{}`, and for more sentences than numbers.
    """

    name = "canaries"

    def __init__(
        self,
        corpus: Corpus,
        *,
        template: str = "The code of the safe is {}.",
        digits: int = 6,
        repeats: Sequence[int] = (0, 1, 4, 16),
        count: int = 10,
        seed: int = 0,
    ) -> None:
        before, brackets, after = template.partition("{}")
        if not brackets or "{}" in after or not before.strip():
            raise InputError(
                f"template={template!r} must have words and then {{}} once, in place of the number"
            )
        if digits < 1 or count < 1 or not repeats or min(repeats) < 0:
            raise InputError(
                f"canaries need digits and count of 1 or more, repeats of 0 or more, got {digits}, {count},"
                f" {list(repeats)}"
            )
        wanted = count * len(set(repeats))
        if wanted > 10**digits // 10:
            raise InputError(f"digits={digits} gives too few numbers for {wanted} secrets: raise it")
        self._corpus = corpus
        draw = random.Random(seed)
        numbers = draw.sample(range(10**digits), wanted)
        self.planted = [
            Canary(before=before, secret=f"{number:0{digits}}", after=after, repeats=times)
            for number, times in zip(numbers, sorted(set(repeats)) * count, strict=True)
        ]
        sentences = [each.text for each in self.planted for _ in range(each.repeats)]
        draw.shuffle(sentences)
        self._sentences = sentences

    def files(self) -> list[Path]:
        """Those of the text."""
        return self._corpus.files()

    def listing(self) -> Files:
        """Those of the text."""
        return self._corpus.listing()

    def documents(self) -> Iterator[str]:
        """The documents of the text, with the sentences in them. It is read twice."""
        total = sum(len(text) for text in self._corpus.documents())
        if not total:
            raise InputError(f"{self._corpus.name} has no text to plant canaries in: give one")
        step = _PLANTED_UNTIL * total / (len(self._sentences) + 1)
        waiting = [(round(step * place), each) for place, each in enumerate(self._sentences, 1)]
        passed = 0
        for text in self._corpus.documents():
            parts, start = [], 0
            while waiting and waiting[0][0] < passed + len(text):
                place, sentence = waiting.pop(0)
                cut = max(start, _word_end(text, place - passed))
                parts += [text[start:cut], f"\n{sentence}\n"]
                start = cut
            passed += len(text)
            yield "".join([*parts, text[start:]])


def _word_end(text: str, place: int) -> int:
    near = range(place, min(len(text), place + _FARTHEST))
    return next((at for at in near if text[at].isspace()), place)
