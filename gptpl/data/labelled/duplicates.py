"""Equal texts: how many there are, in how many splits, and with how many labels."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from gptpl.data.labelled.examples import Example, Splits
from gptpl.data.training_data import Split


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """What is said of equal texts; a text is counted with the white space around it left out.

    Attributes:
        repeated: examples that are not the first with their text.
        contradictory: different texts that occur with more than one label.
    """

    repeated: int
    contradictory: int


def count_duplicates(examples: Iterable[Example]) -> Duplicates:
    """Look at all examples together."""
    labels: dict[str, set[str]] = defaultdict(set)
    total = 0
    for example in examples:
        labels[example.key].add(example.label)
        total += 1
    contradictory = sum(len(found) > 1 for found in labels.values())
    return Duplicates(repeated=total - len(labels), contradictory=contradictory)


def leaks(splits: Splits) -> dict[Split, int]:
    """Examples of validation and test whose text also stands in an earlier split, by split."""
    seen: set[str] = set()
    found: dict[Split, int] = {}
    for name in ("train", "val", "test"):
        keys = [example.key for example in splits.get(name, ())]
        if name != "train":
            found[name] = sum(key in seen for key in keys)
        seen.update(keys)
    return found


def without_leaks(splits: Splits) -> tuple[dict[Split, list[Example]], int]:
    """The splits without what a later one has, too (the test keeps all it has), and how many that were."""
    later: set[str] = set()
    kept: dict[Split, list[Example]] = {}
    removed = 0
    for name in ("test", "val", "train"):
        examples = list(splits.get(name, ()))
        kept[name] = [example for example in examples if example.key not in later]
        removed += len(examples) - len(kept[name])
        later.update(example.key for example in examples)
    return {name: kept[name] for name in splits}, removed


def without_repeats(examples: Iterable[Example]) -> list[Example]:
    """The first example of each text."""
    first: dict[str, Example] = {}
    for example in examples:
        first.setdefault(example.key, example)
    return list(first.values())
