import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptpl.data.scored_windows import IGNORED, PADDING, ScoredWindows, evenly_spaced, rank_share
from gptpl.data.windows import TokenWindows


def test_inside_the_text_they_are_the_training_windows():
    tokens = np.arange(100, 200, dtype=np.uint16)
    windows = TokenWindows(tokens, max_length=8, stride=5)
    scored = ScoredWindows(tokens, np.arange(len(windows)) * 5, max_length=8)
    assert len(scored) == len(windows)
    for index in range(len(windows)):
        assert all(a.equal(b) for a, b in zip(scored[index], windows[index], strict=True))
    both = zip(scored.__getitems__([3, 1]), windows.__getitems__([3, 1]), strict=True)
    assert all(a.equal(b) and a.is_contiguous() and a.dtype == b.dtype for a, b in both)


def test_past_the_end_targets_are_ignored_and_inputs_stay_in_the_vocabulary():
    inputs, targets = ScoredWindows(np.array([5, 6, 7], np.uint16), np.array([0, 1]), max_length=4)[1]
    assert inputs.tolist() == [6, 7, 0, 0]
    assert targets.tolist() == [7, IGNORED, IGNORED, IGNORED]


def test_a_padding_row_has_no_target():
    scored = ScoredWindows(np.array([5, 6, 7], np.uint16), np.array([PADDING, 0]), max_length=2)
    inputs, targets = scored.__getitems__([0, 1])
    assert inputs.tolist() == [[0, 0], [5, 6]]
    assert targets.tolist() == [[IGNORED, IGNORED], [6, 7]]


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
def test_ranks_share_every_window_in_the_batches_of_one_process(windows: int, batch_size: int, ranks: int):
    starts = np.arange(windows) * 3
    shares = [rank_share(starts, batch_size=batch_size, rank=rank, world_size=ranks) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1  # no rank waits for another
    wide = batch_size * ranks
    for batch in range(-(-windows // wide)):
        rows = [share[batch * batch_size : (batch + 1) * batch_size].tolist() for share in shares]
        assert len({len(row) for row in rows}) == 1
        present = [start for row in rows for start in row if start != PADDING]
        assert present == starts[batch * wide : (batch + 1) * wide].tolist()
    assert sum(start == PADDING for share in shares for start in share) < ranks


def test_one_process_gets_no_padding():
    starts = np.arange(7)
    assert rank_share(starts, batch_size=4, rank=0, world_size=1).tolist() == starts.tolist()


def test_a_worker_gets_the_name_of_the_token_file(tmp_path: Path):
    np.save(tmp_path / "tokens.npy", np.arange(50_000, dtype=np.uint16))
    tokens = np.load(tmp_path / "tokens.npy", mmap_mode="r")
    windows = ScoredWindows(tokens, np.array([40_000, 49_995]), max_length=10)
    pickled = pickle.dumps(windows)
    assert len(pickled) < 1000
    copy = pickle.loads(pickled)  # noqa: S301
    assert copy[1][0].equal(windows[1][0])
    with pytest.raises(IndexError):
        copy[2]
