"""Shuffled examples cut into training, validation and test, such that equal texts stay together."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gptpl.data.labelled.examples import Example
from gptpl.data.training_data import Split
from gptpl.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Parts of the examples to train and to validate on; the rest is for the test."""

    train: float
    val: float

    def __post_init__(self) -> None:
        for name, share in (("train_share", self.train), ("val_share", self.val)):
            if not 0 < share < 1:
                raise InputError(f"data.{name}={share} is no share of the examples: give 0 < share < 1")
        if self.train + self.val >= 1:
            raise InputError(
                f"data.train_share={self.train} and data.val_share={self.val} leave nothing for the test:"
                " make their sum less than 1"
            )

    def cuts(self, count: int) -> tuple[int, int]:
        """Where the first and the second part of so many examples end, rounded down as in the book."""
        train_end = int(count * self.train)
        return train_end, train_end + int(count * self.val)


def split(
    examples: Sequence[Example], shares: Shares, *, seed: int, together: bool, stratified: bool = False
) -> dict[Split, list[Example]]:
    """The examples in an order of `seed`, cut in three.

    The order is that of pandas' `DataFrame.sample(frac=1, random_state=seed)`. With `together`, examples of
    equal text follow the first of them, and a cut that would part them comes after the last: without equal
    texts nothing differs, and it is the book's `random_split`. With `stratified` every class is split by
    itself, and the parts are shuffled anew.
    """
    if not stratified:
        return _cut(_shuffled(examples, seed), shares, together=together)
    parts: dict[Split, list[Example]] = {"train": [], "val": [], "test": []}
    for members in _strata(examples, together=together):
        for name, part in _cut(_shuffled(members, seed), shares, together=together).items():
            parts[name] += part
    return {name: _shuffled(part, seed) for name, part in parts.items()}


def _strata(examples: Sequence[Example], *, together: bool) -> list[list[Example]]:
    """The examples by class; equal texts with different labels go with the first of them."""
    class_of: dict[str, str] = {}
    strata: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        label = class_of.setdefault(example.key, example.label) if together else example.label
        strata[label].append(example)
    return [strata[label] for label in sorted(strata)]


def _shuffled(examples: Sequence[Example], seed: int) -> list[Example]:
    order = np.random.RandomState(seed).permutation(len(examples))
    return [examples[i] for i in order]


def _cut(examples: list[Example], shares: Shares, *, together: bool) -> dict[Split, list[Example]]:
    first, second = shares.cuts(len(examples))
    if together:
        groups: dict[str, list[Example]] = defaultdict(list)
        for example in examples:
            groups[example.key].append(example)
        examples = [example for group in groups.values() for example in group]
        first, second = (_after_group(examples, cut) for cut in (first, second))
    return {"train": examples[:first], "val": examples[first:second], "test": examples[second:]}


def _after_group(examples: list[Example], cut: int) -> int:
    while 0 < cut < len(examples) and examples[cut].key == examples[cut - 1].key:
        cut += 1
    return cut
