"""Labelled texts as tokens, and as padded batches for a classifier."""

# B texts in a batch, T tokens in the longest of them

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, Unpack

import numpy as np
import torch
from torch import Tensor

from gptpl.data.classification.splits import (
    Balance,
    Preparation,
    Prepared,
    inverse_frequency_weights,
    label_counts,
    prepare,
    write_splits,
)
from gptpl.data.sampler import PADDING
from gptpl.data.sources import LabelledCorpus
from gptpl.data.splits import SPLITS, Duplicates, Split, batch_count, check_choice, split_table
from gptpl.data.training_data import IGNORED, Loading, TrainingData, check_at_least
from gptpl.errors import InputError
from gptpl.text import count_text, shortened
from gptpl.tokenizers import TokenIds, Tokenizer

log = logging.getLogger(__name__)

Padding = Literal["batch", "longest"]
TooLong = Literal["truncate", "refuse"]
MOST_CLASSES = 12
"""Classes with a line of their own in the report."""


class LabelledBatch(NamedTuple):
    """`tokens` (B, T), `lengths` (B,) without the padding, and `labels` (B,), -100 for none; all int64."""

    tokens: Tensor
    lengths: Tensor
    labels: Tensor


def encode_texts(texts: Sequence[str], tokenizer: Tokenizer) -> list[TokenIds]:
    """The tokens of each text. Raises InputError for a text without any."""
    encoded = tokenizer.encode_many(texts)
    for text, tokens in zip(texts, encoded, strict=True):
        if not len(tokens):
            raise InputError(f"{shortened(text, 40)!r} has no tokens: remove it, or use another tokenizer")
    return encoded


def truncated(encoded: Sequence[TokenIds], max_length: int) -> tuple[list[TokenIds], list[int]]:
    """The first `max_length` tokens of each text; and of each longer one, how many it lost."""
    lost = [len(tokens) - max_length for tokens in encoded if len(tokens) > max_length]
    return [tokens[:max_length] for tokens in encoded], lost


def padded(
    encoded: Sequence[TokenIds], *, pad_id: int, to_length: int | None = None
) -> tuple[Tensor, Tensor]:
    """Tokens (B, T), the shorter texts filled up with `pad_id`, and lengths (B,).

    T is `to_length`, or that of the longest text. No text may be empty or longer than `to_length`.
    """
    lengths = np.array([len(tokens) for tokens in encoded], dtype=np.int64)
    tokens = np.full((len(encoded), to_length or int(lengths.max())), pad_id, dtype=np.int64)
    for row, one in zip(tokens, encoded, strict=True):
        row[: len(one)] = one
    return torch.from_numpy(tokens), torch.from_numpy(lengths)


