import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptpl.data.pretraining import encoding
from gptpl.data.pretraining.encoding import BLOCK_TOKENS, count_duplicates


def brute_force(train: list[int], val: list[int], size: int) -> tuple[int, int]:
    known = {tuple(train[start : start + size]) for start in range(len(train) - size + 1)}
    blocks = [tuple(val[start : start + size]) for start in range(0, len(val) - size + 1, size)]
    return sum(block in known for block in blocks), len(blocks)


def tokens(ids: list[int], dtype: type[np.unsignedinteger] = np.uint16) -> np.ndarray:
    return np.array(ids, dtype=dtype)


few = st.lists(st.integers(0, 2), max_size=60)  # few different tokens, so that blocks do repeat


@given(few, few, st.sampled_from([1, 2, 4, 8]), st.integers(1, 20))
def test_counts_what_a_search_through_all_positions_finds(
    train: list[int], val: list[int], size: int, chunk: int
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "BLOCK_TOKENS", size)
        patch.setattr(encoding, "CHUNK_TOKENS", size * chunk)
        counted = count_duplicates(tokens(train), tokens(val))
    assert counted == brute_force(train, val, size)


@given(st.integers(0, 2**32 - 1))
def test_blocks_of_32_copied_at_odd_offsets_are_found_and_changed_ones_are_not(seed: int):
    generator = np.random.default_rng(seed)
    train = generator.integers(0, 50257, 500)
    val = generator.integers(0, 50257, 320)
    val[32:64] = train[7:39]
    val[96:128] = train[468:500]  # the last possible position
    val[160:192] = train[0:32]
    val[191] ^= 1  # one token differs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "CHUNK_TOKENS", 3 * BLOCK_TOKENS)
        counted = count_duplicates(train.astype(np.uint16), val.astype(np.uint32))
    assert counted == (2, 10)


def test_many_different_blocks_do_not_collide():
    generator = np.random.default_rng(0)
    train = generator.integers(0, 3, 300_000).astype(np.uint16)
    val = generator.integers(0, 3, 64_000).astype(np.uint16)
    assert count_duplicates(train, val) == (0, 2000)
    assert count_duplicates(train, train[5:64_005]) == (2000, 2000)


def test_neighbouring_values_and_constant_texts():
    zeros, ones = tokens([0] * 100), tokens([1] * 100)
    assert count_duplicates(zeros, ones)[0] == 0
    assert count_duplicates(zeros, zeros) == (3, 3)
    largest = tokens([2**32 - 1] * 64, np.uint32)
    assert count_duplicates(largest, largest) == (2, 2)


@pytest.mark.parametrize(("train", "val", "blocks"), [(0, 0, 0), (100, 31, 0), (31, 64, 2), (0, 32, 1)])
def test_splits_shorter_than_a_block_have_no_duplicates(train: int, val: int, blocks: int):
    counted = count_duplicates(tokens([7] * train), tokens([7] * val))
    assert counted == (0, blocks)
