"""The book's cut, and no question in two splits."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptpl.data.instructions.records import Instruction, InstructionSplits, split_instructions
from gptpl.data.splits import SPLITS
from gptpl.errors import InputError


def entries(questions: list[int]) -> list[Instruction]:
    """One an instruction; the answers tell equal questions apart."""
    return [
        Instruction(instruction=f"question {number}", input="", output=f"answer {place}")
        for place, number in enumerate(questions)
    ]


def test_the_books_cut():
    every = entries(list(range(1100)))
    splits = split_instructions(every)
    assert [len(splits.of(name)) for name in SPLITS] == [935, 55, 110]
    assert splits.train + splits.test + splits.val == every
    assert splits.shared == 0


@given(st.lists(st.integers(0, 30), min_size=40, max_size=60), st.none() | st.integers(0, 99))
def test_no_question_leaks_no_answer_changes_and_the_test_stays(questions, seed):
    every = entries([*range(100, 160), *questions, *range(160, 200)])  # enough of their own for every split
    answers = {entry.output: entry.instruction for entry in every}

    def split(duplicates: Any, precedence: Any = "test") -> InstructionSplits:
        return split_instructions(
            every,
            shuffle_seed=seed,
            train_ratio=0.5,
            test_ratio=0.2,
            duplicates=duplicates,
            precedence=precedence,
        )

    kept = split("keep")
    for duplicates in ("remove", "group"):
        splits = split(duplicates)
        asked = [{entry.instruction for entry in splits.of(name)} for name in SPLITS]
        assert sum(map(len, asked)) == len(set.union(*asked))
        every_after = [entry for name in SPLITS for entry in splits.of(name)]
        assert all(answers[entry.output] == entry.instruction for entry in every_after)
        assert len(every_after) == len(every) - (splits.shared if duplicates == "remove" else 0)
        assert splits.shared == kept.shared
        assert splits.test[: len(kept.test)] == kept.test
        older = split(duplicates, "train")
        assert older.train[: len(kept.train)] == kept.train
    assert split("remove").test == kept.test
    assert sum(len(kept.of(name)) for name in SPLITS) == kept.read == len(every)


def test_equal_questions_leave_training_then_validation_by_hand():
    every = entries([1, 2, 3, 4, 5, 2, 3, 6, 3, 1])  # 5 to train on, 3 for the test, 2 for validation
    splits = split_instructions(every, train_ratio=0.5, test_ratio=0.3)
    assert splits.train == [every[3], every[4]]
    assert splits.test == every[5:8]
    assert splits.val == [every[9]]
    assert splits.shared == 4


def test_white_space_makes_no_other_question_and_the_input_does():
    def entry(instruction: str, text: str) -> Instruction:
        return Instruction(instruction=instruction, input=text, output="x")

    every = [
        entry("Translate  this.", "a"),
        entry("Translate this.", "b"),
        entry("Translate this. ", "a "),
        entry("Other", ""),
    ]
    splits = split_instructions(every, train_ratio=0.5, test_ratio=0.25)
    assert (splits.train, splits.test, splits.val, splits.shared) == ([every[1]], [every[2]], [every[3]], 1)


def test_a_seed_shuffles_and_another_shuffles_otherwise():
    every = entries(list(range(100)))
    first, again, other = (split_instructions(every, shuffle_seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.train != other.train != every[:85]
    assert sorted(first.train + first.test + first.val, key=every.index) == every


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train_ratio": 0.9, "test_ratio": 0.1}, "add up to less than 1"),
        ({"train_ratio": 0.0}, "add up to less than 1"),
        ({"duplicates": "merge"}, "data.duplicates=merge is unknown: choose one of group, remove, keep"),
        ({"train_ratio": 0.01}, "20 instructions leave none for training"),
    ],
)
def test_bad_shares(changes, said):
    with pytest.raises(InputError, match=f"^[^\n]*{said}[^\n]*$"):
        split_instructions(entries(list(range(20))), **changes)
