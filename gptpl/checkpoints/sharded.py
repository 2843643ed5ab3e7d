"""Checkpoints of models whose tensors are sharded: every process writes its part, none has the whole.

`step-00000100.ckpt` then holds everything but the sharded tensors, and names the parts next to it, such as
`step-00000100.1f0c9a52-1-of-4.part`, with their SHA-256. A part holds consecutive rows (dimension 0) of
every tensor, as FSDP2 shards them. The file that names the parts is written last: until then they are no
checkpoint.
"""

import errno
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptpl.checkpoints.files import (
    MISSING_PART,
    PARTS_KEY,
    part_file,
    parts_of,
    write_checkpoint,
    write_durably,
)
from gptpl.errors import InputError, ProcessError, os_error_text
from gptpl.files.durable import recorded_sha256, write_atomically
from gptpl.files.plain import check_sharing, read_plain

_LOOKS_EVERY = 0.02  # seconds
_STATE, _OPTIMIZERS = "state_dict", "optimizer_states"


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which part of a checkpoint a process writes.

    Attributes:
        number, of: the part, from 1, and how many there are.
        token: tells the parts of this save from those of any other with the same name.
        timeout: how long the first process waits for the others' parts.
    """

    number: int
    of: int
    token: str
    timeout: timedelta


# --- writing --------------------------------------------------------------------------------------------


def split(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Take the sharded tensors (DTensors) out of a checkpoint; returns this process's rows of each, a part.

    Raises InputError for those that are sharded in another way.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    def taken(tensors: dict[str, Any]) -> dict[str, Tensor]:
        found = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
        for name, tensor in found.items():
            if [each for each in tensor.placements if each != Replicate()] != [Shard(0)]:
                raise InputError(
                    f"trainer.sharded_checkpoints=true: {name} of the optimizer or model is not sharded by"
                    " rows: use trainer.sharded_checkpoints=false"
                )
            del tensors[name]
        return {name: tensor.to_local() for name, tensor in found.items()}

    return {
        _STATE: taken(checkpoint[_STATE]),
        _OPTIMIZERS: [
            {number: taken(state) for number, state in optimizer["state"].items()}
            for optimizer in checkpoint.get(_OPTIMIZERS, ())
        ],
    }


def write_share(
    part: dict[str, Any], rest: dict[str, Any], path: Path, share: Share, *, ended: Callable[[], bool]
) -> None:
    """Write this process's part of a checkpoint; the first then writes the `rest`, to `path`.

    Raises ProcessError where a part of another process cannot be written, or does not come: within
    `share.timeout`, or before this process has `ended` for another reason.
    """
    own = part_file(path, share.token, share.number, share.of)
    try:
        write_durably(part, own)
    except OSError as error:
        with suppress(OSError):  # the disk may be full
            write_atomically(_failure(own), os_error_text(error))
        raise
    if share.number > 1:
        return
    deadline = time.monotonic() + share.timeout.total_seconds()
    hashes = []
    for number in range(1, share.of + 1):
        file = part_file(path, share.token, number, share.of)
        while (sha256 := _written(file)) is None:
            if ended() or time.monotonic() > deadline:
                waited = f"{share.timeout.total_seconds():g} s have passed (trainer.timeout)"
                raise ProcessError(
                    f"{file} is not there, and {'training has ended' if ended() else waited}: has its process"
                    " ended, do all processes share that folder?"
                )
            time.sleep(_LOOKS_EVERY)
        hashes.append(sha256)
    write_checkpoint(rest | {PARTS_KEY: {"stem": path.stem, "token": share.token, "sha256": hashes}}, path)


def _failure(part: Path) -> Path:
    """The file that says why a part was not written."""
    return part.with_name(f"{part.name}.failed")


def _written(part: Path) -> str | None:
    """The SHA-256 of another process's part; None: it is not there yet. Raises ProcessError if it failed."""
    try:
        if _failure(part).exists():
            raise ProcessError(f"{part.name} was not written: {_failure(part).read_text(encoding='utf-8')}")
        return recorded_sha256(part) if part.exists() else None
    except OSError as error:
        if error.errno != errno.ESTALE:  # of a shared file system, which looks again
            raise
        return None


# --- reading --------------------------------------------------------------------------------------------

Place = tuple[Any, ...]
"""The keys of a tensor in a checkpoint, such as ("optimizer_states", 0, "state", 5, "exp_avg")."""


class Parts:
    """The sharded tensors of a checkpoint, mapped from the files of its parts.

    Raises InputError for a part that is missing, not plain data, or does not fit the others.
    """

    def __init__(self, checkpoint: Mapping[str, Any], path: Path) -> None:
        self._path = path
        self._of = [dict(self._tensors_of(part)) for part in parts_of(checkpoint, path)]
        for part in self._of:
            check_sharing(part.values(), f"checkpoint={path}")  # each is going to have its own memory
        kinds = [
            {place: (tensor.shape[1:], tensor.dtype) for place, tensor in part.items()} for part in self._of
        ]
        if any(part != kinds[0] for part in kinds):
            raise self.damaged()
        self.places: list[Place] = list(kinds[0])

    def rows(self, place: Place, start: int = 0, end: int | None = None) -> Tensor:
        """A copy of the rows of a tensor from `start` to before `end`, by default of all."""
        if any(place not in part for part in self._of):
            raise self.damaged()
        end = self.length(place) if end is None else end
        found, begin = [], 0
        for part in self._of:
            tensor = part[place]
            found.append(tensor[max(0, start - begin) : max(0, end - begin)])
            begin += len(tensor)
        return torch.cat(found)

    def length(self, place: Place) -> int:
        """The number of rows of a whole tensor."""
        return sum(len(part[place]) for part in self._of)

    def _tensors_of(self, part: Path) -> Iterator[tuple[Place, Tensor]]:
        if not part.is_file():
            raise InputError(
                f"checkpoint={self._path} is damaged (its part {part.name} {MISSING_PART}):"
                " use another checkpoint"
            )
        content = read_plain(part)
        try:
            places: list[tuple[Place, Any]] = [
                ((_STATE, name), tensor) for name, tensor in content[_STATE].items()
            ]
            places += [
                ((_OPTIMIZERS, index, "state", number, name), tensor)
                for index, optimizer in enumerate(content[_OPTIMIZERS])
                for number, state in optimizer.items()
                for name, tensor in state.items()
            ]
        except (TypeError, LookupError, AttributeError) as error:
            raise self.damaged() from error
        for place, tensor in places:
            if not isinstance(tensor, Tensor) or not tensor.dim():
                raise self.damaged()
            yield place, tensor

    def damaged(self) -> InputError:
        """The error for a checkpoint that its parts do not fit."""
        return InputError(
            f"checkpoint={self._path} is damaged (its parts do not fit together): use another checkpoint"
        )


def assemble(checkpoint: dict[str, Any], path: Path) -> None:
    """Put whole tensors into a checkpoint that names parts, in place; any other stays as it is."""
    if PARTS_KEY not in checkpoint:
        return
    parts = Parts(checkpoint, path)
    for *keys, last in parts.places:
        holder: Any = checkpoint
        try:
            for key in keys:
                holder = holder[key]
        except (TypeError, LookupError) as error:
            raise parts.damaged() from error
        if not isinstance(holder, dict):
            raise parts.damaged()
        holder[last] = parts.rows((*keys, last))
    del checkpoint[PARTS_KEY]
