"""Data sets of Hugging Face's library `datasets`, saved in a folder or on the hub; nothing else imports it.

Saved and downloaded ones are Arrow files, which are mapped into memory: pieces are ranges of their rows. Of
one that is streamed, pieces are its shards, and nothing is kept.
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from gptpl.data.sources.base import Corpus, Files, Piece, Section, class_name, in_sections
from gptpl.data.sources.formats import PIECE_BYTES, ROWS, arrow, check_text_column, is_compressed, row_pieces
from gptpl.data.sources.text import given_path
from gptpl.errors import InputError
from gptpl.settings import FREE
from gptpl.text import shortened

log = logging.getLogger(__name__)

HUB = "hf://datasets/"
"""An address, as all that can be downloaded: what a stranger's run names is not fetched by itself."""
COPY = "copy or save it again"
_UNKNOWN_SIZE = 1 << 26  # of a shard
_COMMIT = re.compile("[0-9a-f]{40}")
_END = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow file


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """A split: its Arrow files, or what streams it with the bytes of its shards; the commit of the hub's."""

    files: tuple[Path, ...] = ()
    stream: Any = None
    sizes: tuple[int, ...] = ()
    commit: str | None = None


@dataclass(eq=False)
class HuggingFaceDataset(Corpus):
    """The texts of a column of a data set of `datasets`, each row a document.

    Args:
        path: a folder that `save_to_disk` has written, or `hf://datasets/OWNER/NAME` on the hub, which is
            downloaded into the library's cache; `HF_HUB_OFFLINE=1` uses only this.
        subset: one of the configurations of a data set of the hub; None: its default.
        split: where there are several.
        revision: commit, branch or tag of a data set of the hub; None: the newest. A commit always means the
            same texts.
        field: the column.
        streaming: read from the hub while encoding, and keep only the tokens.
        name: what reports call it.

    Raises InputError for what is not there, in the network or on the disk, and a column that has no texts.
    """

    path: Annotated[str | Path | None, FREE] = None
    subset: str | None = None
    split: str = "train"
    revision: Annotated[str | None, FREE] = None
    field: str = "text"
    streaming: bool = False
    name: Annotated[str, FREE] = "hub"

    def files(self) -> list[Path]:
        """The Arrow files; none are there of what is streamed."""
        return list(self._opened.files)

    def listing(self) -> Files:
        """See `Corpus`; of what is streamed, `reading` says all."""
        return [] if self._is_streamed else super().listing()

    @property
    def reading(self) -> str:
        """The class, subset, split and column, and what is streamed."""
        settings = [self.subset, self.split, self.field]
        if self._is_streamed:
            known = self.revision if _COMMIT.fullmatch(self.revision or "") else self._opened.commit
            settings += [str(self.path), known]
        return f"{class_name(type(self))} {json.dumps(settings)}"

    def documents(self) -> Iterator[str]:
        """The text of each row."""
        for piece in self.pieces():
            yield from self._texts(piece)

    def pieces(self) -> list[Piece]:
        """Ranges of rows of the files, or the shards of a stream."""
        opened = self._opened
        if opened.stream is not None:
            return [Piece(start=n, end=n + 1, size=size) for n, size in enumerate(opened.sizes)]
        found = [piece for path in opened.files for piece in self._ranges(path)]
        if not found:
            raise InputError(f"data.path={self.path}: the split {self.split!r} has no rows: choose another")
        return found

    def sections(self, piece: Piece) -> Iterator[Section]:
        """See `Corpus`; blank rows come as such."""
        for text in self._texts(piece):
            yield from in_sections([text])

    # --- rows -------------------------------------------------------------------------------------------

    def _ranges(self, path: Path) -> Iterator[Piece]:
        parts = []
        for chunk in self._column(path).chunks:
            step = max(1, len(chunk) * PIECE_BYTES // max(1, chunk.nbytes))
            parts += [chunk.slice(place, step) for place in range(0, len(chunk), step)]
        return row_pieces(path, [(len(part), part.nbytes) for part in parts])

    def _texts(self, piece: Piece) -> Iterator[str]:
        if piece.path is not None:
            rows = self._column(piece.path).slice(piece.start, (piece.end or 0) - piece.start)
            yield from self._of_rows(rows, str(piece.path))
            return
        stream, path = self._opened.stream, f"data.path={self.path}"
        place = f"{path}, shard {piece.start} of {stream.num_shards}"
        with _failures(place, "check the network, and start again: finished shards are kept"):
            shard = stream.shard(num_shards=stream.num_shards, index=piece.start).with_format("arrow")
            for table in shard.iter(batch_size=ROWS):
                check_text_column(table.schema, self.field, path)
                yield from self._of_rows(table.column(self.field), place)

    def _of_rows(self, column: Any, place: str) -> Iterator[str]:
        """The texts; one that is null is blank."""
        for start in range(0, len(column), ROWS):
            with _failures(place, "repair it"):
                texts = column.slice(start, ROWS).to_pylist()
            yield from (text or "" for text in texts)

    def _column(self, path: Path) -> Any:
        """The column of a file, mapped into memory."""
        library = arrow(path)
        with _failures(str(path), COPY):
            file = library.memory_map(str(path))
            file.seek(max(0, file.size() - len(_END)))
            if file.read() != _END:
                raise InputError(f"{path} is cut short: {COPY}")
            file.seek(0)
            table = library.ipc.open_stream(file).read_all()
        check_text_column(table.schema, self.field, str(path))
        return table.column(self.field)

    # --- opening ----------------------------------------------------------------------------------------

    @property
    def _is_streamed(self) -> bool:
        return self.streaming and "://" in str(self.path)

    @cached_property
    def _opened(self) -> _Opened:
        """The split. A worker gets it with the rest of the object, and asks nobody."""
        if "://" in str(self.path):
            return self._of_hub(str(self.path))
        folder = given_path(self.path, f"a folder of save_to_disk, or {HUB}OWNER/NAME")
        if not any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
            raise InputError(
                f"data.path={folder} is no folder of save_to_disk (relative to {Path.cwd()}): check the path;"
                f" a data set of the hub is {HUB}OWNER/NAME, and files are read by data=corpus"
            )
        if not any(folder.rglob("*.arrow")):
            raise InputError(f"data.path={folder} is empty, it has no Arrow files: {COPY}")
        library = _library()
        with _failures(f"data.path={folder}", COPY):
            found = library.load_from_disk(str(folder), keep_in_memory=False)
        return _Opened(files=self._arrow_files(found))

    def _of_hub(self, path: str) -> _Opened:
        name = path.removeprefix(HUB)
        if not path.startswith(HUB) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII):
            raise InputError(f"data.path={path} must be a folder of save_to_disk, or {HUB}OWNER/NAME")
        if Path(name).exists():  # which the library would take
            raise InputError(f"data.path={path}: there is a folder {name} here, too: start elsewhere")
        library = _library()
        with _failures(f"data.path={path}", "check it, data.subset, data.revision and the network"):
            builder = library.load_dataset_builder(name, self.subset, revision=self.revision)
            if builder.name == "cache" and self.revision not in (None, builder.hash):
                builder = self._cached(builder)
            if self.revision is None:
                log.info("%s: data.revision=%s is the newest; give it to keep to it", path, builder.hash)
            if self.streaming:
                stream = self._split_of(builder.as_streaming_dataset())
                sizes = _shard_sizes(builder, self.split, stream.num_shards)
                return _Opened(stream=stream, sizes=sizes, commit=builder.hash)
            builder.download_and_prepare()
            self._split_of(builder.info.splits)
            found = builder.as_dataset(split=self.split)
            return _Opened(files=self._arrow_files(found), commit=builder.hash)

    def _cached(self, newest: Any) -> Any:
        """The revision in the library's cache: without a network it gives the newest, whatever is asked."""
        found = type(newest)(
            repo_id=newest.repo_id,
            dataset_name=newest.dataset_name,
            config_name=newest.config.name,
            version=str(newest.config.version),
            hash=self.revision,
        )
        if not Path(found.cache_dir).is_dir():
            raise InputError(
                f"the hub cannot be reached, and data.revision={self.revision} of {self.path} is not in the"
                f" cache, which has {newest.hash}: give that, or connect"
            )
        return found

    def _split_of(self, found: Any) -> Any:
        """One of a mapping of splits, or what has none."""
        if not isinstance(found, Mapping):
            return found
        if self.split not in found:
            there = ", ".join(found)
            raise InputError(f"data.path={self.path} has no split {self.split!r}: choose one of {there}")
        return found[self.split]

    def _arrow_files(self, found: Any) -> tuple[Path, ...]:
        return tuple(Path(each["filename"]) for each in self._split_of(found).cache_files)


