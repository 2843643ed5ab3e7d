"""From labelled examples to the three splits: equal texts, balancing, cutting, and remarks on them."""

import csv
import hashlib
import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np

from gptpl.data.sources.records import WHOLE, Example, text_rows
from gptpl.data.splits import (
    SPLITS,
    Duplicates,
    Split,
    check_choice,
    check_ratios,
    homes,
    split_file,
    write_split,
)
from gptpl.errors import InputError
from gptpl.text import count_text

Balance = Literal["none", "undersample", "class_weights"]
_COLUMNS = ("text", "label")


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How examples become splits.

    Args:
        train_ratio, val_ratio: fractions of one table to train and to validate on; the rest is the test.
        stratified: whether every class is split by itself.
        balance: "undersample" leaves as many examples of every class as the smallest has: of one table before
            it is split, as in the book, of given splits in training alone. The others change no example.
        duplicates: "group" keeps equal texts in one split (of given splits, only the last that has them keeps
            them); "remove" keeps the first of equal texts, and then does the same; "keep" does nothing.
        seed: of everything that is drawn.

    Raises InputError for an invalid setting.
    """

    train_ratio: float
    val_ratio: float
    stratified: bool = False
    balance: Balance = "none"
    duplicates: Duplicates = "group"
    seed: int = 123

    def __post_init__(self) -> None:
        check_choice("data.balance", self.balance, Balance)
        check_choice("data.duplicates", self.duplicates, Duplicates)
        check_ratios(train_ratio=self.train_ratio, val_ratio=self.val_ratio)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Splits, their classes in alphabetical order, and remarks on what was done to `read` examples."""

    splits: dict[Split, list[Example]]
    classes: tuple[str, ...]
    read: int
    remarks: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Hash of every text and label of every split, in order."""
        digest = hashlib.sha256()
        for name, examples in self.splits.items():
            digest.update(f"{name} {len(examples)}\n".encode())
            for example in examples:
                for part in (example.label.encode(), example.text.encode()):
                    digest.update(len(part).to_bytes(8, "little") + part)
        return digest.hexdigest()


def prepare(given: Mapping[str, Sequence[Example]], how: Preparation) -> Prepared:
    """Make the splits of one table, or of three. `given` is what `LabelledCorpus.examples` returns.

    Raises InputError where there is only one class, a split is left without examples, or validation or test
    have a label that training lacks.
    """
    whole = [example for examples in given.values() for example in examples]
    if len(labels := label_counts(whole)) == 1:
        raise InputError(
            f"all {len(whole):,} examples have the label {next(iter(labels))!r}: give examples of two"
            " classes or more, and check data.label_column"
        )
    remarks = _remarks(whole, how)
    if how.duplicates == "remove":
        given = {name: _without_repeats(examples) for name, examples in given.items()}
    if WHOLE in given:
        splits = _split(_balanced(given[WHOLE], how, remarks), how)
    else:
        splits = _given({cast(Split, name): list(given[name]) for name in given}, how, remarks)
    _check(splits)
    return Prepared(
        splits=splits,
        classes=tuple(label_counts(splits["train"])),
        read=len(whole),
        remarks=tuple(remarks),
        warnings=_warnings(splits),
    )


def label_counts(examples: Iterable[Example]) -> dict[str, int]:
    """How often each label occurs, by label in alphabetical order."""
    return dict(sorted(Counter(example.label for example in examples).items()))


def _check(splits: Mapping[Split, Sequence[Example]]) -> None:
    for name, examples in splits.items():
        if not examples:
            raise InputError(
                f"no example is left for {SPLITS[name]}: give more or other examples, or change"
                " data.train_ratio, data.val_ratio or data.duplicates"
            )
    known = label_counts(splits["train"])
    if len(known) == 1:
        raise InputError(
            f"all training examples have the label {next(iter(known))!r}: give more examples of the others,"
            " or set data.stratified=true"
        )
    for name, examples in splits.items():
        for example in examples:
            if example.label not in known:
                raise InputError(
                    f"the label {example.label!r} (line {example.line}) is in {SPLITS[name]}, but not in"
                    " training: check its spelling, or give more examples, or data.stratified=true"
                )


# --- equal texts ----------------------------------------------------------------------------------------


def _key(example: Example) -> str:
    """White space inside counts: the splits of older runs depend on it."""
    return example.text.strip()


def _remarks(whole: Sequence[Example], how: Preparation) -> list[str]:
    labels: dict[str, set[str]] = defaultdict(set)
    for example in whole:
        labels[_key(example)].add(example.label)
    remarks = []
    if contradictory := sum(len(found) > 1 for found in labels.values()):
        remarks.append(
            f"{count_text(contradictory, 'text')} with more than one label: no classifier can learn both"
        )
    if repeated := len(whole) - len(labels):
        done = {"group": "; equal texts stay in one split", "remove": " and are left out", "keep": ""}
        remarks.append(
            f"{repeated:,} of {len(whole):,} examples repeat the text of an earlier one"
            + done[how.duplicates]
        )
    return remarks


def _without_repeats(examples: Iterable[Example]) -> list[Example]:
    first: dict[str, Example] = {}
    for example in examples:
        first.setdefault(_key(example), example)
    return list(first.values())


def _given(
    splits: dict[Split, list[Example]], how: Preparation, remarks: list[str]
) -> dict[Split, list[Example]]:
    """Given splits, without what a later one has, too: the test keeps all of its examples."""
    if how.duplicates != "keep":
        home = homes(splits, _key, ("test", "val", "train"))
        removed = sum(where != name for name in splits for where in home[name])
        splits = {
            name: [each for each, where in zip(splits[name], home[name], strict=True) if where == name]
            for name in splits
        }
        if removed:
            remarks.append(f"{removed:,} examples removed: a later split has the same text")
    return splits | {"train": _balanced(splits["train"], how, remarks)}


def _warnings(splits: Mapping[Split, Sequence[Example]]) -> tuple[str, ...]:
    home = homes(splits, _key, ("train", "val", "test"))
    leaks = {name: sum(where != name for where in home[name]) for name in splits}
    return tuple(
        f"{count:,} of the {len(splits[name]):,} {SPLITS[name]} examples are also in an earlier split: their"
        " score is too good by what the model remembers; data.duplicates=group keeps them together"
        for name, count in leaks.items()
        if count
    )


# --- rare classes ---------------------------------------------------------------------------------------


def _balanced(examples: Sequence[Example], how: Preparation, remarks: list[str]) -> list[Example]:
    if how.balance != "undersample" or not examples:
        return list(examples)
    kept = undersample(examples, seed=how.seed)
    counts = label_counts(examples)
    before = ", ".join(f"{label} {count:,}" for label, count in counts.items())
    remarks.append(f"undersampled to {min(counts.values()):,} examples of each class; there were {before}")
    return kept


def undersample(examples: Sequence[Example], *, seed: int) -> list[Example]:
    """As many examples of every class as the smallest has, class after class in alphabetical order.

    They are drawn as pandas' `DataFrame.sample(n, random_state=seed)` draws them, without replacement, from
    each larger class; the smallest keeps its order. For two classes with the first larger this is the book's
    `create_balanced_dataset`.
    """
    counts = label_counts(examples)
    least = min(counts.values())
    chosen: list[Example] = []
    for label, count in counts.items():
        members = [example for example in examples if example.label == label]
        # A generator for every class, as the book's call has.
        chosen += _shuffled(members, seed)[:least] if count > least else members
    return chosen


def inverse_frequency_weights(counts: Sequence[int]) -> list[float]:
    """Weights w_c = N / (C n_c) of C classes with n_c of N examples: in the sum every class counts the same.

    The mean weight of an example is 1 (scikit-learn's `class_weight="balanced"`).
    """
    return [sum(counts) / (len(counts) * count) for count in counts]


# --- cutting one table in three -------------------------------------------------------------------------


def _split(examples: Sequence[Example], how: Preparation) -> dict[Split, list[Example]]:
    """The examples, shuffled by the seed, cut in three.

    The order is that of pandas' `DataFrame.sample(frac=1, random_state=seed)`. Unless duplicates are kept,
    examples of equal text follow the first of them, and a cut between them moves behind the last: without
    equal texts nothing differs, and it is the book's `random_split`. With `stratified` every class is split
    by itself, and the parts are shuffled again.
    """
    if not how.stratified:
        return _cut(_shuffled(examples, how.seed), how)
    class_of: dict[str, str] = {}
    strata: dict[str, list[Example]] = defaultdict(list)
    for example in examples:  # equal texts with different labels go with the first of them
        first = class_of.setdefault(_key(example), example.label)
        strata[example.label if how.duplicates == "keep" else first].append(example)
    parts: dict[Split, list[Example]] = {"train": [], "val": [], "test": []}
    for label in sorted(strata):
        for name, part in _cut(_shuffled(strata[label], how.seed), how).items():
            parts[name] += part
    return {name: _shuffled(part, how.seed) for name, part in parts.items()}


def _shuffled(examples: Sequence[Example], seed: int) -> list[Example]:
    order = np.random.RandomState(seed).permutation(len(examples))  # RandomState, because pandas uses it
    return [examples[i] for i in order]


def _cut(examples: list[Example], how: Preparation) -> dict[Split, list[Example]]:
    # int() of the products, as in the book.
    first = int(len(examples) * how.train_ratio)
    second = first + int(len(examples) * how.val_ratio)
    if how.duplicates != "keep":
        groups: dict[str, list[Example]] = defaultdict(list)
        for example in examples:
            groups[_key(example)].append(example)
        examples = [example for group in groups.values() for example in group]
        ends = np.cumsum([0, *map(len, groups.values())])
        first, second = (int(ends[np.searchsorted(ends, cut)]) for cut in (first, second))
    return {"train": examples[:first], "val": examples[first:second], "test": examples[second:]}


# --- in a run's folder ----------------------------------------------------------------------------------


def write_splits(run_dir: Path, splits: Mapping[Split, Sequence[Example]]) -> None:
    """Write `data/train.csv`, `validation.csv` and `test.csv`, with the columns text and label."""
    for name, examples in splits.items():
        lines = io.StringIO(newline="")
        # Every field in quotes: without them csv reads some texts differently from what it wrote.
        writer = csv.writer(lines, quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writerow(_COLUMNS)
        writer.writerows((example.text, example.label) for example in examples)
        write_split(run_dir, name, ".csv", lines.getvalue())


def read_split(run_dir: Path, name: Split) -> list[Example]:
    """The examples that `write_splits` kept. Raises InputError where they are missing or unreadable."""
    path = split_file(run_dir, name, ".csv")
    if not path.is_file():
        raise InputError(f"{path} does not exist: give a file with labelled texts as data.path=FILE")
    return list(text_rows(path, *_COLUMNS))
