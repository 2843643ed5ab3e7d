"""Batches of a text for Lightning: training in shuffled order, evaluation always on the same windows."""

# B windows in a rank's batch, T tokens in a window, R ranks

from functools import cached_property
from pathlib import Path
from typing import Literal

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from gptpl.data.corpora import Corpus
from gptpl.data.encoded_corpus import EncodedCorpus
from gptpl.data.encoding import encode_corpus
from gptpl.data.sampler import EpochSampler
from gptpl.data.scored_windows import Indices, ScoredWindows, evenly_spaced, rank_share
from gptpl.data.split import check_train_ratio
from gptpl.data.token_file import Tokens
from gptpl.data.tokenizers import Tokenizer
from gptpl.data.windows import TokenWindows, check_window_sizes, identity
from gptpl.errors import InputError

Batches = DataLoader[tuple[Tensor, Tensor]]


class PositionedLoader(Batches):
    """A DataLoader that can begin within an epoch, and says so to Lightning by having a state.

    The state is empty: the position is the training's, in finished steps, and given to `start_at`. A loader
    knows how many batches were fetched, which with worker processes are more than were trained on.
    """

    def state_dict(self) -> dict[str, object]:
        """Nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Takes nothing over."""


class TextDataModule(L.LightningDataModule):
    """One corpus as batches of (inputs, targets), two int64 tensors (B, T), targets one token later.

    Usable by hand as well as through a Trainer: `load()` gives the tokenizer and the counts before there is a
    model. Under R ranks (of the attached trainer) each gets B windows of every global batch of R x B, so that
    they see together, in training and in evaluation, what one process sees with batches of R x B. No loader
    touches the global random numbers: each has a generator of its own.

    Args:
        corpus: the text.
        tokenizer: what turns it into tokens; one without a vocabulary takes it from the text.
        max_length: T, tokens in a window.
        stride: tokens from the start of a training or validation window to the start of the next.
        batch_size: B, windows in a batch of one rank.
        train_ratio: share of the characters to train on, between 0 and 1.
        seed: decides, with the epoch, the order of the training windows.
        num_workers: processes that prepare training batches. A batch is cut out of the token array in
            microseconds, so 0 is right nearly always; evaluation never uses workers.
        pin_memory: prepare batches in page-locked memory. None: only where there is a CUDA device.
        persistent_workers: keep the workers from epoch to epoch (nothing to keep without workers).
        eval_train_batches: global batches of training windows, evenly spaced over the text, to evaluate on;
            None: all full ones.
        eval_val_batches: the same of validation windows; None: all, the last, short one included.
        cache_dir: where encoded corpora are kept; None: the project's cache folder.

    Raises InputError for a number out of range, when made, and for a text too short for it, when loaded.
    """

    def __init__(
        self,
        *,
        corpus: Corpus,
        tokenizer: Tokenizer,
        max_length: int,
        stride: int,
        batch_size: int,
        train_ratio: float = 0.9,
        seed: int = 123,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        persistent_workers: bool = True,
        eval_train_batches: int | None = 5,
        eval_val_batches: int | None = 5,
        cache_dir: Path | str | None = None,
    ) -> None:
        super().__init__()
        check_train_ratio(train_ratio)
        check_window_sizes(max_length=max_length, stride=stride)
        _check_at_least(1, "data.batch_size", batch_size)
        _check_at_least(1, "eval_train_batches", eval_train_batches)
        _check_at_least(1, "eval_val_batches", eval_val_batches)
        _check_at_least(0, "data.num_workers", num_workers)
        _check_at_least(0, "seed", seed)
        self.corpus = corpus
        self.max_length = max_length
        self.stride = stride
        self.batch_size = batch_size
        self.train_ratio = train_ratio
        self.seed = seed
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.persistent_workers = persistent_workers
        self.eval_train_batches = eval_train_batches
        self.eval_val_batches = eval_val_batches
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self._given_tokenizer = tokenizer
        self._start = (0, 0)

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

    def prepare_data(self) -> None:
        """Fill the cache. Lightning calls it in one process, and `setup` in all of them after it."""
        self.load()

    def setup(self, stage: str | None = None) -> None:
        """Open both splits. Raises InputError if one of them is too short for a window."""
        del stage
        _ = self.train_windows, self.val_windows

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the tokens, with its vocabulary."""
        return self.encoded.tokenizer

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

    # --- training -------------------------------------------------------------------------------------

    def train_dataloader(self) -> Batches:
        """Shuffled batches of this rank; the last incomplete global batch is dropped."""
        rank, world_size = self._rank_and_world_size()
        sampler = self._sampler(rank, world_size, start=self._start)
        return self._loader(self.train_windows, sampler, num_workers=self.num_workers)

    def start_at(self, *, epoch: int, batch: int) -> None:
        """Makes training loaders begin at that epoch, and in it after so many batches of each rank."""
        self._start = (epoch, batch)

    def steps_per_epoch(self, *, world_size: int = 1, accumulate: int = 1) -> int:
        """Return the optimizer steps of an epoch when each takes `accumulate` batches from every rank.

        An epoch's last step may have fewer batches, as in Lightning. Raises InputError if there is no batch.
        """
        return -(-self._sampler(0, world_size).batches // accumulate)

    def _sampler(self, rank: int, world_size: int, *, start: tuple[int, int] = (0, 0)) -> EpochSampler:
        windows = len(self.train_windows)
        sampler = EpochSampler(
            windows,
            batch_size=self.batch_size,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            start=start,
        )
        if not sampler.batches:
            devices = f" on each of {world_size} devices" if world_size > 1 else ""
            raise InputError(
                f"the training split has {windows:,} windows, which do not fill one batch of "
                f"data.batch_size={self.batch_size}{devices}: lower data.batch_size, data.stride or "
                "data.max_length, or give more text"
            )
        return sampler

    # --- evaluation -----------------------------------------------------------------------------------

    def val_dataloader(self) -> list[Batches]:
        """Return two loaders, of training windows and of validation windows, the same in every evaluation.

        Under several ranks the last batch may hold rows whose targets are all -100 (see `rank_share`): sum
        losses and count targets over the ranks, and divide then, for the exact mean.
        """
        global_batch = self.batch_size * self._rank_and_world_size()[1]
        full = max(1, len(self.train_windows) // global_batch)
        return [
            self._fixed_windows(self.train_windows, min(self.eval_train_batches or full, full)),
            self._fixed_windows(self.val_windows, self.eval_val_batches),
        ]

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
        return self._scored(tokens, np.arange(0, len(tokens) - 1, self.max_length, dtype=np.int64))

    def _fixed_windows(self, windows: TokenWindows, batches: int | None) -> Batches:
        """Return a loader of `batches` global batches (None: all), their windows evenly spaced."""
        global_batch = self.batch_size * self._rank_and_world_size()[1]
        wanted = len(windows) if batches is None else batches * global_batch
        chosen = evenly_spaced(len(windows), wanted) * windows.stride
        return self._scored(windows.tokens, chosen)

    def _scored(self, tokens: Tokens, starts: Indices) -> Batches:
        """Batches of this rank's share of the windows that begin at `starts`, in order."""
        rank, world_size = self._rank_and_world_size()
        share = rank_share(starts, batch_size=self.batch_size, rank=rank, world_size=world_size)
        # The share is this rank's already: an EpochSampler, so that Lightning does not divide it once more.
        in_order = EpochSampler(len(share), batch_size=1, seed=self.seed, shuffle=False)
        return self._loader(ScoredWindows(tokens, share, max_length=self.max_length), in_order)

    # --- both -----------------------------------------------------------------------------------------

    def _rank_and_world_size(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _loader(
        self, windows: TokenWindows | ScoredWindows, sampler: EpochSampler, *, num_workers: int = 0
    ) -> Batches:
        return PositionedLoader(
            windows,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=num_workers,
            collate_fn=identity,
            pin_memory=torch.cuda.is_available() if self.pin_memory is None else self.pin_memory,
            persistent_workers=self.persistent_workers and num_workers > 0,
            generator=torch.Generator().manual_seed(self.seed),  # else every pass draws from the global one
        )


def _check_at_least(least: int, name: str, value: int | None) -> None:
    if value is not None and value < least:
        raise InputError(f"{name}={value} is too small: give {least} or more")
