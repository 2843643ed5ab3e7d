"""Several corpora in the proportions that a run wants, each encoded, split and cached by itself.

An epoch takes a number of sequences from each source. Which one comes when is a function of seed, epoch and
place: the places of the epoch are permuted, and to each source belong as many numbers as it gives sequences.
The n-th draw from a source, counted over all epochs, is the n-th sequence of its own permutations, one after
the other: after any epoch none of them has been drawn more than once more often than another. (As always,
what does not fill an epoch's last batch is drawn and not read.)
"""

# N global batches, R ranks, B examples in a rank's batch, S sources

import bisect
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Unpack, cast

import numpy as np
import torch
from torch.utils.data import ConcatDataset

from gptpl.data.packing import PackedBatch
from gptpl.data.pretraining.datamodule import PackedSequences, SequenceData, SequenceSettings
from gptpl.data.pretraining.encoding import count_duplicates, vocabulary_sha256
from gptpl.data.pretraining.shards import leak_sample
from gptpl.data.pretraining.token_cache import CorpusStats, ShardedCorpus, ShardedTokens, Tokens
from gptpl.data.sampler import PADDING, EpochSampler, Indices, evenly_spaced, permutation_keys, permuted
from gptpl.data.sources import Corpus, TextFiles
from gptpl.data.sources.base import sampled
from gptpl.data.splits import Split
from gptpl.data.training_data import Batches
from gptpl.errors import InputError
from gptpl.files.download import cache_dir as default_cache_dir
from gptpl.files.durable import write_atomically
from gptpl.text import table