@dataclass(frozen=True)
class LabelledTexts:
    """The examples of a split, as batches.

    `encoded` are the tokens of each text, one or more, `labels` the numbers of their classes. A text is
    filled up with `pad_id` to `padded_to` tokens; None: to the longest of its batch.
    """

    encoded: Sequence[TokenIds]
    labels: Sequence[int]
    pad_id: int
    padded_to: int | None = None

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text."""
        return [len(tokens) for tokens in self.encoded]

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitems__(self, indices: Sequence[int]) -> LabelledBatch:
        """The examples of these indices; PADDING is a text of one padding token without label."""
        nothing = np.array([self.pad_id], dtype=np.uint32)
        chosen = [nothing if i == PADDING else self.encoded[i] for i in indices]
        tokens, lengths = padded(chosen, pad_id=self.pad_id, to_length=self.padded_to)
        labels = [IGNORED if i == PADDING else self.labels[i] for i in indices]
        return LabelledBatch(tokens, lengths, torch.tensor(labels))


class LabelledDataModule(TrainingData):
    """Labelled texts as batches of `LabelledBatch`; the labels are numbers of `prepared.classes`.

    Texts are padded at their end, with the end-of-text token.

    Args:
        corpus: the texts and their labels.
        tokenizer: what turns texts into tokens; one without a vocabulary takes it from the training texts.
        max_length: the most tokens of a text.
        train_ratio, val_ratio, stratified, balance, duplicates: see `Preparation`; "class_weights" leaves the
            examples and weights the loss.
        too_long: whether a longer text loses its end, or is refused.
        padding: "batch" pads to the longest text of the batch; "longest", as the book, to the longest of the
            training split, to which the texts of other splits are cut.
        split_seed: decides which examples are drawn, and the splits: not `seed`, so that runs with several
            seeds have the same test.
        batch_size: B, texts in a batch of one rank.
        loading: as in `TrainingData`.

    Raises InputError for an invalid setting, when made, and for unusable texts, when loaded.
    """

    units = "texts"

    def __init__(
        self,
        *,
        corpus: LabelledCorpus,
        tokenizer: Tokenizer,
        max_length: int,
        train_ratio: float = 0.7,
        val_ratio: float = 0.1,
        stratified: bool = False,
        balance: Balance = "none",
        duplicates: Duplicates = "group",
        too_long: TooLong = "truncate",
        padding: Padding = "batch",
        split_seed: int = 123,
        batch_size: int = 8,
        **loading: Unpack[Loading],
    ) -> None:
        super().__init__(batch_size=batch_size, **loading)
        check_choice("data.padding", padding, Padding)
        check_choice("data.too_long", too_long, TooLong)
        check_at_least(0, "data.split_seed", split_seed)
        check_at_least(1, "data.max_length", max_length)
        self.corpus = corpus
        self.name = corpus.name
        self.max_length = max_length
        self.too_long = too_long
        self.padding = padding
        self._how = Preparation(
            train_ratio=train_ratio,
            val_ratio=val_ratio,
            stratified=stratified,
            balance=balance,
            duplicates=duplicates,
            seed=split_seed,
        )
        self._given_tokenizer = tokenizer
        self._lost: list[int] = []

    @cached_property
    def prepared(self) -> Prepared:
        """The splits; read and divided when first asked for."""
        return prepare(self.corpus.examples(), self._how)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the tokens, with its vocabulary."""
        return self._given_tokenizer.fitted_to(example.text for example in self.prepared.splits["train"])

    def content_sha256(self) -> str:
        """Hash of the texts and labels of all splits."""
        return self.prepared.sha256

    @property
    def row_count(self) -> int:
        """Rows of all files."""
        return self.prepared.read

    def load(self) -> Mapping[Split, LabelledTexts]:
        """Read, divide and encode the texts; later calls return the same."""
        return self._texts

    @cached_property
    def _texts(self) -> dict[Split, LabelledTexts]:
        splits, limit = self.prepared.splits, self.max_length
        encoded = {
            name: encode_texts([each.text for each in splits[name]], self.tokenizer) for name in splits
        }
        for warning in self.prepared.warnings:
            log.warning("%s", warning)
        if self.padding == "longest":
            limit = min(limit, max(map(len, encoded["train"])))
        pairs = {name: truncated(texts, limit) for name, texts in encoded.items()}
        self._lost = [lost for _, losses in pairs.values() for lost in losses]
        if self._lost and self.too_long == "refuse":
            raise InputError(
                f"{len(self._lost):,} texts are longer than {limit:,} tokens, the longest has"
                f" {limit + max(self._lost):,}: raise data.max_length and model.context_length, or set"
                " data.too_long=truncate to cut their ends off"
            )
        return {
            name: LabelledTexts(
                kept,
                [self.prepared.classes.index(example.label) for example in splits[name]],
                pad_id=self.tokenizer.eot_id,
                padded_to=limit if self.padding == "longest" else None,
            )
            for name, (kept, _) in pairs.items()
        }

    @property
    def train_tokens(self) -> int:
        """Tokens of the training texts, without padding."""
        return sum(self.load()["train"].lengths)

    def examples(self, split: Split) -> LabelledTexts:
        """The texts of a split. Raises InputError where the corpus has none for it."""
        if split not in self.load():
            raise InputError(f"there are no {SPLITS[split]} examples: give data.{split}_path=FILE")
        return self._texts[split]

    def module_settings(self) -> dict[str, Any]:
        """The classes, their weights in the loss, and how texts are cut and padded."""
        weights = None
        if self._how.balance == "class_weights":
            weights = inverse_frequency_weights(list(label_counts(self.prepared.splits["train"]).values()))
        padded_to = self.load()["train"].padded_to
        return {
            "labels": self.prepared.classes,
            "class_weights": weights,
            "max_length": padded_to or self.max_length,
            "padded_to": padded_to,
        }

    def report(self, *, parameters: int | None, world_size: int) -> list[str]:
        """A table of the splits, by class, then what was done to the texts."""
        lengths = {split: texts.lengths for split, texts in self.load().items()}
        counts = {split: label_counts(examples) for split, examples in self.prepared.splits.items()}
        classes, size = self.prepared.classes, self.batch_size * world_size
        shown, more = classes[:MOST_CLASSES], classes[MOST_CLASSES:]
        rows = [(label, [found.get(label, 0) for found in counts.values()]) for label in shown]
        if more:
            left = [sum(found.get(label, 0) for label in more) for found in counts.values()]
            rows.append((f"{len(more)} more classes", left))
        rows.append(("tokens of the longest text", [max(found) for found in lengths.values()]))
        batches = [batch_count(split, len(found), size) for split, found in lengths.items()]
        rows.append((f"batches of {size:,} texts", batches))
        lines = split_table(counts, rows)
        if self._lost:
            texts = count_text(len(self._lost), "text")
            lines.append(f"{texts} too long and cut: {sum(self._lost):,} tokens at the end are not read")
        title = (
            f"data: {self.name}, {self.row_count:,} rows, {len(classes)} classes,"
            f" {self.tokenizer.name} tokenizer ({self.tokenizer.vocab_size:,} tokens)"
        )
        return [title, *(f"  {line}" for line in (*lines, *self.prepared.remarks))]

    def write_record(self, run_dir: Path) -> None:
        """Keep the splits, as CSV files, in the run's folder."""
        write_splits(run_dir, self.prepared.splits)
