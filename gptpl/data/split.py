"""Where the training text ends and the validation text begins."""

from collections.abc import Iterable, Iterator
from typing import Literal, get_args

from gptpl.errors import InputError

Part = Literal["train", "val"]
PARTS: tuple[Part, ...] = get_args(Part)


def check_train_ratio(train_ratio: float) -> None:
    """Raise InputError unless `train_ratio` lies strictly between 0 and 1."""
    if not 0 < train_ratio < 1:
        raise InputError(
            f"data.train_ratio={train_ratio} leaves nothing for one of the two splits: "
            "give the share of the text to train on, between 0 and 1, such as 0.9"
        )


def training_characters(total_characters: int, *, train_ratio: float) -> int:
    """Return how many of the first characters are training text (rounded down, as in the book)."""
    check_train_ratio(train_ratio)
    return int(train_ratio * total_characters)


def split_documents(documents: Iterable[str], *, train_characters: int) -> Iterator[tuple[Part, str]]:
    """Yield every document, in order, with the part it belongs to; the one the cut falls into comes as two.

    The first `train_characters` characters of the documents, counted without anything between them, are
    the training text. No piece is empty, so that a cut between two documents leaves no stray separator.
    """
    left = train_characters
    for document in documents:
        head, tail = document[:left], document[left:]
        left -= len(head)
        if head:
            yield "train", head
        if tail:
            yield "val", tail
