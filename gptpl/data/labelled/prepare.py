"""From labelled examples to the three splits: duplicates, balancing, cutting, and what is said of it."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

from gptpl.data.labelled.balancing import undersample
from gptpl.data.labelled.corpora import WHOLE
from gptpl.data.labelled.duplicates import count_duplicates, leaks, without_leaks, without_repeats
from gptpl.data.labelled.examples import SPLITS, Example, Splits, label_counts
from gptpl.data.labelled.splitting import Shares, split
from gptpl.data.training_data import Split
from gptpl.errors import InputError

Balance = Literal["none", "undersample", "class_weights"]
Repeats = Literal["group", "remove", "keep"]


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How examples become splits.

    Args:
        shares: of one table that is to be split.
        stratified: whether every class is split by itself.
        balance: "undersample" leaves as many examples of every class as the smallest has: of one table before
            it is split, as in the book, of given splits in training alone. The others change no example.
        duplicates: "group" keeps equal texts in one split (of given splits, only the last that has them keeps
            them); "remove" keeps the first of equal texts, and then does the same; "keep" does nothing.
        seed: of what is drawn.
    """

    shares: Shares
    stratified: bool = False
    balance: Balance = "none"
    duplicates: Repeats = "group"
    seed: int = 123

    def __post_init__(self) -> None:
        for name, allowed in (("balance", Balance), ("duplicates", Repeats)):
            if getattr(self, name) not in get_args(allowed):
                raise InputError(
                    f"data.{name}={getattr(self, name)} is unknown: choose {', '.join(get_args(allowed))}"
                )


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Splits with their classes in alphabetical order, and sentences on what was done to the examples."""

    splits: dict[Split, list[Example]]
    classes: tuple[str, ...]
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
    """The splits of a table, or of three. `given` is what `LabelledCorpus.examples` gives.

    Raises InputError where there is only one class, a split is left without examples, or validation or test
    have a label that training has not.
    """
    whole = [example for examples in given.values() for example in examples]
    _check_classes(whole)
    remarks = _remarks(whole, how)
    if how.duplicates == "remove":
        given = {name: without_repeats(examples) for name, examples in given.items()}
    splits = _split(given[WHOLE], how, remarks) if WHOLE in given else _given(given, how, remarks)
    _check_left(given, splits)
    _check_splits(splits)
    classes = tuple(sorted({example.label for example in splits["train"]}))
    return Prepared(splits=splits, classes=classes, remarks=tuple(remarks), warnings=_warnings(splits))


def _remarks(whole: Sequence[Example], how: Preparation) -> list[str]:
    """What is to be said of equal texts."""
    found, remarks = count_duplicates(whole), []
    if found.contradictory:
        texts = "1 text has" if found.contradictory == 1 else f"{found.contradictory:,} texts have"
        remarks.append(f"{texts} more than one label: no classifier can learn both")
    if found.repeated:
        done = {"group": "; equal texts stay in one split", "remove": " and are left out", "keep": ""}
        repeated = f"{found.repeated:,} of {len(whole):,} examples repeat the text of an earlier one"
        remarks.append(repeated + done[how.duplicates])
    return remarks


def _warnings(splits: Splits) -> tuple[str, ...]:
    return tuple(
        f"{count:,} of the {len(splits[name]):,} {SPLITS[name]} examples also stand in an earlier split:"
        " their score is too good by what the model remembers; data.duplicates=group keeps them together"
        for name, count in leaks(splits).items()
        if count
    )


def _split(examples: Sequence[Example], how: Preparation, remarks: list[str]) -> dict[Split, list[Example]]:
    balanced = _balanced(examples, how, remarks)
    together = how.duplicates != "keep"
    return split(balanced, how.shares, seed=how.seed, together=together, stratified=how.stratified)


def _given(
    given: Mapping[str, Sequence[Example]], how: Preparation, remarks: list[str]
) -> dict[Split, list[Example]]:
    splits: Splits = {cast(Split, name): examples for name, examples in given.items()}
    if how.duplicates != "keep":
        splits, removed = without_leaks(splits)
        if removed:
            remarks.append(f"{removed:,} examples removed: a later split has the same text")
    return {
        name: _balanced(examples, how, remarks) if name == "train" else list(examples)
        for name, examples in splits.items()
    }


def _balanced(examples: Sequence[Example], how: Preparation, remarks: list[str]) -> list[Example]:
    if how.balance != "undersample" or not examples:
        return list(examples)
    kept = undersample(examples, seed=how.seed)
    before = ", ".join(f"{label} {count:,}" for label, count in label_counts(examples).items())
    least = len(kept) // len(label_counts(kept))
    remarks.append(f"undersampled to {least:,} examples of each class; there were {before}")
    return kept


def _check_classes(examples: Sequence[Example]) -> None:
    counts = label_counts(examples)
    if len(counts) == 1:
        raise InputError(
            f"all {len(examples):,} examples have the label {next(iter(counts))!r}: give examples of two"
            " classes or more, and check data.label_column"
        )


def _check_left(given: Mapping[str, Sequence[Example]], splits: Splits) -> None:
    """Of given splits only what a later one has, too, is taken away."""
    for name, examples in splits.items():
        if WHOLE not in given and not examples:
            raise InputError(
                f"every {SPLITS[name]} text also stands in a later split: give other files, or"
                " data.duplicates=keep"
            )


def _check_splits(splits: Splits) -> None:
    for name, examples in splits.items():
        if not examples:
            raise InputError(
                f"no example is left for {SPLITS[name]}: give more examples, or change data.train_share and"
                " data.val_share"
            )
    known = {example.label for example in splits["train"]}
    if len(known) == 1:
        raise InputError(
            f"all training examples have the label {next(iter(known))!r}: give more examples of the others,"
            " or set data.stratified=true"
        )
    for name, examples in splits.items():
        for example in examples:
            if example.label not in known:
                raise InputError(
                    f"the label {example.label!r} (line {example.line}) is in {SPLITS[name]} and in no"
                    " training example: check its spelling, or give more examples, or data.stratified=true"
                )
