"""The order of the training windows: a function of seed and epoch and of nothing else."""

# N global batches, R ranks, B windows in a rank's batch

from collections.abc import Iterator
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DistributedSampler, SequentialSampler

from gptpl.errors import InputError


class EpochSampler(DistributedSampler[int]):
    """Window numbers (0 to `windows` - 1) of one rank; the last incomplete global batch is dropped.

    A global batch is R x B windows, R = `world_size`; rank r takes its r-th B windows. So R processes with
    batches of B see the global batches of one process with batches of R x B. `set_epoch` chooses the order;
    Lightning calls it before every epoch.

    It is a DistributedSampler in name, so that Lightning sees that the ranks are dealt with and puts no
    sampler of its own in its place; of that class only `set_epoch` is used.

    A sampler made with `start=(epoch, batch)` begins at that epoch, and in it leaves out the batches before;
    its length stays that of a whole epoch, as Lightning expects of a loader that goes on within one. An epoch
    ends after `limit` batches of each rank, where that is set.
    """

    def __init__(
        self,
        windows: int,
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
        numbers = cast(torch.utils.data.Dataset[int], range(windows))
        super().__init__(
            numbers, num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed, drop_last=True
        )
        self.windows = windows
        self.batch_size = batch_size
        self.start = start
        self.limit: int | None = None
        self.set_epoch(start[0])

    @property
    def batches(self) -> int:
        """How many batches every rank gets in an epoch (= N)."""
        return self.windows // (self.batch_size * self.num_replicas)

    def order(self) -> Tensor:
        """Return the window numbers of the current epoch, all ranks': (N, R, B) int64."""
        numbers = torch.arange(self.windows)
        if self.shuffle:
            # Not seed + epoch: then epoch 1 of seed 1 would be epoch 0 of seed 2.
            mixed = np.random.SeedSequence([self.seed, self.epoch]).generate_state(1, np.uint64)
            generator = torch.Generator().manual_seed(int(mixed[0]))
            numbers = torch.randperm(self.windows, generator=generator)
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
    """An EpochSampler for `shuffle=False`, which Lightning then takes for the SequentialSampler it is.

    It would put another in its place where `overfit_batches` is set.
    """
