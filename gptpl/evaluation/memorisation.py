"""Memorisation: how much of a generated text is copied word for word from the training text.

Only verbatim overlap counts, in tokens: a lower bound on what a model has memorised, since a copy with one
word changed goes unseen. Some overlap is to be expected, as common phrases are in every text: compare with
that of held-out text.
"""

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gptpl.checkpoints.loading import LoadedCheckpoint
from gptpl.data.pretraining.encoding import cached_corpus, encode_corpus, encode_in_memory
from gptpl.data.pretraining.shards import cached_documents
from gptpl.data.pretraining.token_cache import EncodedCorpus, ShardedCorpus
from gptpl.data.sources import Corpus, PythonStdlib, Tale
from gptpl.errors import InputError
from gptpl.evaluation.statistics import TokenIds, check_n, checked_token_ids

if TYPE_CHECKING:
    from gptpl.generation.text import Completion

log = logging.getLogger(__name__)

_USUAL_RATIO = 0.9


def training_corpus(
    loaded: LoadedCheckpoint,
    corpus: Corpus | None = None,
    *,
    train_ratio: float | None = None,
    cache_dir: Path | None = None,
) -> EncodedCorpus | ShardedCorpus:
    """The text that a model was trained on, in its own tokens and split as it was: `train` is what it read.

    A checkpoint may come from anywhere: nothing is downloaded, opened or written because it names it. Its
    text is identified by the recorded SHA-256, and taken from the cache of encoded texts, from the text that
    ships with gptpl, or from the running Python's source. Any other has to be given as `corpus`, with a
    `train_ratio` if it is neither the recorded one nor 0.9.

    Raises InputError where the recorded text is not available, and what `encode_corpus` raises.
    """
    sha256, ratio = _recorded(loaded)
    if corpus is not None:
        if sha256 is not None and corpus.content_sha256() != sha256:
            log.warning("%s is not the text that %s was trained on (SHA-256)", corpus.name, loaded.path)
        chosen = train_ratio or ratio or _USUAL_RATIO
        return encode_corpus(corpus, loaded.tokenizer, train_ratio=chosen, cache_dir=cache_dir)
    ratio = train_ratio or ratio
    if sha256 is not None and ratio is not None:
        found = cached_corpus(sha256, loaded.tokenizer, train_ratio=ratio, cache_dir=cache_dir)
        if found is not None:
            return found
        most = loaded.run_config.get("data", {}).get("val_tokens")
        if isinstance(most, int):
            documents = cached_documents(
                sha256, loaded.tokenizer, val_tokens=most, train_ratio=ratio, cache_dir=cache_dir
            )
            if documents is not None:
                return documents
        for bundled in (Tale(), PythonStdlib()):
            if bundled.content_sha256() == sha256:
                return encode_in_memory(bundled, loaded.tokenizer, content_sha256=sha256, train_ratio=ratio)
    known = f"SHA-256 {sha256[:12]}" if sha256 else "its SHA-256 is not recorded"
    raise InputError(
        f"the text that {loaded.path} was trained on ({known}) is not in this machine's cache of encoded"
        " texts: name it, training_text=FILE (in Python corpus=TextFiles(FILE)), or leave memorisation out"
    )


def _recorded(loaded: LoadedCheckpoint) -> tuple[str | None, float | None]:
    """The text's hash and `train_ratio` as recorded; None for what is missing or invalid."""
    data, settings = loaded.lineage.get("data"), loaded.run_config.get("data")
    sha256 = data.get("sha256") if isinstance(data, Mapping) else None
    ratio = settings.get("train_ratio") if isinstance(settings, Mapping) else None
    return (
        sha256 if isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256) else None,
        ratio if isinstance(ratio, float) and 0 < ratio < 1 else None,
    )


