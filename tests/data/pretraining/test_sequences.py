import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptpl.data.pretraining.datamodule import TokenSequences
from gptpl.data.sampler import PADDING
from gptpl.data.training_data import IGNORED
from gptpl.errors import InputError


def books_sequences(tokens: list[int], max_length: int, stride: int) -> list[tuple[list[int], list[int]]]:
    """The loop of the book's dataset, as it stands in its chapter 2."""
    return [
        (tokens[i : i + max_length], tokens[i + 1 : i + max_length + 1])
        for i in range(0, len(tokens) - max_length, stride)
    ]


@given(st.lists(st.integers(0, 65535), min_size=2, max_size=60), st.data())
def test_sequences_are_those_of_the_book(ids: list[int], data: st.DataObject):
    max_length = data.draw(st.integers(1, len(ids) - 1))
    stride = data.draw(st.integers(1, 20))
    sequences = TokenSequences(np.array(ids, dtype=np.uint16), max_length=max_length, stride=stride)
    expected = books_sequences(ids, max_length, stride)
    assert len(sequences) == len(expected)
    singles = [sequences[i] for i in range(len(sequences))]
    assert [(x.tolist(), y.tolist()) for x, y in singles] == expected
    inputs, targets = sequences.__getitems__(list(range(len(sequences)))[::-1])
    assert inputs.tolist() == [x for x, _ in expected][::-1]
    assert targets.tolist() == [y for _, y in expected][::-1]


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_items_are_int64_and_contiguous(dtype: type):
    sequences = TokenSequences(np.arange(20, dtype=dtype), max_length=4, stride=3)
    for tensor in (*sequences[1], *sequences.__getitems__([0, 2])):
        assert tensor.dtype == torch.int64
        assert tensor.is_contiguous()
    assert sequences[1][0].shape == (4,)
    assert sequences.__getitems__([0, 2])[1].shape == (2, 4)


def test_a_sequence_past_the_end_is_an_index_error():
    sequences = TokenSequences(np.arange(20, dtype=np.uint16), max_length=4, stride=4)
    with pytest.raises(IndexError):
        sequences[len(sequences)]
    with pytest.raises(IndexError):
        sequences.__getitems__([0, len(sequences)])


def test_changing_a_batch_leaves_the_tokens_alone():
    tokens = np.arange(20, dtype=np.int64)
    sequences = TokenSequences(tokens, max_length=4, stride=4)  # type: ignore[arg-type]
    sequences[0][0].fill_(-1)
    sequences.__getitems__([0])[1].fill_(-1)
    assert tokens.tolist() == list(range(20))


@pytest.mark.parametrize("length", [0, 1, 256])
def test_a_text_too_short_for_a_sequence_says_what_to_do(length: int):
    with pytest.raises(InputError) as caught:
        TokenSequences(np.zeros(length, dtype=np.uint16), max_length=256, stride=256, split="validation")
    message = str(caught.value)
    for part in ("validation split", f"{length} tokens", "max_length=256", "257", "data.train_ratio"):
        assert part in message
    assert "\n" not in message
    TokenSequences(np.zeros(257, dtype=np.uint16), max_length=256, stride=256)


def test_past_the_end_targets_are_ignored_and_inputs_stay_in_the_vocabulary():
    tokens = np.array([5, 6, 7, 8], np.uint16)
    inputs, targets = TokenSequences(tokens, max_length=4, stride=1, to_the_end=True)[1]
    assert inputs.tolist() == [6, 7, 0, 0]
    assert targets.tolist() == [7, 8, IGNORED, IGNORED]
    assert len(TokenSequences(tokens, max_length=3, stride=3, to_the_end=True)) == 1  # none without a target


def test_a_padding_row_has_no_target():
    sequences = TokenSequences(np.array([5, 6, 7], np.uint16), max_length=2, stride=2)
    inputs, targets = sequences.__getitems__([PADDING, 0])
    assert inputs.tolist() == [[0, 0], [5, 6]]
    assert targets.tolist() == [[IGNORED, IGNORED], [6, 7]]


def test_a_worker_gets_the_name_of_the_token_file_and_not_the_tokens(tmp_path: Path):
    np.save(tmp_path / "tokens.npy", np.arange(50_000, dtype=np.uint16))
    mapped = np.load(tmp_path / "tokens.npy", mmap_mode="r")
    for tokens in (mapped, mapped[1000:3000], np.arange(2000, dtype=np.uint32)):
        sequences = TokenSequences(tokens, max_length=10, stride=7)
        copy = pickle.loads(pickle.dumps(sequences))  # noqa: S301
        assert len(copy) == len(sequences)
        assert copy.__getitems__([0, 5])[1].equal(sequences.__getitems__([0, 5])[1])
    assert len(pickle.dumps(TokenSequences(mapped, max_length=10, stride=7))) < 1000
