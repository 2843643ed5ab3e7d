import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DistributedSampler

from gptpl.data.sampler import PADDING, EpochSampler, evenly_spaced, permuted, rank_share

sizes = st.tuples(st.integers(0, 60), st.integers(1, 5), st.integers(1, 4))  # sequences, batch_size, ranks


def epochs_of(sampler: EpochSampler, epoch: int) -> list[int]:
    sampler.set_epoch(epoch)
    return list(sampler)


@given(sizes, st.integers(0, 2**40), st.integers(0, 1000), st.booleans())
def test_ranks_see_the_global_batches_of_one_process(
    size: tuple[int, int, int], seed: int, epoch: int, shuffle: bool
):
    sequences, batch_size, ranks = size
    wide = batch_size * ranks
    one = epochs_of(EpochSampler(sequences, batch_size=wide, seed=seed, shuffle=shuffle), epoch)
    samplers = [
        EpochSampler(
            sequences, batch_size=batch_size, seed=seed, shuffle=shuffle, rank=rank, world_size=ranks
        )
        for rank in range(ranks)
    ]
    many = [epochs_of(sampler, epoch) for sampler in samplers]
    assert [len(sampler) for sampler in samplers] == [len(numbers) for numbers in many]
    for batch in range(sequences // wide):
        mine = slice(batch * batch_size, (batch + 1) * batch_size)
        joined = [number for numbers in many for number in numbers[mine]]
        assert joined == one[batch * wide : (batch + 1) * wide]


@given(sizes, st.integers(0, 2**63))
def test_no_sequence_comes_twice_and_only_the_last_short_batch_is_dropped(
    size: tuple[int, int, int], seed: int
):
    sequences, batch_size, _ = size
    numbers = list(EpochSampler(sequences, batch_size=batch_size, seed=seed))
    assert len(numbers) == sequences // batch_size * batch_size
    assert len(set(numbers)) == len(numbers)
    assert set(numbers) <= set(range(sequences))


def test_the_order_depends_on_seed_and_epoch_alone():
    first, again, other = (EpochSampler(50, batch_size=5, seed=seed) for seed in (1, 1, 2))
    orders = [epochs_of(first, epoch) for epoch in range(4)]
    assert [epochs_of(again, epoch) for epoch in (3, 1, 2, 0)] == [orders[epoch] for epoch in (3, 1, 2, 0)]
    assert len({tuple(order) for order in orders}) == 4
    # seed + epoch would repeat the epochs of one seed under the next
    assert epochs_of(other, 0) not in orders


def test_the_global_random_numbers_decide_nothing_and_stay_as_they_are():
    sampler = EpochSampler(50, batch_size=5, seed=1)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    order = list(sampler)
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(1)
    assert list(sampler) == order


def test_without_shuffling_the_order_is_that_of_the_text():
    sampler = EpochSampler(7, batch_size=2, seed=1, shuffle=False)
    assert epochs_of(sampler, 3) == [0, 1, 2, 3, 4, 5]


def test_every_sequence_is_left_out_in_some_epoch():
    sampler = EpochSampler(7, batch_size=4, seed=1)
    left_out = [set(range(7)) - set(epochs_of(sampler, epoch)) for epoch in range(40)]
    assert set.union(*left_out) == set(range(7))


def test_lightning_sees_that_the_ranks_are_dealt_with():
    assert isinstance(EpochSampler(7, batch_size=4, seed=1), DistributedSampler)


@pytest.mark.parametrize("batch", [0, 3, 6])
def test_a_start_leaves_out_the_batches_before_it_in_its_epoch_alone(batch):
    """What is left is the end of the same epoch's order, of every rank; the next epoch is whole."""
    for rank in (0, 1):
        options: dict[str, Any] = {"batch_size": 4, "seed": 7, "rank": rank, "world_size": 2}
        whole, later = EpochSampler(50, **options), EpochSampler(50, **options, start=(3, batch))
        assert len(later) == len(whole)
        for epoch, left_out in ((3, batch), (4, 0)):
            whole.set_epoch(epoch)
            if epoch != 3:  # in which it begins by itself, as worker processes fetch before Lightning says so
                later.set_epoch(epoch)
            assert list(later) == list(whole)[4 * left_out :]


# --- evaluation -----------------------------------------------------------------------------------------


@given(st.integers(1, 200), st.integers(1, 200))
def test_evenly_spaced_numbers_differ_and_leave_equal_gaps(available: int, wanted: int):
    numbers = evenly_spaced(available, wanted)
    assert len(numbers) == min(available, wanted)
    assert numbers[0] == 0
    assert numbers[-1] < available
    gaps = np.diff([*numbers, available])
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1


def test_evenly_spaced_over_nothing_is_nothing():
    assert len(evenly_spaced(0, 5)) == 0


@given(st.integers(0, 60), st.integers(1, 5), st.integers(1, 4))
def test_ranks_share_every_sequence_in_the_batches_of_one_process(
    sequences: int, batch_size: int, ranks: int
):
    starts = np.arange(sequences) * 3
    shares = [rank_share(starts, batch_size=batch_size, rank=rank, world_size=ranks) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1  # no rank waits for another
    wide = batch_size * ranks
    for batch in range(-(-sequences // wide)):
        rows = [share[batch * batch_size : (batch + 1) * batch_size].tolist() for share in shares]
        assert len({len(row) for row in rows}) == 1
        present = [start for row in rows for start in row if start != PADDING]
        assert present == starts[batch * wide : (batch + 1) * wide].tolist()
    assert sum(start == PADDING for share in shares for start in share) < ranks


def test_one_process_gets_no_padding():
    starts = np.arange(7)
    assert rank_share(starts, batch_size=4, rank=0, world_size=1).tolist() == starts.tolist()


# --- orders that are computed ---------------------------------------------------------------------------


def keys(seed: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    return np.random.default_rng(seed).integers(0, 2**64, 6, dtype=np.uint64)


@given(st.integers(1, 5000), st.integers(0, 2**32))
def test_a_permutation_without_a_table_is_one(count: int, seed: int):
    found = permuted(np.arange(count), count, keys(seed))
    assert sorted(found.tolist()) == list(range(count))


def test_places_are_permuted_alike_however_they_are_asked_for():
    whole = permuted(np.arange(1000), 1000, keys(0))
    assert np.array_equal(permuted(np.array([999, 5, 5, 0]), 1000, keys(0)), whole[[999, 5, 5, 0]])
    assert not np.array_equal(permuted(np.arange(1000), 1000, keys(1)), whole)


def chi_square(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    """Pearson's statistic in standard deviations from its mean."""
    freedom = len(expected) - 1
    statistic = ((found - expected) ** 2 / expected).sum()
    return float((statistic - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize("count", [10**10, 2**40 - 1, 3 * 2**30 + 1])
def test_ten_billion_sequences_come_in_random_order(count: int):
    found = permuted(np.arange(200_000), count, keys(3))  # an epoch's beginning, where all places are small
    assert len(set(found.tolist())) == len(found)
    assert 0 <= found.min() <= found.max() < count
    edges = np.linspace(0, count, 1001)
    expected = np.full(1000, len(found) / 1000)
    # Where they are, how far it is from one to the next, and the lowest bits.
    steps = np.diff(found, append=found[0]) % count
    assert abs(chi_square(np.histogram(found, edges)[0], expected)) < 5
    assert abs(chi_square(np.histogram(steps, edges)[0], expected)) < 5
    assert abs(chi_square(np.bincount(found % 64, minlength=64), np.full(64, len(found) / 64))) < 5
    assert abs(np.corrcoef(found, np.arange(len(found)))[0, 1]) < 0.01


@given(sizes, st.integers(0, 100))
def test_computed_orders_are_shared_by_ranks_like_tables(size: tuple[int, int, int], seed: int):
    sequences, batch_size, ranks = size
    wide = batch_size * ranks
    one = epochs_of(EpochSampler(sequences, batch_size=wide, seed=seed, computed=True), 2)
    assert len(set(one)) == len(one) == sequences // wide * wide
    for rank in range(ranks):
        sampler = EpochSampler(
            sequences,
            batch_size=batch_size,
            seed=seed,
            rank=rank,
            world_size=ranks,
            start=(2, 1),
            computed=True,
        )
        mine = [one[i : i + batch_size] for i in range(wide + rank * batch_size, len(one), wide)]
        assert list(sampler) == [number for batch in mine for number in batch]


def test_a_trillion_sequences_take_no_memory():
    sampler = EpochSampler(10**12, batch_size=4, seed=1, rank=3, world_size=8, computed=True)
    sampler.set_epoch(7)
    first = list(itertools.islice(sampler, 12))
    assert len(set(first)) == 12
    assert len(sampler) == 10**12 // 32 * 4
    assert first == list(itertools.islice(sampler, 12))
    sampler.set_epoch(8)
    assert first != list(itertools.islice(sampler, 12))