class TrainingText:
    """The training tokens, (N,) ids, indexed so that all positions of a token can be looked up.

    They are one stream: a run may cross the border of two documents, as a sequence of the training may. The
    index takes 8 bytes a token, and `match_lengths` another 4 while it runs.

    Raises InputError unless they are one or more whole numbers.
    """

    def __init__(self, tokens: TokenIds) -> None:
        tokens = checked_token_ids("the training text", tokens)
        if tokens.size == 0:
            raise InputError("the training text has 0 tokens: give the tokens that the model was trained on")
        if tokens.min() >= 0 and tokens.max() < 2**16:  # GPT-2's are, and numpy sorts 16 bits in linear time
            tokens = tokens.astype(np.uint16)
        self.tokens = tokens.size
        """Their number."""
        self._positions = np.argsort(tokens, kind="stable")  # (N,) by token, then from left to right
        ordered = tokens[self._positions]
        starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]).tolist()
        slices = map(slice, starts, [*starts[1:], tokens.size])
        self._slices = dict(zip(ordered[starts].tolist(), slices, strict=True))

    def match_lengths(self, sample: TokenIds) -> NDArray[np.int64]:
        """For each position i of the sample the greatest L for which sample[i:i+L] is in the training text.

        It takes the time of visiting all training positions of every token of the sample, however long the
        matches are: some 2 s on a CPU core for 1,000 tokens against 10 million with a vocabulary like
        GPT-2's, 6 s where the tokens are characters. Raises InputError unless the sample is a sequence of
        ids.
        """
        ids = checked_token_ids("the sample", sample).tolist()
        ending = np.zeros(len(ids), dtype=np.int64)  # length of the longest match whose last position is j
        # run[p + 1]: length of the match that ends at p in the training text and at j in the sample. Shifted
        # by one, so that run[0] = 0 is what precedes the first token.
        run = np.zeros(self.tokens + 1, dtype=np.int32)
        before = np.empty(0, dtype=np.intp)  # where run is not 0
        for j, token in enumerate(ids):
            here = self._positions[self._slices.get(token, slice(0))]
            lengths = run[here] + 1
            run[before] = 0
            before = here + 1
            run[before] = lengths
            ending[j] = lengths.max(initial=0)
        # The longest match that ends at j starts at starts[j], ascending, and every part of it is a match. So
        # the longest match from i ends at the last j with starts[j] <= i. (No match at j: starts[j] = j + 1.)
        ends = np.arange(len(ids))
        starts = ends - ending + 1
        return np.searchsorted(starts, ends, side="right") - ends


@dataclass(frozen=True, kw_only=True)
class Memorisation:
    """What a sample shares word for word with the training text."""

    longest_run: int
    """Tokens of the longest run of the sample that is in the training text."""
    longest_start: int
    """Where it starts in the sample, the first of equals; 0 if there is none."""
    shares: Mapping[int, float]
    """For each n, the fraction of the sample's n-grams that are in the training text; nan without any."""


def memorisation(
    sample: TokenIds, training: TrainingText, n_values: Sequence[int] = (4, 8, 16)
) -> Memorisation:
    """The longest run that the sample shares with the training text, and the fractions of shared n-grams.

    Give the sample without its prompt, which the model did not write. Raises InputError unless every n >= 1
    and the sample is a sequence of token ids.

    Source: Carlini et al. 2023, "Quantifying Memorization Across Neural Language Models" (verbatim runs);
    McCoy et al. 2023, "How Much Do Language Models Copy From Their Training Data?" (n-grams; their novelty
    is 1 - fraction).
    """
    for n in n_values:
        check_n(n)
    lengths = training.match_lengths(sample)
    shares = {}
    for n in n_values:
        grams = lengths[: max(0, len(lengths) - n + 1)]  # one from each start that has n tokens left
        shares[n] = float((grams >= n).mean()) if grams.size else math.nan
    start = int(lengths.argmax()) if lengths.size else 0
    return Memorisation(longest_run=int(lengths.max(initial=0)), longest_start=start, shares=shares)


def memorisation_lines(
    completions: Sequence["Completion"], training: TrainingText, *, decode: Callable[[Sequence[int]], str]
) -> list[str]:
    """What several texts share word for word with the training text: a line for each."""
    lines = [f"in the training text of {training.tokens:,} tokens word for word:"]
    for number, completion in enumerate(completions, start=1):
        found = memorisation(completion.tokens, training)
        run = decode(completion.tokens[found.longest_start : found.longest_start + found.longest_run])
        shares = [f", {share:.0%} of its {n}-grams" for n, share in found.shares.items() if share >= 0]
        lines.append(f"  text {number}: {found.longest_run} tokens in a row ({run!r}){''.join(shares)}")
    return lines
