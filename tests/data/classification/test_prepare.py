"""Splits of labelled texts: pandas' own draws, no label lost, no text in two splits, and what is said."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from gptpl.data.classification.splits import (
    Balance,
    Preparation,
    Prepared,
    inverse_frequency_weights,
    label_counts,
    prepare,
    read_split,
    undersample,
    write_splits,
)
from gptpl.data.sources.records import Example
from gptpl.data.splits import Duplicates
from gptpl.errors import InputError

RATIOS: dict[str, Any] = {"train_ratio": 0.7, "val_ratio": 0.1}


def examples(labels: str, texts: str | None = None) -> list[Example]:
    """One example a letter; its text is its number, or a letter of `texts`."""
    return [
        Example(text=str(i) if texts is None else texts[i], label=label, line=i + 1)
        for i, label in enumerate(labels)
    ]


def prepared(given: list[Example], **how: Any) -> Prepared:
    return prepare({"all": given}, Preparation(**RATIOS, **how))


def test_undersampling_and_split_are_those_of_the_books_pandas_code() -> None:
    # pandas 3.1: balanced = concat([ham.sample(12, random_state=123), spam]) of 40 rows "ham" (0 to 39) and
    # 12 rows "spam" (40 to 51), then balanced.sample(frac=1, random_state=123), cut by int() of the shares.
    balanced = "6 10 12 38 5 11 23 1 13 20 8 37 40 41 42 43 44 45 46 47 48 49 50 51"
    train, val, test = "11 48 49 46 43 13 1 37 5 38 51 40 44 20 42 47", "6 10", "8 45 23 50 12 41"
    messages = [Example(text=str(i), label="ham" if i < 40 else "spam") for i in range(52)]
    assert [example.text for example in undersample(messages, seed=123)] == balanced.split()
    splits = prepared(messages, balance="undersample").splits
    found = {name: " ".join(example.text for example in part) for name, part in splits.items()}
    assert found == {"train": train, "val": val, "test": test}


def test_a_text_and_its_label_stay_together_and_equal_texts_in_one_split() -> None:
    found = prepared(examples("ababababab" * 3, "ABCDEFGHIJ" * 3))
    where: dict[str, set[str]] = {}
    for name, part in found.splits.items():
        for example in part:
            where.setdefault(example.text, set()).add(name)
    assert {len(splits) for splits in where.values()} == {1}
    assert (
        "20 of 30 examples repeat the text of an earlier one; equal texts stay in one split" in found.remarks
    )
    assert not found.warnings


@settings(max_examples=60)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["none", "undersample", "class_weights"]),
    st.sampled_from(["group", "remove", "keep"]),
    st.booleans(),
)
def test_every_label_survives_and_no_text_leaks(
    seed: int, balance: Balance, duplicates: Duplicates, stratified: bool
) -> None:
    draw = random.Random(seed)
    given = [
        Example(text=draw.choice([str(draw.randrange(40)), f"  {i} \n"]), label=draw.choice("aab"))
        for i in range(200)
    ]
    try:
        found = prepared(given, balance=balance, duplicates=duplicates, stratified=stratified, seed=seed)
    except InputError:  # so few of a class can all fall into one split
        reject()
    before = Counter((example.text, example.label) for example in given)
    after = Counter((e.text, e.label) for part in found.splits.values() for e in part)
    assert after <= before
    if balance != "undersample" and duplicates != "remove":
        assert after == before
    if balance == "undersample":
        assert len(set(label_counts(e for part in found.splits.values() for e in part).values())) == 1
    if duplicates != "keep":
        texts = [{example.text.strip() for example in part} for part in found.splits.values()]
        assert not texts[0] & texts[1] | texts[0] & texts[2] | texts[1] & texts[2]


def test_kept_duplicates_are_counted_as_leaks() -> None:
    found = prepared(examples("ab" * 20, "AB" * 20), duplicates="keep")
    assert [len(part) for part in found.splits.values()] == [28, 4, 8]
    assert [warning.split(" are also")[0] for warning in found.warnings] == [
        "4 of the 4 validation examples",
        "8 of the 8 test examples",
    ]


def test_stratified_parts_have_the_shares_of_the_classes() -> None:
    found = prepared(examples("a" * 80 + "b" * 20), stratified=True)
    assert [label_counts(part) for part in found.splits.values()] == [
        {"a": 56, "b": 14},
        {"a": 8, "b": 2},
        {"a": 16, "b": 4},
    ]


def test_given_splits_keep_their_examples_but_for_those_that_a_later_split_has() -> None:
    given = {"train": examples("abab", "ABCD"), "val": examples("ab", "DE"), "test": examples("ab", "EF")}
    found = prepare(given, Preparation(**RATIOS))
    assert {name: [e.text for e in part] for name, part in found.splits.items()} == {
        "train": ["A", "B", "C"],
        "val": ["D"],
        "test": ["E", "F"],
    }
    assert "2 examples removed: a later split has the same text" in found.remarks


def test_training_texts_that_all_stand_in_validation_too_are_said() -> None:
    same = examples("abab")
    how = Preparation(**RATIOS)
    with pytest.raises(InputError, match="no example is left for training: give more or other"):
        prepare({"train": same, "val": same}, how)


def test_a_text_with_two_labels_is_said() -> None:
    found = prepared([*examples("ab", "AA"), *examples("ab" * 20)])
    assert "1 text with more than one label: no classifier can learn both" in found.remarks


def test_class_weights_are_inverse_frequencies() -> None:
    assert inverse_frequency_weights([30, 10]) == [40 / 60, 40 / 20]


def test_what_cannot_be_split_is_refused() -> None:
    with pytest.raises(InputError, match="all 5 examples have the label 'a': give examples of two"):
        prepared(examples("aaaaa"))
    with pytest.raises(InputError, match="no example is left for validation: give more"):
        prepared(examples("abab"))
    with pytest.raises(InputError, match="no example is left for training: give more"):
        prepare(
            {"train": [], "val": examples("ab")},
            Preparation(**RATIOS, balance="undersample", duplicates="keep"),
        )
    split = {"train": examples("ab"), "val": [Example(text="x", label="c", line=7)]}
    with pytest.raises(InputError, match=r"the label 'c' \(line 7\) is in validation, but not in training"):
        prepare(split, Preparation(**RATIOS))
    with pytest.raises(InputError, match=r"data\.balance=half is unknown: choose"):
        Preparation(**RATIOS, balance="half")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"data\.val_ratio=0\.5 must lie between 0 and 1"):
        Preparation(train_ratio=0.5, val_ratio=0.5)


def test_the_hash_is_that_of_texts_labels_and_splits() -> None:
    base = prepared(examples("ab" * 10))
    assert base.sha256 == prepared(examples("ab" * 10)).sha256
    changed = examples("ab" * 10)
    changed[3] = Example(text=changed[3].text, label="a")
    assert base.sha256 != prepared(changed).sha256
    assert base.sha256 != prepared(examples("ab" * 10), seed=4).sha256


def test_splits_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    texts = ['a "quote", a\nbreak', " ", "plain", "\r\n\t", "'", "naïve 東京"]
    whole = [Example(text=f"{text}{i}", label=f"l,{i % 2}") for i, text in enumerate(texts * 5)]
    splits = prepared(whole).splits
    write_splits(tmp_path, splits)
    for name, part in splits.items():
        assert read_split(tmp_path, name) == part
    with pytest.raises(InputError, match="does not exist: give a file"):
        read_split(tmp_path / "none", "test")
