"""Labelled texts as tokens, and batches of them, padded."""

# B texts in a batch, T tokens in the longest of them

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gptpl.data.labelled.examples import Example
from gptpl.data.scored_windows import IGNORED, PADDING
from gptpl.data.tokenizers import TokenIds, Tokenizer
from gptpl.errors import InputError


class LabelledBatch(NamedTuple):
    """Texts of a batch: `tokens` (B, T), `lengths` (B,) without the padding, `labels` (B,), all int64.

    A label of -100 is none.
    """

    tokens: Tensor
    lengths: Tensor
    labels: Tensor


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What truncation took: so many texts were longer, and lost so many tokens together."""

    texts: int
    tokens: int


def encode_texts(texts: Sequence[str], tokenizer: Tokenizer) -> list[TokenIds]:
    """The tokens of each text. Raises InputError for a text that has none."""
    encoded = tokenizer.encode_many(texts)
    for text, tokens in zip(texts, encoded, strict=True):
        if not len(tokens):
            raise InputError(f"{text[:40]!r} has no tokens: remove this text, or use another tokenizer")
    return encoded


def truncated(encoded: Sequence[TokenIds], max_length: int) -> tuple[list[TokenIds], Cut]:
    """The first `max_length` tokens of each text, and what was cut off."""
    lost = [len(tokens) - max_length for tokens in encoded if len(tokens) > max_length]
    return [tokens[:max_length] for tokens in encoded], Cut(texts=len(lost), tokens=sum(lost))


def padded(
    encoded: Sequence[TokenIds], *, pad_id: int, to_length: int | None = None
) -> tuple[Tensor, Tensor]:
    """Tokens (B, T), `pad_id` behind the shorter texts, and lengths (B,); T is `to_length`, or the longest's.

    No text may be empty or longer than `to_length`.
    """
    lengths = np.array([len(tokens) for tokens in encoded], dtype=np.int64)
    tokens = np.full((len(encoded), to_length or int(lengths.max())), pad_id, dtype=np.int64)
    for row, one in zip(tokens, encoded, strict=True):
        row[: len(one)] = one
    return torch.from_numpy(tokens), torch.from_numpy(lengths)


class LabelledTexts(Dataset[LabelledBatch]):
    """The examples of a split, as batches.

    Args:
        encoded: tokens of each text, one or more.
        labels: number of each text's class.
        pad_id: token behind the shorter texts of a batch.
        padded_to: tokens that every text is filled up to; None: as many as the longest of its batch has.
    """

    def __init__(
        self, encoded: Sequence[TokenIds], labels: Sequence[int], *, pad_id: int, padded_to: int | None = None
    ) -> None:
        self._encoded = encoded
        self.labels = np.array(labels, dtype=np.int64)
        self._pad_id = pad_id
        self.padded_to = padded_to

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text."""
        return [len(tokens) for tokens in self._encoded]

    def __len__(self) -> int:
        return len(self._encoded)

    def __getitem__(self, index: int) -> LabelledBatch:
        """A batch of one."""
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> LabelledBatch:
        """The examples of these numbers as a batch; PADDING is a text of one padding token without label."""
        nothing = np.array([self._pad_id], dtype=np.uint32)
        chosen = [nothing if i == PADDING else self._encoded[i] for i in indices]
        tokens, lengths = padded(chosen, pad_id=self._pad_id, to_length=self.padded_to)
        labels = [IGNORED if i == PADDING else int(self.labels[i]) for i in indices]
        return LabelledBatch(tokens, lengths, torch.tensor(labels))


def class_numbers(examples: Sequence[Example], classes: Sequence[str]) -> list[int]:
    """The number of each example's class. Every label must be one of the classes."""
    numbers = {label: number for number, label in enumerate(classes)}
    return [numbers[example.label] for example in examples]