def _shard_sizes(builder: Any, split: str, shards: int) -> tuple[int, ...]:
    """Bytes of text in each shard, about; Parquet holds more than its files."""
    from fsspec.core import url_to_fs

    sizes = []
    for url in (builder.config.data_files or {}).get(split, ()):
        system, path = url_to_fs(url)
        sizes.append((system.info(path)["size"] or 0) * (4 if is_compressed(Path(path)) else 1))
    if len(sizes) != shards:
        total = sum(sizes) or getattr((builder.info.splits or {}).get(split), "num_bytes", 0)
        sizes = [total // shards] * shards
    return tuple(size or _UNKNOWN_SIZE for size in sizes)


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise InputError("data=hub needs a package that is not installed: pip install datasets") from error
    if int(datasets.__version__.partition(".")[0]) < 4:
        raise InputError(
            f"datasets {datasets.__version__} runs programs of data sets: pip install 'datasets>=4'"
        )
    return datasets


@contextmanager
def _failures(what: str, remedy: str) -> Iterator[None]:
    """Turns what the libraries raise, and let through, into InputError."""
    known: tuple[type[Exception], ...] = (OSError, RuntimeError, ValueError, LookupError, TypeError)
    try:
        yield
    except InputError:
        raise
    except (*known, *_library_errors()) as error:
        reason = f"{error}: {error.__cause__}" if error.__cause__ else str(error)
        raise InputError(f"{what} cannot be read ({shortened(reason, 300)}): {remedy}") from error


def _library_errors() -> tuple[type[Exception], ...]:
    import pyarrow
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    # Its bases are the errors of the HTTP client, whichever it is.
    return (DatasetsError, pyarrow.ArrowException, *HfHubHTTPError.__bases__)
