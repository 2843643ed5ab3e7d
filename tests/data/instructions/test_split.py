"""The book's cut, and no question in two splits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptpl.data.instructions.entries import Entry, split_entries
from gptpl.data.splits import SPLITS
from gptpl.errors import InputError


def entries(questions: list[int]) -> list[Entry]:
    """One an instruction; the answers tell equal questions apart."""
    return [
        Entry(instruction=f"question {number}", input="", output=f"answer {place}")
        for place, number in enumerate(questions)
    ]


def test_the_books_cut():
    every = entries(list(range(1100)))
    splits = split_entries(every)
    assert [len(splits.of(name)) for name in SPLITS] == [935, 55, 110]
    assert splits.train + splits.test + splits.val == every
    assert splits.shared == 0


@given(st.lists(st.integers(0, 30), min_size=40, max_size=60), st.none() | st.integers(0, 99))
def test_no_question_leaks_and_no_answer_changes(questions, seed):
    every = entries([*questions, *range(100, 160)])  # enough of their own for every split
    answers = {entry.output: entry.instruction for entry in every}
    kept = split_entries(every, shuffle_seed=seed, train_share=0.5, test_share=0.2, duplicates="keep")
    for mode in ("remove", "group"):
        splits = split_entries(every, shuffle_seed=seed, train_share=0.5, test_share=0.2, duplicates=mode)
        asked = [{entry.instruction for entry in splits.of(name)} for name in SPLITS]
        assert sum(map(len, asked)) == len(set.union(*asked))
        every_after = [entry for name in SPLITS for entry in splits.of(name)]
        assert all(answers[entry.output] == entry.instruction for entry in every_after)
        assert len(every_after) == len(every) - (splits.shared if mode == "remove" else 0)
        assert splits.shared == kept.shared
        assert splits.train[: len(kept.train)] == kept.train
    assert sum(len(kept.of(name)) for name in SPLITS) == len(every)


def test_white_space_makes_no_other_question_and_the_input_does():
    def entry(instruction: str, text: str) -> Entry:
        return Entry(instruction=instruction, input=text, output="x")

    every = [entry("Translate  this.", "a"), entry("Translate this. ", "a "), entry("Translate this.", "b")]
    splits = split_entries(every, train_share=0.4, test_share=0.34)
    assert (splits.train, splits.test, splits.val, splits.shared) == ([every[0]], [], [every[2]], 1)


def test_a_seed_shuffles_and_another_shuffles_otherwise():
    every = entries(list(range(100)))
    first, again, other = (split_entries(every, shuffle_seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.train != other.train != every[:85]
    assert sorted(first.train + first.test + first.val, key=every.index) == every


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train_share": 0.9, "test_share": 0.1}, "add up to less than 1"),
        ({"train_share": 0.0}, "add up to less than 1"),
        ({"duplicates": "merge"}, "data.duplicates=merge is unknown: choose one of remove, group, keep"),
        ({"train_share": 0.01}, "20 entries leave none for training"),
    ],
)
def test_bad_shares(changes, said):
    with pytest.raises(InputError, match=f"^[^\n]*{said}[^\n]*$"):
        split_entries(entries(list(range(20))), **changes)
