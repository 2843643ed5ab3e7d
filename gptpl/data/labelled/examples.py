"""A labelled text, and three splits of them."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from gptpl.data.training_data import Split

SPLITS: Mapping[Split, str] = {"train": "training", "val": "validation", "test": "test"}
"""How reports call them."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A text, not empty, and what it is; `line` of its file, from 1, is for messages."""

    text: str
    label: str
    line: int = field(default=0, compare=False)

    @property
    def key(self) -> str:
        """What two examples have in common that say the same: the text without white space around it."""
        return self.text.strip()


Splits = Mapping[Split, Sequence[Example]]


def label_counts(examples: Iterable[Example]) -> dict[str, int]:
    """How often each label occurs, by label in alphabetical order."""
    return dict(sorted(Counter(example.label for example in examples).items()))
