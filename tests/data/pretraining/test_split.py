import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptpl.data.pretraining.encoding import split_documents
from gptpl.data.splits import check_ratios
from gptpl.errors import InputError

RATIOS = st.floats(0.01, 0.99)


@given(st.text(), RATIOS)
def test_one_document_is_cut_as_in_the_book(text: str, ratio: float):
    cut = int(ratio * len(text))
    pieces = dict(split_documents([text], train_characters=cut))
    assert pieces.get("train", "") == text[: int(ratio * len(text))]
    assert pieces.get("val", "") == text[int(ratio * len(text)) :]


@given(st.lists(st.text(alphabet="abc\n", max_size=6)), RATIOS)
def test_several_documents_are_cut_at_a_character_of_all_of_them(documents: list[str], ratio: float):
    whole = "".join(documents)
    cut = int(ratio * len(whole))
    pieces = list(split_documents(documents, train_characters=cut))
    assert "".join(text for part, text in pieces if part == "train") == whole[:cut]
    assert "".join(text for part, text in pieces if part == "val") == whole[cut:]
    assert [part for part, _ in pieces] == sorted(part for part, _ in pieces)  # train comes first
    assert all(text for _, text in pieces)


def test_the_document_in_which_the_cut_falls_comes_as_two_pieces():
    assert list(split_documents(["one", "four", "six"], train_characters=5)) == [
        ("train", "one"),
        ("train", "fo"),
        ("val", "ur"),
        ("val", "six"),
    ]


def test_a_cut_between_documents_leaves_no_empty_piece():
    assert list(split_documents(["one", "", "two"], train_characters=3)) == [("train", "one"), ("val", "two")]


@pytest.mark.parametrize("ratio", [0, 1, -0.5, 1.5, 90, math.nan, math.inf])
def test_a_ratio_outside_0_to_1_is_refused(ratio: float):
    with pytest.raises(InputError, match=rf"data\.train_ratio={ratio} .*between 0 and 1"):
        check_ratios(train_ratio=ratio)