_SHARES = ("weight", "epochs", "tokens")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A corpus and how much of it an epoch of the mixture takes: one of the three.

    Attributes:
        weight: its share of the sequences, relative to the other sources' weights; in an epoch as many are
            drawn from each as until the first of the sources has been drawn as a whole.
        epochs: how often it is read in one epoch of the mixture; 0.5 is every other sequence.
        tokens: how many of its tokens are.
    """

    corpus: Corpus
    weight: float | None = None
    epochs: float | None = None
    tokens: float | None = None

    @classmethod
    def of(cls, name: str, given: "Source | Mapping[str, Any]") -> "Source":
        """A source from its settings: of `corpus` or else of `TextFiles`, and a share.

        Raises InputError, which names the source, for a wrong name or share.
        """
        if isinstance(given, Source):
            source = given
        elif not isinstance(given, Mapping):
            raise InputError(
                f"data.sources.{name} must be settings such as {{path: FOLDER, weight: 1}}, got {given!r}"
            )
        else:
            settings = dict(given)
            share = {key: settings.pop(key) for key in _SHARES if key in settings}
            corpus = settings.pop("corpus", None)
            known = ("path", "pattern", "field", *(each.name for each in fields(cls)))
            if unknown := [key for key in settings if key not in known]:
                raise InputError(
                    f"data.sources.{name} has no setting {unknown[0]!r}: choose of {', '.join(known)}"
                )
            if corpus is None:
                corpus = TextFiles(name=name, **({"pattern": None} | settings))
            elif not isinstance(corpus, Corpus) or settings:
                raise InputError(
                    f"data.sources.{name}: give path, pattern and field of files, or a corpus with the"
                    " _target_ of a Corpus"
                )
            source = cls(corpus=corpus, **share)
        given_shares = [key for key in _SHARES if getattr(source, key) is not None]
        if len(given_shares) != 1:
            raise InputError(
                f"data.sources.{name} has {' and '.join(given_shares) or 'no share'}: give one of weight,"
                " epochs and tokens"
            )
        value = getattr(source, given_shares[0])
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise InputError(
                f"data.sources.{name}.{given_shares[0]} must be a number from 0 on, got {value!r}"
            )
        return source


def sources_of(given: Mapping[str, Any] | None) -> dict[str, Source]:
    """The sources of a mixture from their settings. Raises InputError for what is wrong with them."""
    if not given:
        raise InputError(
            "data.sources is not set: name at least one, e.g."
            " data.sources='{books: {path: books, weight: 2}, web: {path: web.jsonl.zst, weight: 1}}'"
        )
    if not isinstance(given, Mapping):
        raise InputError("data.sources must have names, {NAME: {path: FOLDER, weight: 1}}, not be a list")
    for name in given:
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
            raise InputError(
                f"data.sources has the name {name!r}: give a word of letters, digits, '.', '-' and '_'"
            )
    sources = {name: Source.of(name, each) for name, each in given.items()}
    weighted = [source.weight for source in sources.values() if source.weight is not None]
    if weighted and len(weighted) < len(sources):
        raise InputError("data.sources: some have weights, others not: give all of them one, or none")
    if not any(getattr(source, share) for source in sources.values() for share in _SHARES):
        raise InputError("data.sources: every share is 0: give one of them more")
    return sources


class MixtureDataModule(SequenceData):
    """The sequences of several corpora; each is divided as by `encode_documents`.

    Validation text is that of all sources, each with up to `val_tokens` tokens whatever its share: mixtures
    of the same sources are validated on the same. An evaluation of some batches takes as many of each.

    Args:
        sources: by name, each a `Source`, or its settings: `path`, `pattern` and `field` of `TextFiles` or
            another `corpus`, and one of `weight` (all have one), `epochs` and `tokens`.
        settings: as in `SequenceData`, for each source.
    """

    split = "documents"
    computed_order = True

    def __init__(self, *, sources: Mapping[str, Any] | None, **settings: Unpack[SequenceSettings]) -> None:
        super().__init__(**settings)
        self.sources = sources_of(sources)
        self.corpora = [source.corpus for source in self.sources.values()]
        self.evaluated = ("train", *(f"val/{name}" for name in self.sources))
        self.name = "mixture of " + ", ".join(self.sources)
        self._joined: dict[Split, JoinedSequences] = {}

    @cached_property
    def parts(self) -> list[ShardedCorpus]:
        """The tokens of every source; encoded, or opened from the cache, when first asked for."""
        tokenizer = self._given_tokenizer
        if vocabulary_sha256(tokenizer) is None:
            tokenizer = tokenizer.fitted_to(text for corpus in self.corpora for text in sampled(corpus))
        found = []
        for name, source in self.sources.items():
            with _named(name):
                found.append(self.encode_documents(source.corpus, tokenizer))
        return found

    @cached_property
    def encoded(self) -> ShardedCorpus:
        """The tokens of all sources, one after the other."""
        train = ShardedTokens.joined([part.train for part in self.parts])
        val = np.concatenate([part.val for part in self.parts])
        stats = self._stats(train, val)
        return ShardedCorpus(train=train, val=val, tokenizer=self.parts[0].tokenizer, stats=stats)

    def _stats(self, train: ShardedTokens, val: Tokens) -> CorpusStats:
        """The sums of the sources' counts; duplicates are counted across sources, once, and kept."""
        identity = json.dumps([[part.stats.content_sha256, part.tokenizer.sha256] for part in self.parts])
        split = [self.val_tokens, self.train_ratio]
        name = hashlib.sha256(f"{identity} {split}".encode()).hexdigest()
        kept = (self.cache_dir or default_cache_dir()) / "shards" / f"mixture-{name}.json"
        try:
            duplicated, compared, searched = json.loads(kept.read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError):
            sample = leak_sample(train)
            duplicated, compared = count_duplicates(sample, val)
            searched = len(sample)
            with suppress(OSError):  # a cache that cannot be written: they are counted again next time
                write_atomically(kept, json.dumps([duplicated, compared, searched]))
        summed = (
            *("documents", "train_documents", "val_documents", "train_characters", "val_characters"),
            *("train_tokens", "val_tokens"),
        )
        return CorpusStats(
            **{count: sum(getattr(part.stats, count) for part in self.parts) for count in summed},
            duplicate_blocks=duplicated,
            compared_blocks=compared,
            searched_tokens=None if searched == len(train) else searched,
            content_sha256=hashlib.sha256(identity.encode()).hexdigest(),
        )

    def examples(self, split: Split) -> Any:
        """The sequences of all sources, one source after the other."""
        if split == "test":
            return super().examples(split)
        if split not in self._joined:
            found = []
            for name, part in zip(self.sources, self.parts, strict=True):
                with _named(name):
                    found.append(self.sequences(part, split))
            self._joined[split] = JoinedSequences(found)
        return self._joined[split]

    @cached_property
    def draws(self) -> "Draws":
        """Which sequences an epoch takes."""
        ends = [0, *self.examples("train").cumulative_sizes]
        ranges = [range(*border) for border in itertools.pairwise(ends)]
        return Draws(ranges, self._counts([len(each) for each in ranges]), seed=self.seed)

    def _counts(self, available: Sequence[int]) -> list[int]:
        """The sequences that an epoch takes from each source."""
        weights = [source.weight for source in self.sources.values()]
        scale = min((count / w for count, w in zip(available, weights, strict=True) if w), default=0.0)
        counts = []
        for n, (name, source) in enumerate(self.sources.items()):
            if source.weight is not None:
                wanted = scale * source.weight
            elif source.epochs is not None:
                wanted = source.epochs * available[n]
            else:
                found = self.examples("train").datasets[n]
                is_packed = isinstance(found, PackedSequences)
                each = found.packing.tokens / len(found) if is_packed else self.max_length
                wanted = cast(float, source.tokens) / each
            counts.append(round(wanted))
            if not counts[-1] and wanted:
                raise InputError(
                    f"data.sources.{name} would give {wanted:.2g} of a sequence in an epoch: raise its share,"
                    " or leave the source out"
                )
        return counts

    @property
    def train_examples(self) -> int:
        """The sequences of an epoch, repeated ones included."""
        return self.draws.count

    def make_sampler(self, kind: type[EpochSampler], **settings: Any) -> EpochSampler:
        """A sampler that takes from each source what its share is; in order: one source after the other."""
        return kind(self.draws.count, draw=self.draws.indices, **settings)

    def evaluated_indices(self, split: Split, wanted: int) -> Indices:
        """Of training sequences some in the proportions of the first epoch."""
        if split != "train":
            return super().evaluated_indices(split, wanted)
        return self.draws.indices(evenly_spaced(self.draws.count, wanted), epoch=0)

    def val_dataloader(self) -> list[Batches]:
        """As `TrainingData`, with a loader of equally many validation sequences for each source."""
        train, _ = super().val_dataloader()
        joined: JoinedSequences = self.examples("val")
        each = self.eval_val_batches
        if each is not None:
            each = -(-each // len(joined.datasets)) * self._global_batch
        loaders, start = [train], 0
        for part in joined.datasets:
            indices = evenly_spaced(len(part), len(part) if each is None else each)
            loaders.append(self._in_order(joined, start + indices))
            start += len(part)
        return loaders

    def report(self, *, parameters: int | None, world_size: int) -> list[str]:
        """As `SequenceData`, and what an epoch takes from each source."""
        lines = super().report(parameters=parameters, world_size=world_size)
        rows = [["source", "documents", "tokens", "sequences an epoch", "share", "times read"]]
        for n, (name, part) in enumerate(zip(self.sources, self.parts, strict=True)):
            count, available = self.draws.counts[n], len(self.draws.ranges[n])
            rows.append(
                [
                    name,
                    f"{part.stats.documents:,}",
                    f"{part.stats.train_tokens:,}",
                    f"{count:,}",
                    f"{count / self.draws.count:.1%}",
                    f"{count / available:.2f}",
                ]
            )
        return [*lines, *(f"  {line}" for line in table(rows, right=range(1, 6)))]


@contextmanager
def _named(source: str) -> Iterator[None]:
    """Names the source in an InputError."""
    try:
        yield
    except InputError as error:
        raise InputError(f"data.sources.{source}: {error}") from error


class JoinedSequences(ConcatDataset[Any]):
    """The sequences of several data sets, one after the other; batches as theirs."""

    datasets: list[Any]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Any, ...]:
        """A batch; PADDING is a row of the first part."""
        rows = []
        for index in indices:
            number = 0 if index == PADDING else bisect.bisect_right(self.cumulative_sizes, index)
            part = self.datasets[number]
            first = self.cumulative_sizes[number] - len(part)
            rows.append(part.__getitems__([index if index == PADDING else index - first]))
        if isinstance(rows[0], PackedBatch):
            inputs, targets, segments, tokens = zip(*rows, strict=True)
            return PackedBatch(torch.cat(inputs), torch.cat(targets), torch.cat(segments), sum(tokens))
        return tuple(torch.cat(each) for each in zip(*rows, strict=True))


