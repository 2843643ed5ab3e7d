"""Which examples come when, and on which rank: a function of seed and epoch and of nothing else."""

# N global batches, R ranks, B examples in a rank's batch

from collections.abc import Iterator
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DistributedSampler, SequentialSampler

from gptpl.errors import InputError

Indices = NDArray[np.int64]
PADDING = -1  # in place of an example's number: a row that counts nowhere


class EpochSampler(DistributedSampler[int]):
    """The numbers, from 0 on, of one rank's shuffled examples; the last incomplete global batch is dropped.

    A global batch is R x B examples, R = `world_size`; rank r takes its r-th B of them. So R processes with
    batches of B see the global batches of one process with batches of R x B. `set_epoch` chooses the order;
    Lightning calls it before every epoch.

    With `start=(epoch, batch)` it begins at that epoch, and in it leaves out the batches before; its length
    stays that of a whole epoch, as Lightning expects of a loader that goes on within one. An epoch ends after
    `limit` batches of each rank, where that is set.

    It is a DistributedSampler in name alone, so that Lightning puts no sampler of its own in its place.
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
    ) -> None:
        if seed < 0:
            raise InputError(f"seed={seed} is negative: give 0 or more")
        numbers = cast(torch.utils.data.Dataset[int], range(examples))
        super().__init__(
            numbers, num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed, drop_last=True
        )
        self.count = examples
        self.batch_size = batch_size
        self.start = start
        self.limit: int | None = None
        self.set_epoch(start[0])

    @property
    def batches(self) -> int:
        """How many batches every rank gets in an epoch (= N)."""
        return self.count // (self.batch_size * self.num_replicas)

    def order(self) -> Tensor:
        """The numbers of the current epoch, all ranks': (N, R, B) int64."""
        numbers = torch.arange(self.count)
        if self.shuffle:
            # Not seed + epoch: then epoch 1 of seed 1 would be epoch 0 of seed 2.
            mixed = np.random.SeedSequence([self.seed, self.epoch]).generate_state(1, np.uint64)
            generator = torch.Generator().manual_seed(int(mixed[0]))
            numbers = torch.randperm(self.count, generator=generator)
        kept = self.batches * self.num_replicas * self.batch_size
        return numbers[:kept].view(self.batches, self.num_replicas, self.batch_size)

    def __iter__(self) -> Iterator[int]:
        start_epoch, start_batch = self.start
        first = start_batch if self.epoch == start_epoch else 0
        for batch in self.order()[first : self.limit, self.rank]:
            yield from batch.tolist()

    def __len__(self) -> int:
        return self.batches * self.batch_size


class InOrder(EpochSampler, SequentialSampler):
    """An EpochSampler for `shuffle=False`; under `overfit_batches` Lightning would replace any other kind."""


def evenly_spaced(available: int, wanted: int) -> Indices:
    """`wanted` different numbers from 0 to `available` - 1, ascending; all if there are fewer."""
    wanted = min(wanted, available)
    return np.arange(wanted, dtype=np.int64) * available // max(1, wanted)


def rank_share(numbers: Indices, *, batch_size: int, rank: int, world_size: int) -> Indices:
    """The part of `numbers` that one of R = `world_size` ranks evaluates, in batches of `batch_size`.

    The global batches are those of one process with batches of R x `batch_size`, and each is dealt out among
    the ranks. Every rank gets equally many rows in every batch, so that none waits for another: the last,
    short global batch is filled up with PADDING (never with one process).
    """
    full = len(numbers) // (batch_size * world_size) * (batch_size * world_size)
    mine = numbers[:full].reshape(-1, world_size, batch_size)[:, rank].reshape(-1)
    rest = numbers[full:]
    rows = -(-len(rest) // world_size)
    padded = np.full(rows * world_size, PADDING, dtype=np.int64)
    padded[: len(rest)] = rest
    return np.concatenate([mine, padded.reshape(world_size, rows)[rank]])
