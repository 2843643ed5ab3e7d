"""Several short texts in one row: which go together, by best fit decreasing."""

# P pieces of documents, S rows, T tokens in a row, N tokens of a text, B rows in a batch

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, Self

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
        counts = pack_documents(files, tokens, eot_id=eot_id, T=T)
        arrays: dict[str, Any] = {
            name: np.frombuffer(file.getvalue(), _TYPES[name]) for name, file in files.items()
        }
        return cls(**arrays, **counts)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The one kept in a folder, not read into memory. Raises OSError, ValueError or KeyError."""
        counts = json.loads((folder / "counts.json").read_text(encoding="utf-8"))
        arrays: dict[str, Any] = {
            name: np.memmap(folder / f"{name}.bin", kind, "r") for name, kind in _TYPES.items()
        }
        if not len(arrays["starts"]) == len(arrays["lengths"]) == arrays["rows"][-1]:
            raise ValueError(f"{folder} is incomplete")
        return cls(**arrays, **{name: counts[name] for name in _COUNTS}, folder=folder)

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
            counts = pack_documents(files, tokens, eot_id=eot_id, T=T)
        write_atomically(folder / "counts.json", json.dumps(counts), durable=True)

    def __reduce__(self) -> Any:
        """Send a worker the folder, not the arrays: it opens the files again."""
        return super().__reduce__() if self.folder is None else (Packing.read, (self.folder,))


_TYPES: dict[str, Any] = {"starts": np.int64, "lengths": np.uint32, "rows": np.int64}
_COUNTS = ("documents", "cut", "tokens")


def pack_documents(files: Mapping[str, BinaryIO], tokens: _Tokens, *, eot_id: int, T: int) -> dict[str, Any]:
    """Write the arrays of the packing of a text (N,) as they are made; returns its counts.

    Its documents, which end-of-text tokens end, go into rows of at most T tokens. A document begins a row or
    follows others that it fits in with as a whole. One longer than T fills rows of its own from its
    beginning; its last part is packed like a short document. Documents near each other share rows: BLOCK
    tokens are packed at a time.
    """
    counts: dict[str, Any] = dict.fromkeys(_COUNTS, 0)
    pieces = 0
    files["rows"].write(np.zeros(1, np.int64).tobytes())
    for begins, long in _documents(tokens, eot_id):
        full, rest = np.divmod(long, T)
        within = np.arange(full.sum()) - np.repeat(np.cumsum(full) - full, full)
        whole = np.repeat(begins, full) + T * within  # parts that fill a row
        left = rest > 0
        last, size = (begins + T * full)[left], rest[left]
        groups = packed_places(size.tolist(), capacity=T)
        order = np.array([place for group in groups for place in group], dtype=np.int64)
        starts = np.concatenate([whole, last[order]])
        lengths = np.concatenate([np.full(len(whole), T), size[order]])
        sizes = [1] * len(whole) + list(map(len, groups))
        files["starts"].write(starts.tobytes())
        files["lengths"].write(lengths.astype(np.uint32).tobytes())
        files["rows"].write((pieces + np.cumsum(sizes, dtype=np.int64)).tobytes())
        pieces += len(starts)
        counts["documents"] += len(begins)
        counts["cut"] += int((long > T).sum())
        counts["tokens"] += int(lengths.sum())
    return counts


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
