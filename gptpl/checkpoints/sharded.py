"""Checkpoints of models whose tensors are sharded: every process writes its part, none has the whole.

`step-00000100.ckpt` then holds everything but the sharded tensors, and names the parts next to it, such as
`step-00000100.1f0c9a52-1-of-4.part`, with their SHA-256. A part holds consecutive rows (dimension 0) of
every tensor, as FSDP2 shards them. The file that names the parts is written last: until then they are no
checkpoint.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptpl.checkpoints.files import PARTS_KEY, parts_of, write_checkpoint, write_part
from gptpl.errors import InputError, ProcessError
from gptpl.files.durable import recorded_sha256
from gptpl.files.plain import read_plain

_LOOKS_EVERY = 0.02  # seconds
_STATE, _OPTIMIZERS = "state_dict", "optimizer_states"
_PART = "part"
"""The entry of a checkpoint to be written with what `take_part` took."""


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

    def part(self, path: Path, number: int | None = None) -> Path:
        """The file of this part of a checkpoint, or of the one with this `number`."""
        return path.with_name(f"{path.stem}.{self.token}-{number or self.number}-of-{self.of}.part")


# --- writing --------------------------------------------------------------------------------------------


def take_part(checkpoint: dict[str, Any]) -> None:
    """Move the sharded tensors (DTensors) into an entry of their own, each as this process's rows.

    The first process keeps the rest; that of the others is emptied.
    """
    from torch.distributed.tensor import DTensor

    def taken(tensors: dict[str, Any]) -> dict[str, Tensor]:
        names = [name for name, tensor in tensors.items() if isinstance(tensor, DTensor)]
        return {name: tensors.pop(name).to_local() for name in names}

    checkpoint[_PART] = {
        _STATE: taken(checkpoint[_STATE]),
        _OPTIMIZERS: [
            {number: taken(state) for number, state in optimizer["state"].items()}
            for optimizer in checkpoint.get(_OPTIMIZERS, ())
        ],
    }


def write_share(checkpoint: dict[str, Any], path: Path, share: Share) -> None:
    """Write this process's part of a checkpoint, as left by `take_part`; the first then writes `path`.

    Raises ProcessError where a part of another process does not come.
    """
    write_part(checkpoint[_PART], share.part(path))
    if share.number > 1:
        return
    deadline = time.monotonic() + share.timeout.total_seconds()
    parts = [share.part(path, number) for number in range(1, share.of + 1)]
    named = {part.name: _written(part, deadline, share) for part in parts}
    rest = {name: entry for name, entry in checkpoint.items() if name != _PART}
    write_checkpoint(rest | {PARTS_KEY: named}, path)


def _written(part: Path, deadline: float, share: Share) -> str:
    """The SHA-256 of another process's part, once it has written it."""
    while (found := recorded_sha256(part)) is None or not part.exists():
        if time.monotonic() > deadline:
            raise ProcessError(
                f"{part} has not been written within {share.timeout.total_seconds():g} s (trainer.timeout):"
                " the run's folder must be one that all processes share"
            )
        time.sleep(_LOOKS_EVERY)
    return found


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
        kinds = [{place: self._row(tensor) for place, tensor in part.items()} for part in self._of]
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
        content = read_plain(part)
        try:
            for name, tensor in content[_STATE].items():
                yield (_STATE, name), tensor
            for index, optimizer in enumerate(content[_OPTIMIZERS]):
                for number, state in optimizer.items():
                    for name, tensor in state.items():
                        yield (_OPTIMIZERS, index, "state", number, name), tensor
        except (TypeError, LookupError, AttributeError) as error:
            raise self.damaged() from error

    def _row(self, tensor: Any) -> tuple[torch.Size, torch.dtype]:
        if not isinstance(tensor, Tensor) or not tensor.dim():
            raise self.damaged()
        return tensor.shape[1:], tensor.dtype

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
        holder[last] = parts.rows((*keys, last))
    del checkpoint[PARTS_KEY]
