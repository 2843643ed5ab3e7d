"""A text as windows of tokens: batches for training and evaluation, and a report before it is trained on."""

# B windows in a rank's batch, T tokens in a window

import mmap
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Unpack

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gptpl.data.pretraining.encoding import check_train_ratio, encode_corpus
from gptpl.data.pretraining.token_cache import PARTS, CorpusStats, EncodedCorpus, Tokens
from gptpl.data.sampler import PADDING
from gptpl.data.sources import Corpus
from gptpl.data.splits import SPLITS, Split, split_table
from gptpl.data.training_data import IGNORED, Batches, Loading, TrainingData, check_at_least
from gptpl.errors import InputError
from gptpl.resuming import FREE
from gptpl.text import count_text
from gptpl.tokenizers import Tokenizer

# Hoffmann et al. 2022 (Chinchilla): at a given compute, loss is lowest near 20 tokens a parameter.
TOKENS_PER_PARAMETER = 20
MANY_DUPLICATES = 0.01


class TokenWindows(Dataset[tuple[Tensor, Tensor]]):
    """The windows of T = `max_length` tokens that begin every `stride` tokens; the tokens are not copied.

    A batch is (inputs, targets), two int64 tensors (B, T), targets one token later. Past the end of the
    tokens, and in the whole row of the number PADDING, inputs are 0 and targets IGNORED.

    With `to_the_end` the last windows may be shorter than T, as long as they have a target. Raises InputError
    for lengths below 1, and, without `to_the_end`, when not even one window fits; it calls the tokens those
    of `split`.
    """

    def __init__(
        self, tokens: Tokens, *, max_length: int, stride: int, split: str = "text", to_the_end: bool = False
    ) -> None:
        check_at_least(1, "data.max_length", max_length)
        check_at_least(1, "data.stride", stride)
        if len(tokens) <= max_length and not to_the_end:
            raise InputError(
                f"the {split} split has {len(tokens):,} tokens, too short for one window of "
                f"data.max_length={max_length} ({max_length + 1:,} tokens are needed): "
                "lower data.max_length, give more text, or change data.train_ratio"
            )
        self.max_length = max_length
        self.tokens = tokens
        self._starts = range(0, len(tokens) - (1 if to_the_end else max_length), stride)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each (T,)."""
        inputs, targets = self.__getitems__([index])
        return inputs[0], targets[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a batch, each (B, T); torch's DataLoader finds this by its name."""
        starts = np.array([PADDING if index == PADDING else self._starts[index] for index in indices])[
            :, None
        ]
        places = starts + np.arange(self.max_length + 1)  # (B, T+1)
        windows = np.asarray(self.tokens)[np.minimum(places, len(self.tokens) - 1)]
        inputs, targets = windows[:, :-1].astype(np.int64), windows[:, 1:].astype(np.int64)
        unknown = (starts == PADDING) | (places >= len(self.tokens))
        if unknown.any():
            inputs[unknown[:, :-1]], targets[unknown[:, 1:]] = 0, IGNORED
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def __getstate__(self) -> dict[str, Any]:
        """Sends a worker the place of a memory-mapped token file, not its hundreds of megabytes."""
        tokens, state = self.tokens, dict(self.__dict__)
        # Of a slice the base is no mmap, and the offset that of the whole.
        base: object = tokens.base
        if isinstance(tokens, np.memmap) and isinstance(base, mmap.mmap):
            state["tokens"] = None
            state["mapped"] = (str(tokens.filename), tokens.dtype.str, "r", tokens.offset, tokens.shape)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Opens the token file again, in the worker."""
        self.__dict__.update(state)
        if (mapped := self.__dict__.pop("mapped", None)) is not None:
            self.tokens = np.memmap(*mapped)


class TextDataModule(TrainingData):
    """One corpus as batches of `TokenWindows`; `load()` gives tokenizer and counts before there is a model.

    Args:
        corpus: the text.
        tokenizer: what turns it into tokens; one without a vocabulary takes it from the text.
        max_length, stride, batch_size: T, tokens from one window's start to the next one's (None: T), and B.
        train_ratio: share of the characters to train on, between 0 and 1.
        cache_dir: where encoded corpora are kept; None: the project's cache folder.
        loading: as in `TrainingData`.

    Raises InputError for a number out of range, when made, and for a text too short for it, when loaded.
    """

    units = "windows"
    too_few_remedy = "lower data.batch_size, data.stride or data.max_length, or give more text"

    def __init__(
        self,
        *,
        corpus: Corpus,
        tokenizer: Tokenizer,
        max_length: int,
        stride: int | None = None,
        batch_size: int = 2,
        train_ratio: float = 0.9,
        cache_dir: Annotated[Path | str | None, FREE] = None,
        **loading: Unpack[Loading],
    ) -> None:
        super().__init__(batch_size=batch_size, **loading)
        check_train_ratio(train_ratio)
        check_at_least(1, "data.max_length", max_length)
        check_at_least(1, "data.stride", stride)
        self.corpus = corpus
        self.max_length = max_length
        self.stride = max_length if stride is None else stride
        self.train_ratio = train_ratio
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self._given_tokenizer = tokenizer
        self._windows: dict[Split, TokenWindows] = {}

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

    def examples(self, split: Split) -> TokenWindows:
        """The windows of a split; a text has no part to test on."""
        if split == "test":
            raise InputError("a text is split in two, training and validation: give split=train or split=val")
        if split not in self._windows:
            tokens = self.encoded.train if split == "train" else self.encoded.val
            self._windows[split] = TokenWindows(
                tokens, max_length=self.max_length, stride=self.stride, split=SPLITS[split]
            )
        return self._windows[split]

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
        windows = TokenWindows(tokens, max_length=self.max_length, stride=self.max_length, to_the_end=True)
        return self._in_order(windows, np.arange(len(windows)))

    def report(self, *, parameters: int, world_size: int) -> list[str]:
        """Counts of both splits, and what they mean. Raises InputError where a split has no window."""
        stats, batch_size = self.encoded.stats, self.batch_size * world_size
        train, val = len(self.examples("train")), len(self.examples("val"))
        rows = [
            ("documents", (stats.train_documents, stats.val_documents)),
            ("characters", (stats.train_characters, stats.val_characters)),
            ("tokens", (stats.train_tokens, stats.val_tokens)),
            (f"windows of {self.max_length:,} tokens, one every {self.stride:,}", (train, val)),
            # training drops the last short batch
            (f"batches of {batch_size:,} windows", (train // batch_size, -(-val // batch_size))),
        ]
        lines = [*split_table(PARTS, rows), _size(stats.train_tokens, parameters), _duplicates(stats)]
        title = (
            f"data: {self.name}, {count_text(stats.documents, 'document')}, "
            f"{self.tokenizer.name} tokenizer ({self.tokenizer.vocab_size:,} tokens)"
        )
        return [title, *(f"  {line}" for line in lines)]


def _size(train_tokens: int, parameters: int) -> str:
    """The tokens per parameter, turned round where a newcomer would have to count zeros."""
    ratio = train_tokens / parameters
    if ratio < 1:
        every = f"{parameters / max(1, train_tokens):,.0f}"
        return (
            f"1 training token for every {every} parameters: "
            "the model can learn the text by heart, so watch the validation loss"
        )
    if ratio < TOKENS_PER_PARAMETER:
        meaning = f"about {TOKENS_PER_PARAMETER} use the model's size well"
    else:
        meaning = "enough for this size of model"
    return f"{ratio:,.1f} training tokens for every parameter: {meaning}"


def _duplicates(stats: CorpusStats) -> str:
    """How much of the validation text training has seen, and whether that matters."""
    if not stats.compared_blocks:
        return "the validation text is too short to look for duplicates of the training text"
    share = stats.duplicate_blocks / stats.compared_blocks
    if share > MANY_DUPLICATES:
        meaning = "the validation loss is too good by what the model remembers of them"
    else:
        meaning = "the validation loss is a fair test"
    return (
        f"{stats.duplicate_blocks:,} of {stats.compared_blocks:,} blocks of 32 validation tokens "
        f"also stand word for word in the training text ({share:.1%}): {meaning}"
    )
