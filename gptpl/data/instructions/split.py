"""Which entries are trained on, validated on and tested on; no question is in two of the splits."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from gptpl.data.instructions.entries import Entry
from gptpl.errors import InputError

Duplicates = Literal["remove", "group", "keep"]
SplitName = Literal["train", "val", "test"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)
_PRECEDENCE: tuple[SplitName, ...] = ("train", "test", "val")
"""Where a question that several splits hold belongs: to the first of these."""


@dataclass(frozen=True, kw_only=True)
class InstructionSplits:
    """The entries of each split, in order.

    `shared` counts the entries whose question also stands in another split, of higher precedence; they were
    removed, moved there, or kept, as `duplicates` says.
    """

    train: list[Entry]
    val: list[Entry]
    test: list[Entry]
    shared: int
    duplicates: Duplicates

    def of(self, split: SplitName) -> list[Entry]:
        """The entries of one split."""
        return {"train": self.train, "val": self.val, "test": self.test}[split]


def split_entries(
    entries: Sequence[Entry],
    *,
    train_share: float = 0.85,
    test_share: float = 0.1,
    shuffle_seed: int | None = None,
    duplicates: Duplicates = "remove",
) -> InstructionSplits:
    """The first entries to train on, the next to test on, the rest to validate on, as the book does.

    Args:
        entries: all.
        train_share: of the entries, rounded down.
        test_share: the same; 0: no test.
        shuffle_seed: decides the order before the cut; None: that of the file.
        duplicates: what becomes of an entry whose question (see `Entry.question`) an other split has too;
            training comes before test, test before validation. "remove": the later split loses it; "group":
            it joins the others; "keep": it stays, and the later split is a little too easy.

    Raises InputError for shares or entries that leave a split empty, and for an unknown `duplicates`.
    """
    _check(train_share, test_share, duplicates)
    order = list(entries)
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(order)
    # int() of the product, as in the book: its 1,100 entries are 935, 110 and 55.
    n_train, n_test = int(len(order) * train_share), int(len(order) * test_share)
    cut: dict[SplitName, list[Entry]] = {
        "train": order[:n_train],
        "test": order[n_train : n_train + n_test],
        "val": order[n_train + n_test :],
    }
    shared = _settle(cut, duplicates)
    for told, part in (("training", cut["train"]), ("validation", cut["val"])):
        if not part:
            raise InputError(
                f"{len(order)} entries leave none for {told}: give more entries, or change data.train_share"
                f"={train_share}, data.test_share={test_share} or data.duplicates={duplicates}"
            )
    return InstructionSplits(**cut, shared=shared, duplicates=duplicates)


def _settle(cut: dict[SplitName, list[Entry]], duplicates: Duplicates) -> int:
    """Deals with the questions that stand in more than one split, in place; returns how many there are."""
    home: dict[tuple[str, str], SplitName] = {}
    shared = 0
    for name in _PRECEDENCE:
        kept = []
        for entry in cut[name]:
            where = home.setdefault(entry.question, name)
            shared += where != name
            if where == name or duplicates == "keep":
                kept.append(entry)
            elif duplicates == "group":
                cut[where].append(entry)
        cut[name] = kept
    return shared


def _check(train_share: float, test_share: float, duplicates: str) -> None:
    # 1e-9: 0.85 + 0.1 + 0.05 is 1.0, but not in every order.
    if not (0 < train_share < 1 and 0 <= test_share < 1 and train_share + test_share < 1 - 1e-9):
        raise InputError(
            f"data.train_share={train_share} and data.test_share={test_share} leave nothing to validate on:"
            " give shares that add up to less than 1, such as 0.85 and 0.1"
        )
    if duplicates not in get_args(Duplicates):
        raise InputError(
            f"data.duplicates={duplicates} is unknown: choose one of {', '.join(get_args(Duplicates))}"
        )
