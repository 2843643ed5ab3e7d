"""Several short texts in one row: which go together, by best fit decreasing."""

# P pieces of documents, S rows, T tokens in a row, N tokens of a text, B rows in a batch

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, Self, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from gptpl.files.durable import new_file, write_atomically

BLOCK = 1 << 22
"""Tokens of a text that are packed at a time."""


def packed_places(lengths: Sequence[int], *, capacity: int) -> list[list[int]]:
    """Which lengths go together: each, by its place, in one group, and no group above the capacity.

    Best fit decreasing: from the longest to the shortest, each goes where it leaves the least room (Johnson
    1973: at most 11/9 of the fewest groups possible, and one more). Groups are in the order of their first
    places, and places ascend within a group. No length may exceed the capacity.
    """
    groups: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # groups, by the room that they have left
    rooms = 0  # bit r is set where a group has room r
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        length = lengths[place]
        if large_enough := rooms >> length:
            room = length + (large_enough & -large_enough).bit_length() - 1
            group = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            groups.append([])
            group, room = len(groups) - 1, capacity
        groups[group].append(place)
        with_room[room - length].append(group)
        rooms |= 1 << (room - length)
    return sorted(sorted(group) for group in groups)


class PackedBatch(NamedTuple):
    """Rows of one text or several, each (B, T) int64.

    `targets` are one token later, -100 where nothing is to be learned. `segments` number the texts of each
    row from 1, 0 for padding; None where every row is one text: causal attention never looks at what comes
    after it. `tokens` counts the inputs that are not padding.
    """

    inputs: Tensor
    targets: Tensor
    segments: Tensor | None
    tokens: int


