"""Which examples come when, and on which rank: a function of seed and epoch and of nothing else."""

# N global batches, R ranks, B examples in a rank's batch

from collections.abc import Callable, Iterator
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DistributedSampler, SequentialSampler

Indices = NDArray[np.int64]
_ROUNDS = 6
_AT_A_TIME = 64
"""Batches whose order is computed at once."""
PADDING = -1
"""In place of an example's index: a row that counts nowhere."""


class EpochSampler(DistributedSampler[int]):
    """The indices of one rank's shuffled examples; the last incomplete global batch is dropped.

    The order is a function of seed and epoch: torch's random permutation, a table of 8 bytes an example, or,
    if `computed`, one that needs no table, see `permuted`. With `draw` an epoch's numbers stand for the
    examples that it gives for them and the `epoch`.

    A global batch is R x B examples, R = `world_size`; rank r takes its r-th B of them. So R processes with
    batches of B see the global batches of one process with batches of R x B. A global batch may also be read
    in `micro_batches`, of R x B each: only whole ones begin. `set_epoch` chooses the order;
    Lightning calls it before every epoch.

    With `start=(epoch, batch)` it begins in that epoch, without the batches before; its length remains that
    of a whole epoch, as Lightning expects of a loader that continues within one. An epoch ends after `limit`
    batches of each rank, where that is set.

    It derives from DistributedSampler only to keep Lightning from replacing it.
    """

    def __init__(
        self,
        examples: int,
        *,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        start: tuple[int, int] = (0, 0),
        computed: bool = False,
        micro_batches: int = 1,
        draw: Callable[..., Indices] | None = None,
    ) -> None:
        indices = cast(torch.utils.data.Dataset[int], range(examples))
        super().__init__(
            indices, num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed, drop_last=True
        )
        self.count = examples
        self.batch_size = batch_size
        self.start = start
        self.limit: int | None = None
        self.computed = computed
        self.micro_batches = micro_batches
        self._draw = draw
        self._table: tuple[int, Indices] | None = None  # of the epoch that is named
        self.set_epoch(start[0])

    @property
    def batches(self) -> int:
        """N, the batches of every rank in an epoch."""
        return self.count // (self.batch_size * self.num_replicas * self.micro_batches) * self.micro_batches

    def order(self, first: int = 0, last: int | None = None) -> Tensor:
        """The indices of the current epoch's batches, or of some of them, of all ranks: (N, R, B) int64."""
        batches = range(self.batches)[first:last]
        R, B = self.num_replicas, self.batch_size
        places = np.arange(batches.start * R * B, batches.stop * R * B, dtype=np.int64)
        found = self._shuffled(places)
        if self._draw is not None:
            found = self._draw(found, epoch=self.epoch)
        return torch.from_numpy(found).view(len(batches), R, B)

    def _shuffled(self, places: Indices) -> Indices:
        if not self.shuffle:
            return places
        # Not seed + epoch: then epoch 1 of seed 1 would be epoch 0 of seed 2.
        keys = permutation_keys(self.seed, self.epoch)
        if self.computed:
            return permuted(places, self.count, keys)
        if self._table is None or self._table[0] != self.epoch:
            generator = torch.Generator().manual_seed(int(keys[0]))
            self._table = self.epoch, torch.randperm(self.count, generator=generator).numpy()
        return self._table[1][places]

    def __iter__(self) -> Iterator[int]:
        start_epoch, start_batch = self.start
        first = start_batch if self.epoch == start_epoch else 0
        batches = range(self.batches)[first : self.limit]
        for start in range(batches.start, batches.stop, _AT_A_TIME):
            order = self.order(start, min(start + _AT_A_TIME, batches.stop))  # (N, R, B)
            yield from order[:, self.rank].flatten().tolist()

    def __len__(self) -> int:
        return self.batches * self.batch_size


def permutation_keys(*numbers: int) -> NDArray[np.uint64]:
    """Random keys for `permuted`, a function of the numbers; zeros at their end make no difference."""
    return np.random.SeedSequence(numbers).generate_state(_ROUNDS, np.uint64).astype(np.uint64)


def permuted(places: Indices, count: int, keys: NDArray[np.uint64]) -> Indices:
    """Where a random permutation of 0 .. count - 1 takes these places; it needs no table.

    A Feistel network (Luby and Rackoff 1988) permutes the numbers of 2 k bits, at least `count` and at most 4
    `count`; a result that is too large is permuted again until it is below (Black and Rogaway 2002). Each of
    the `keys` makes a round, whose function is the finaliser of SplitMix64.
    """
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    found = places.astype(np.uint64)
    waiting = np.arange(len(found))
    while len(waiting):
        left, right = found[waiting] >> half, found[waiting] & mask
        for key in keys:
            mixed = right + key
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & mask)
        found[waiting] = (left << half) | right
        waiting = waiting[found[waiting] >= count]
    return found.astype(np.int64)


class InOrder(EpochSampler, SequentialSampler):
    """An EpochSampler for `shuffle=False`; under `overfit_batches` Lightning replaces any other class."""


def evenly_spaced(available: int, wanted: int) -> Indices:
    """`wanted` different indices below `available`, ascending; all if there are fewer."""
    wanted = min(wanted, available)
    return np.arange(wanted, dtype=np.int64) * available // max(1, wanted)


def rank_share(indices: Indices, *, batch_size: int, rank: int, world_size: int) -> Indices:
    """The part of `indices` that one of R = `world_size` ranks evaluates, in batches of `batch_size`.

    The global batches are those of one process with batches of R x `batch_size`, each divided among the
    ranks. Every rank gets equally many rows in every batch, so that none waits for another: the last, short
    global batch is filled up with PADDING (never with one process).
    """
    full = len(indices) // (batch_size * world_size) * (batch_size * world_size)
    mine = indices[:full].reshape(-1, world_size, batch_size)[:, rank].reshape(-1)
    rest = indices[full:]
    rows = -(-len(rest) // world_size)
    padded = np.full(rows * world_size, PADDING, dtype=np.int64)
    padded[: len(rest)] = rest
    return np.concatenate([mine, padded.reshape(world_size, rows)[rank]])