class Draws:
    """Which sequences come from S sources, as a function of seed, epoch and slot.

    Attributes:
        ranges: the indices of each source's sequences.
        counts: how many of them each epoch takes.
        count: the slots of an epoch, their sum.
    """

    def __init__(self, ranges: Sequence[range], counts: Sequence[int], *, seed: int) -> None:
        self.ranges = list(ranges)
        self.counts = list(counts)
        self.count = sum(counts)
        self._ends = np.cumsum(counts)  # (S,)
        self._seed = seed

    def indices(self, slots: Indices, *, epoch: int) -> Indices:
        """The index of the sequence of each slot."""
        found = np.empty_like(slots)
        sources = np.searchsorted(self._ends, slots, side="right")
        for source in np.unique(sources).tolist():
            own = np.flatnonzero(sources == source)
            count, available = self.counts[source], self.ranges[source]
            # The number of this draw from the source since training began.
            drawn = epoch * count + slots[own] - (self._ends[source] - count)
            laps, places = np.divmod(drawn, len(available))
            for lap in np.unique(laps).tolist():
                chosen = laps == lap
                # Not [seed, epoch], the keys of the slots: a source's number from 1 on makes them others.
                keys = permutation_keys(self._seed, lap, source + 1)
                found[own[chosen]] = available.start + permuted(places[chosen], len(available), keys)
        return found