class _Tokens(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, places: slice, /) -> NDArray[Any]: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Packing:
    """Rows of documents, or of parts of those that are longer than a row.

    Piece p has the inputs from token `starts[p]` on, `lengths[p]` of them, and their targets are one token
    later: it begins with the end-of-text token before its document. Row r has the pieces `rows[r]` to
    `rows[r + 1]`.

    Attributes:
        starts, lengths: (P,) int64, uint32.
        rows: (S + 1,) int64.
        documents, cut: how many documents there are, and are longer than a row.
        tokens: places of all rows that hold one.
        folder: where it is kept, if it is.
    """

    starts: NDArray[np.int64]
    lengths: NDArray[np.uint32]
    rows: NDArray[np.int64]
    documents: int
    cut: int
    tokens: int
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.rows) - 1

    @classmethod
    def of(cls, tokens: _Tokens, *, eot_id: int, T: int) -> Self:
        """The packing of the documents of a text, in memory; see `pack_documents`."""
        files = {name: io.BytesIO() for name in _TYPES}
        counts = _write(files, tokens, eot_id=eot_id, T=T)
        return cls._from(
            {name: np.frombuffer(files[name].getvalue(), _TYPES[name]) for name in files}, counts
        )

    @classmethod
    def _from(cls, arrays: Mapping[str, NDArray[Any]], counts: Mapping[str, int], **more: Any) -> Self:
        own = {name: counts[name] for name in ("documents", "cut", "tokens")}
        return cls(**cast(dict[str, Any], {**arrays, **own}), **more)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The one kept in a folder, not read into memory. Raises OSError, ValueError or KeyError."""
        counts = json.loads((folder / "counts.json").read_text(encoding="utf-8"))
        shapes = {"starts": counts["pieces"], "lengths": counts["pieces"], "rows": counts["rows"] + 1}
        for name, length in shapes.items():
            if (folder / f"{name}.bin").stat().st_size != length * _TYPES[name].itemsize:
                raise ValueError(f"{folder} is incomplete")
        arrays = {
            name: np.memmap(folder / f"{name}.bin", _TYPES[name], "r", shape=(length,))
            for name, length in shapes.items()
        }
        return cls._from(arrays, counts, folder=folder)

    @staticmethod
    def write(folder: Path, tokens: _Tokens, *, eot_id: int, T: int) -> None:
        """Keep the packing of a text in a folder, complete or, after an interruption, without its last file.

        The memory does not grow with the text.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            files = {
                name: stack.enter_context(new_file(folder / f"{name}.bin", durable=True)) for name in _TYPES
            }
            counts = _write(files, tokens, eot_id=eot_id, T=T)
        write_atomically(folder / "counts.json", json.dumps(counts), durable=True)

    def __getstate__(self) -> dict[str, Any]:
        """Send a worker the folder, not the arrays."""
        return dict(self.__dict__) if self.folder is None else {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the files again, in the worker."""
        self.__dict__.update(state if "rows" in state else Packing.read(state["folder"]).__dict__)


_TYPES: dict[str, np.dtype[Any]] = {
    "starts": np.dtype(np.int64),
    "lengths": np.dtype(np.uint32),
    "rows": np.dtype(np.int64),
}


def _write(files: Mapping[str, BinaryIO], tokens: _Tokens, *, eot_id: int, T: int) -> dict[str, int]:
    """Write the arrays of a packing as they are made; returns its numbers."""
    counts = dict.fromkeys(("documents", "cut", "tokens", "pieces", "rows"), 0)
    files["rows"].write(np.zeros(1, np.int64).tobytes())
    for block in pack_documents(tokens, eot_id=eot_id, T=T):
        files["starts"].write(block.starts.tobytes())
        files["lengths"].write(block.lengths.tobytes())
        files["rows"].write((counts["pieces"] + block.sizes.cumsum()).astype(np.int64).tobytes())
        counts["documents"] += block.documents
        counts["cut"] += block.cut
        counts["tokens"] += int(block.lengths.sum())
        counts["pieces"] += len(block.starts)
        counts["rows"] += len(block.sizes)
    return counts


class _Block(NamedTuple):
    """The rows of the documents that end in a block; `sizes` are the numbers of their pieces, (S,)."""

    starts: NDArray[np.int64]
    lengths: NDArray[np.uint32]
    sizes: NDArray[np.int64]
    documents: int
    cut: int


def pack_documents(tokens: _Tokens, *, eot_id: int, T: int) -> Iterator[_Block]:
    """Rows of at most T tokens of the documents of a text (N,), which end-of-text tokens end.

    A document begins a row or follows others that it fits in with as a whole. One longer than T fills rows of
    its own from its beginning; its last part is packed like a short document. Documents near each other share
    rows: BLOCK tokens are packed at a time.
    """
    for begins, long in _documents(tokens, eot_id):
        full, rest = np.divmod(long, T)
        within = np.arange(full.sum()) - np.repeat(np.cumsum(full) - full, full)
        whole = np.repeat(begins, full) + T * within  # parts that fill a row
        left = rest > 0
        last, size = (begins + T * full)[left], rest[left]
        groups = packed_places(size.tolist(), capacity=T)
        order = np.array([place for group in groups for place in group], dtype=np.int64)
        yield _Block(
            starts=np.concatenate([whole, last[order]]),
            lengths=np.concatenate([np.full(len(whole), T), size[order]]).astype(np.uint32),
            sizes=np.concatenate([np.ones(len(whole), np.int64), np.array(list(map(len, groups)), np.int64)]),
            documents=len(begins),
            cut=int((long > T).sum()),
        )


def _documents(tokens: _Tokens, eot_id: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """The first input and the number of inputs of the documents that end in each block."""
    start, N = 0, len(tokens)
    blocks = range(0, N, BLOCK)
    for first in tqdm(blocks, desc="packing", unit="block", disable=None if len(blocks) > 8 else True):
        block = tokens[first : first + BLOCK]
        ends = first + np.flatnonzero(block == eot_id)
        if first + len(block) == N and (not len(ends) or ends[-1] != N - 1):
            ends = np.append(ends, N - 1)  # the last document has no end
        borders = np.concatenate([[start], ends])
        lengths = np.diff(borders)
        yield borders[:-1][lengths > 0], lengths[lengths > 0]
        start = int(borders[-1])
