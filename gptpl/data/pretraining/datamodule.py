"""A text as sequences of tokens: batches for training and evaluation, and a report before training."""

# B sequences in a rank's batch, T tokens in a sequence

import hashlib
import json
import logging
import mmap
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, Literal, Required, Unpack

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gptpl.data.packing import PackedBatch, Packing
from gptpl.data.pretraining.encoding import alone, encode_corpus
from gptpl.data.pretraining.shards import encode_documents
from gptpl.data.pretraining.token_cache import PARTS, AnyCorpus, CorpusStats, ShardedTokens, Tokens
from gptpl.data.sampler import PADDING
from gptpl.data.sources import Corpus
from gptpl.data.splits import SPLITS, Split, batch_count, check_choice, check_ratios, split_table
from gptpl.data.training_data import IGNORED, Batches, Loading, TrainingData, check_at_least
from gptpl.errors import InputError
from gptpl.files.download import cache_dir as default_cache_dir
from gptpl.settings import FREE, SIZE
from gptpl.text import count_text
from gptpl.tokenizers import Tokenizer

log = logging.getLogger(__name__)

Packings = Literal["concat", "best_fit"]
PACKING_VERSION = 1
"""Raise it when the same tokens would be packed in another way."""
# Hoffmann et al. 2022 (Chinchilla): at a given compute, loss is lowest near 20 tokens a parameter.
TOKENS_PER_PARAMETER = 20
MANY_DUPLICATES = 0.01


