"""Every example in exactly one row, rows nearly full."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gptpl.data.instructions.datamodule import TokenRow, collate, pack_rows
from gptpl.data.packing import packed_places


@given(st.lists(st.integers(1, 20), max_size=60))
def test_every_length_once_and_no_group_above_the_capacity(lengths):
    groups = packed_places(lengths, capacity=20)
    assert sorted(place for group in groups for place in group) == list(range(len(lengths)))
    assert all(sum(lengths[place] for place in group) <= 20 for group in groups)
    assert groups == sorted(map(sorted, groups))
    # No two groups fit into one, which alone keeps them below twice the fewest; and nearly Johnson's bound.
    fullness = sorted(sum(lengths[place] for place in group) for group in groups)
    assert len(fullness) < 2 or fullness[0] + fullness[1] > 20
    assert len(groups) <= 11 / 9 * max(len(lengths), sum(lengths)) + 1
    assert groups == packed_places(lengths, capacity=20)


def test_best_fit_by_hand():
    """7 and 3 fill a row, 6 and 4 the next, 5 and 2 share one; in the order of the file within a row."""
    assert packed_places([3, 6, 5, 7, 2, 4], capacity=10) == [[0, 3], [1, 5], [2, 4]]


def test_rows_keep_their_targets_and_count_their_texts():
    texts = [[1, 2, 3], [4, 5], [6]]
    rows = [
        TokenRow(np.array(text), np.array([*text[1:], 99]), np.ones(len(text), dtype=np.int64))
        for text in texts
    ]
    packed = pack_rows(rows, max_length=4)
    batch = collate([*packed, None], eot_id=99, packed=True)
    assert batch.inputs.tolist() == [[1, 2, 3, 6], [4, 5, 99, 99], [99] * 4]
    assert batch.targets.tolist() == [[2, 3, 99, 99], [5, 99, -100, -100], [-100] * 4]
    assert batch.segments is not None
    assert batch.segments.tolist() == [[1, 1, 1, 2], [1, 1, 0, 0], [0] * 4]
    assert batch.tokens == 6
