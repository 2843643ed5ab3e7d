"""Batches of a text for Lightning: training in shuffled order, evaluation always on the same windows."""

# B windows in a rank's batch, T tokens in a window, R ranks

from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from gptpl.data.corpora import Corpus
from gptpl.data.encoded_corpus import EncodedCorpus
from gptpl.data.encoding import encode_corpus
from gptpl.data.report import data_report
from gptpl.data.scored_windows import PADDING, Indices, ScoredWindows
from gptpl.data.split import check_train_ratio
from gptpl.data.token_file import Tokens
from gptpl.data.tokenizers import Tokenizer
from gptpl.data.training_data import BatchedExamples, Batches, Split, TrainingData
from gptpl.data.windows import TokenWindows, check_window_sizes
from gptpl.errors import InputError
from gptpl.resuming import FREE


class TextDataModule(TrainingData):
    """One corpus as batches of (inputs, targets), two int64 tensors (B, T), targets one token later.

    `load()` gives the tokenizer and the counts before there is a model.

    Args:
        corpus: the text.
        tokenizer: what turns it into tokens; one without a vocabulary takes it from the text.
        max_length: T, tokens in a window.
        stride: tokens from the start of a training or validation window to the start of the next; None: T.
        batch_size: B, windows in a batch of one rank.
        train_ratio: share of the characters to train on, between 0 and 1.
        seed: decides, with the epoch, the order of the training windows.
        num_workers: as in `TrainingData`, like the four below.
        pin_memory: page-locked memory.
        persistent_workers: workers that stay.
        eval_train_batches: training batches of an evaluation.
        eval_val_batches: validation batches of an evaluation.
        cache_dir: where encoded corpora are kept; None: the project's cache folder.

    Raises InputError for a number out of range, when made, and for a text too short for it, when loaded.
    """

    def __init__(
        self,
        *,
        corpus: Corpus,
        tokenizer: Tokenizer,
        max_length: int,
        stride: int | None = None,
        batch_size: int = 2,
        train_ratio: float = 0.9,
        seed: int = 123,
        num_workers: Annotated[int, FREE] = 0,
        pin_memory: Annotated[bool | None, FREE] = None,
        persistent_workers: Annotated[bool, FREE] = True,
        eval_train_batches: int | None = 5,
        eval_val_batches: int | None = 5,
        cache_dir: Annotated[Path | str | None, FREE] = None,
    ) -> None:
        stride = max_length if stride is None else stride
        check_train_ratio(train_ratio)
        check_window_sizes(max_length=max_length, stride=stride)
        super().__init__(
            batch_size=batch_size,
            seed=seed,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=persistent_workers,
            eval_train_batches=eval_train_batches,
            eval_val_batches=eval_val_batches,
        )
        self.corpus = corpus
        self.max_length = max_length
        self.stride = stride
        self.train_ratio = train_ratio
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self._given_tokenizer = tokenizer

    # --- the text -------------------------------------------------------------------------------------

    @cached_property
    def encoded(self) -> EncodedCorpus:
        """Both splits as token arrays; encoded, or opened from the cache, when first asked for."""
        return encode_corpus(
            self.corpus, self._given_tokenizer, train_ratio=self.train_ratio, cache_dir=self.cache_dir
        )

    def load(self) -> EncodedCorpus:
        """Encode the corpus or open it from the cache; later calls return the same."""
        return self.encoded

    @property
    def name(self) -> str:  # type: ignore[override]
        """The corpus's."""
        return self.corpus.name

    @property
    def train_tokens(self) -> int:
        """Of the training part of the text."""
        return self.encoded.stats.train_tokens

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the tokens, with its vocabulary."""
        return self.encoded.tokenizer

    def content_sha256(self) -> str:
        """The corpus's; once it is encoded, as it was then."""
        encoded = self.__dict__.get("encoded")
        return self.corpus.content_sha256() if encoded is None else encoded.stats.content_sha256

    def report(self, *, parameters: int, world_size: int) -> list[str]:
        """See `data_report`."""
        return data_report(
            self.encoded,
            name=self.name,
            max_length=self.max_length,
            stride=self.stride,
            batch_size=self.batch_size * world_size,
            parameters=parameters,
        )

    @property
    def units(self) -> str:
        """How messages call several examples."""
        return "windows"

    @property
    def too_few_remedy(self) -> str:
        """What helps where the training windows do not fill a batch."""
        return "lower data.batch_size, data.stride or data.max_length, or give more text"

    # --- windows --------------------------------------------------------------------------------------

    @cached_property
    def train_windows(self) -> TokenWindows:
        """The windows to train on."""
        return self._windows(self.encoded.train, "training")

    @cached_property
    def val_windows(self) -> TokenWindows:
        """The windows to validate on."""
        return self._windows(self.encoded.val, "validation")

    def _windows(self, tokens: Tokens, split: str) -> TokenWindows:
        return TokenWindows(tokens, max_length=self.max_length, stride=self.stride, split=split)

    def examples(self, split: Split) -> TokenWindows:
        """The windows of a split; a text has no part to test on."""
        if split == "test":
            raise InputError("a text is split in two, training and validation: give split=train or split=val")
        return self.train_windows if split == "train" else self.val_windows

    def scored(self, split: Split, numbers: Indices) -> BatchedExamples:
        """Windows by their numbers; a row of PADDING has no target."""
        windows = self.examples(split)
        starts = np.where(numbers == PADDING, PADDING, numbers * windows.stride)
        return ScoredWindows(windows.tokens, starts, max_length=self.max_length)

    def evaluation_dataloader(self, split: Literal["train", "val", "all"]) -> Batches:
        """Batches in which every token but the first of the split is the target of exactly one position.

        The windows lie end to end, whatever the stride; the last one is filled up with targets -100. "all" is
        the training tokens followed by the validation tokens, each encoded by itself, in one copy in memory.
        Raises InputError when there is no token to score.
        """
        encoded = self.encoded
        parts = {"train": [encoded.train], "val": [encoded.val], "all": [encoded.train, encoded.val]}[split]
        tokens = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if len(tokens) < 2:
            raise InputError(f"the {split} split has {len(tokens)} tokens, none to score: give more text")
        starts = self._share(np.arange(0, len(tokens) - 1, self.max_length, dtype=np.int64))
        return self._in_order(ScoredWindows(tokens, starts, max_length=self.max_length))