class TokenSequences(Dataset[tuple[Tensor, Tensor]]):
    """The sequences of T = `max_length` tokens that begin every `stride` tokens; tokens are not copied.

    A batch is (inputs, targets), two int64 tensors (B, T), targets one token later. Where there is no token
    later, and in the whole row of the index PADDING, inputs are 0 and targets IGNORED.

    With `to_the_end` the last sequences may be shorter than T, as long as they have a target. Raises
    InputError without `to_the_end`, naming the `split`, where not even one sequence fits.
    """

    def __init__(
        self,
        tokens: Tokens | ShardedTokens,
        *,
        max_length: int,
        stride: int,
        split: str = "text",
        to_the_end: bool = False,
    ) -> None:
        if len(tokens) <= max_length and not to_the_end:
            raise InputError(
                f"the {split} split has {len(tokens):,} tokens, too short for one sequence of "
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
        """Inputs and targets of a batch, each (B, T)."""
        shape = len(indices), self.max_length
        inputs, targets = np.zeros(shape, dtype=np.int64), np.full(shape, IGNORED, dtype=np.int64)
        for row, index in enumerate(indices):
            if index != PADDING:
                found = self.tokens[self._starts[index] : self._starts[index] + self.max_length + 1]
                inputs[row, : len(found) - 1], targets[row, : len(found) - 1] = found[:-1], found[1:]
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def __getstate__(self) -> dict[str, Any]:
        """Send a worker the location of a memory-mapped token file, not its hundreds of megabytes."""
        tokens, state = self.tokens, dict(self.__dict__)
        # The base of a slice is not an mmap, and its offset that of the whole.
        base: object = getattr(tokens, "base", None)
        if isinstance(tokens, np.memmap) and isinstance(base, mmap.mmap):
            state["tokens"] = None
            state["mapped"] = (str(tokens.filename), tokens.dtype.str, "r", tokens.offset, tokens.shape)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the token file again, in the worker."""
        self.__dict__.update(state)
        if (mapped := self.__dict__.pop("mapped", None)) is not None:
            self.tokens = np.memmap(*mapped)


class PackedSequences(Dataset[PackedBatch]):
    """Rows of whole documents, see `pack_documents`.

    The end of a row may be empty, and all of the one of the index PADDING is.
    """

    def __init__(self, tokens: Tokens | ShardedTokens, packing: Packing, *, max_length: int) -> None:
        self.max_length = max_length
        self.tokens = tokens
        self.packing = packing

    def __len__(self) -> int:
        return len(self.packing)

    def __getitems__(self, indices: Sequence[int]) -> PackedBatch:
        """A batch."""
        shape, packing = (len(indices), self.max_length), self.packing
        inputs, segments = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        targets = np.full(shape, IGNORED, dtype=np.int64)
        for row, index in enumerate(indices):
            place = 0
            pieces = range(0) if index == PADDING else range(*packing.rows[index : index + 2].tolist())
            for number, piece in enumerate(pieces, start=1):
                start, length = int(packing.starts[piece]), int(packing.lengths[piece])
                found, end = self.tokens[start : start + length + 1], place + length
                inputs[row, place:end], targets[row, place:end] = found[:-1], found[1:]
                segments[row, place:end] = number
                place = end
        return PackedBatch(
            torch.from_numpy(inputs),
            torch.from_numpy(targets),
            torch.from_numpy(segments),
            int((segments > 0).sum()),
        )

    __getstate__ = TokenSequences.__getstate__
    __setstate__ = TokenSequences.__setstate__


Sequences = TokenSequences | PackedSequences


class SequenceSettings(Loading, total=False):
    """The settings that datamodules of text pass on to `SequenceData`."""

    tokenizer: Required[Tokenizer]
    max_length: Required[int]
    stride: int | None
    batch_size: int
    packing: Packings
    train_ratio: float
    val_tokens: int
    encode_workers: int | None
    check_text: bool
    cache_dir: Path | str | None


class SequenceData(TrainingData):
    """Text as batches of `TokenSequences` or `PackedSequences`; a subclass says of which corpora.

    `load()` gives tokenizer and counts before there is a model.

    Args:
        tokenizer: what turns the text into tokens; one without a vocabulary takes it from the text.
        max_length, stride, batch_size: T, tokens from the start of a sequence to that of the next (None: T),
            and B.
        packing: "concat" cuts sequences of T tokens from all documents in a row, as in the book; "best_fit"
            puts whole documents into sequences, each read by itself, see `pack_documents`.
        train_ratio: fraction of the characters to train on; where documents are drawn, at least that.
        val_tokens: tokens of validation documents, at most, if a token has 4 characters.
        encode_workers: processes that encode documents; None: one for each core.
        check_text: read documents again at each start, not only files that have another time than before.
        cache_dir: where encoded corpora are kept; None: the project's cache folder.
        loading: as in `TrainingData`.

    Raises InputError for a number out of range, when made, and for a text too short for it, when loaded.
    """

    units = "sequences"
    too_few_remedy = "lower data.batch_size, data.stride or data.max_length, or give more text"
    split: Literal["characters", "documents"]
    corpora: list[Corpus]
    """The text."""

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        max_length: int,
        stride: int | None = None,
        batch_size: int = 2,
        packing: Packings = "concat",
        train_ratio: float = 0.9,
        val_tokens: Annotated[int, SIZE] = 2_000_000,
        encode_workers: Annotated[int | None, FREE, SIZE] = None,
        check_text: Annotated[bool, FREE] = False,
        cache_dir: Annotated[Path | str | None, FREE] = None,
        **loading: Unpack[Loading],
    ) -> None:
        super().__init__(batch_size=batch_size, **loading)
        check_ratios(train_ratio=train_ratio)
        check_at_least(1, "data.max_length", max_length)
        check_at_least(1, "data.stride", stride)
        check_choice("data.packing", packing, Packings)
        if packing == "best_fit" and stride not in (None, max_length):
            raise InputError(
                f"data.stride={stride} has no meaning with data.packing=best_fit: leave it out, or use concat"
            )
        self.max_length = max_length
        self.stride = max_length if stride is None else stride
        self.packing = packing
        self.train_ratio = train_ratio
        self.val_tokens = val_tokens
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.encode_documents = partial(
            encode_documents,
            val_tokens=val_tokens,
            train_ratio=train_ratio,
            workers=encode_workers,
            check=check_text,
            cache_dir=self.cache_dir,
        )
        self._given_tokenizer = tokenizer
        self._sequences: dict[Split, Sequences] = {}

    @property
    @abstractmethod
    def encoded(self) -> AnyCorpus:
        """Both splits as token arrays; encoded, or opened from the cache, when first asked for."""

    def load(self) -> AnyCorpus:
        """Encode the corpus or open it from the cache; later calls return the same."""
        return self.encoded

    @property
    def train_tokens(self) -> int:
        """Tokens of the training part of the text."""
        return self.encoded.stats.train_tokens

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the tokens, with its vocabulary."""
        return self.encoded.tokenizer

    def content_sha256(self) -> str:
        """Hash of the text at the time of encoding."""
        return self.encoded.stats.content_sha256

    @property
    def row_count(self) -> int | None:
        """Documents, once they are encoded."""
        encoded = self.__dict__.get("encoded")
        return None if encoded is None else encoded.stats.documents

    def examples(self, split: Split) -> Sequences:
        """The sequences of a split; a text has no part to test on."""
        if split == "test":
            raise InputError("a text is split in two, training and validation: give split=train or split=val")
        if split not in self._sequences:
            self._sequences[split] = self.sequences(self.encoded, split)
        return self._sequences[split]

    def sequences(self, encoded: AnyCorpus, split: Split) -> Sequences:
        """The sequences of one split of a corpus. Raises InputError where there is none."""
        tokens = encoded.train if split == "train" else encoded.val
        if self.packing == "concat":
            T, stride = self.max_length, self.stride
            return TokenSequences(tokens, max_length=T, stride=stride, split=SPLITS[split])
        if len(tokens) < 2:
            raise InputError(
                f"the {SPLITS[split]} split has {len(tokens)} tokens, none to learn: give more text"
            )
        packing = self._packing(encoded, tokens, split)
        return PackedSequences(tokens, packing, max_length=self.max_length)

    def _packing(self, encoded: AnyCorpus, tokens: Tokens | ShardedTokens, split: Split) -> Packing:
        """The packing of a split, made once and kept in the cache, as the tokens are."""
        eot_id, T = encoded.tokenizer.eot_id, self.max_length
        if isinstance(tokens, ShardedTokens):
            files = tokens.identity
        elif isinstance(tokens, np.memmap) and tokens.filename is not None:
            files = ["/".join(Path(tokens.filename).parts[-3:]), len(tokens)]
        else:  # the cache cannot be written
            return Packing.of(tokens, eot_id=eot_id, T=T)
        identity = [PACKING_VERSION, files, eot_id, T]
        name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        folder = (self.cache_dir or default_cache_dir()) / "packed" / name
        with suppress(OSError, ValueError, KeyError):
            return Packing.read(folder)
        with alone(folder):
            with suppress(OSError, ValueError, KeyError):
                return Packing.read(folder)
            log.info("packing the %s documents of %s", SPLITS[split], self.name)
            try:
                Packing.write(folder, tokens, eot_id=eot_id, T=T)
                return Packing.read(folder)
            except OSError as error:
                log.warning("cannot keep the packing in %s (%s): it stays in memory", folder, error)
                return Packing.of(tokens, eot_id=eot_id, T=T)

    def steps_per_epoch(self, *, world_size: int = 1, accumulate: int = 1) -> int:
        """As the base class; also raises InputError where other processes cannot read the cached tokens."""
        if world_size > 1 and not isinstance(self.encoded.train, np.memmap | ShardedTokens):
            raise InputError(
                f"the cache of encoded texts cannot be written, and each of {world_size} processes would"
                " encode the text for itself: make room there, or set GPTPL_CACHE to a folder that can be"
                " written"
            )
        return super().steps_per_epoch(world_size=world_size, accumulate=accumulate)

    def evaluation_dataloader(self, split: Literal["train", "val", "all"]) -> Batches:
        """Batches in which every token but the first of the split is the target of exactly one position.

        The sequences lie end to end, whatever the stride; the last one is filled up with targets -100. "all"
        is the training tokens followed by the validation tokens, each encoded by itself, in one copy in
        memory. Raises InputError where there is no token to score.
        """
        encoded = self.encoded
        tokens: Tokens | ShardedTokens = encoded.val if split == "val" else encoded.train
        if split == "all":
            tokens = np.concatenate([encoded.train, encoded.val])
        if len(tokens) < 2:
            raise InputError(f"the {split} split has {len(tokens)} tokens, none to score: give more text")
        sequences = TokenSequences(
            tokens, max_length=self.max_length, stride=self.max_length, to_the_end=True
        )
        return self._in_order(sequences, np.arange(len(sequences)))

    def report(self, *, parameters: int | None, world_size: int) -> list[str]:
        """Counts of both splits, and what they mean. Raises InputError where a split has no sequence."""
        stats, batch_size = self.encoded.stats, self.batch_size * world_size
        train, val = self.train_examples, len(self.examples("val"))
        every = f", one every {self.stride:,}" if self.packing == "concat" else ", of whole documents"
        rows = [
            ("documents", (stats.train_documents, stats.val_documents)),
            ("characters", (stats.train_characters, stats.val_characters)),
            ("tokens", (stats.train_tokens, stats.val_tokens)),
            (f"sequences of {self.max_length:,} tokens{every}", (train, val)),
            (
                f"batches of {batch_size:,} sequences",
                (batch_count("train", train, batch_size), batch_count("val", val, batch_size)),
            ),
        ]
        lines = [
            *split_table(PARTS, rows),
            *self._packing_lines(),
            _bytes_a_token(self.tokenizer, np.asarray(self.encoded.val)),
            _duplicates(stats),
        ]
        if parameters is not None:
            lines.insert(-1, _size(stats.train_tokens, parameters))
        title = (
            f"data: {self.name}, {count_text(stats.documents, 'document')}, "
            f"{self.tokenizer.name} tokenizer ({self.tokenizer.vocab_size:,} tokens)"
        )
        return [title, *(f"  {line}" for line in lines)]

    def _packing_lines(self) -> list[str]:
        """How full packed sequences are, and how many documents they cut."""
        lines = []
        for split in PARTS if self.packing == "best_fit" else ():
            found: Any = self.examples(split)
            packings = [each.packing for each in getattr(found, "datasets", [found])]
            used = sum(packing.tokens for packing in packings) / (len(found) * self.max_length)
            documents = count_text(sum(packing.documents for packing in packings), "document")
            cut = sum(packing.cut for packing in packings)
            lines.append(
                f"{SPLITS[split]} sequences are {used:.1%} full; {cut:,} of {documents} are longer than one:"
                " the rest of them is in others, without the context before it"
            )
        return lines

    def module_settings(self) -> dict[str, Any]:
        """Of packed documents, that they are."""
        return {"packed": True} if self.packing == "best_fit" else {}


class TextDataModule(SequenceData):
    """The sequences of one corpus.

    Args:
        corpus: the text.
        split: "characters" trains on the first `train_ratio` of the characters and validates on the rest, as
            in the book; "documents" draws documents for validation, for corpora of any size: see
            `encode_documents`.
        settings: as in `SequenceData`, `tokenizer` and `max_length` among them.
    """

    def __init__(
        self,
        *,
        corpus: Corpus,
        split: Literal["characters", "documents"] = "characters",
        **settings: Unpack[SequenceSettings],
    ) -> None:
        super().__init__(**settings)
        self.corpus = corpus
        self.corpora = [corpus]
        self.name = corpus.name
        self.split = split
        self.computed_order = split == "documents"

    @cached_property
    def encoded(self) -> AnyCorpus:
        """See `SequenceData`."""
        corpus, tokenizer = self.corpus, self._given_tokenizer
        if self.split == "documents":
            return self.encode_documents(corpus, tokenizer)
        return encode_corpus(corpus, tokenizer, train_ratio=self.train_ratio, cache_dir=self.cache_dir)

    def content_sha256(self) -> str:
        """Hash of the corpus, for an encoded one at the time of encoding."""
        if self.split == "documents":
            self.load()
        encoded = self.__dict__.get("encoded")
        return self.corpus.content_sha256() if encoded is None else encoded.stats.content_sha256


def _size(train_tokens: int, parameters: int) -> str:
    """The tokens per parameter; the inverse where a newcomer would have to count zeros."""
    ratio = train_tokens / parameters
    if ratio < 1:
        return (
            f"1 training token for every {parameters / max(1, train_tokens):,.0f} parameters:"
            " the model can learn the text by heart, so watch the validation loss"
        )
    enough = "enough for this size of model"
    meaning = enough if ratio >= TOKENS_PER_PARAMETER else f"about {TOKENS_PER_PARAMETER} are {enough}"
    return f"{ratio:,.1f} training tokens for every parameter: {meaning}"


def _bytes_a_token(tokenizer: Tokenizer, tokens: Tokens) -> str:
    """How much text a token stands for: with fewer tokens a model reads more of it at once."""
    if (lengths := tokenizer.token_bytes()) is not None:
        return f"a token stands for {lengths[tokens].mean():.2f} bytes of the validation text"
    text = tokenizer.decode(tokens[: 1 << 16].tolist())
    mean = len(text) / max(1, min(len(tokens), 1 << 16))
    return f"a token stands for {mean:.2f} characters of the validation text"


def _duplicates(stats: CorpusStats) -> str:
    """How much of the validation text training has seen, and whether that matters."""
    if not stats.compared_blocks:
        return "the validation text is too short to look for duplicates of the training text"
    ratio = stats.duplicate_blocks / stats.compared_blocks
    meaning = "the validation loss is a fair test"
    if ratio > MANY_DUPLICATES:
        meaning = "the validation loss is too low by what the model remembers of them"
    searched = "the training text"
    if stats.searched_tokens is not None:
        searched = f"{stats.searched_tokens:,} of the training tokens"
    return (
        f"{stats.duplicate_blocks:,} of {stats.compared_blocks:,} blocks of 32 validation tokens "
        f"also occur verbatim in {searched} ({ratio:.1%}): {meaning}"
    )
