"""Statistics of generated texts, as token ids: how varied, how repetitive, how alike, how likely.

All functions take `samples`, a sequence of token ids for each text. A text may be empty, as a model may end
it at once. A statistic is nan where no text is long enough for it. Raises InputError for samples that are not
flat sequences of whole numbers, and for an n below 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptpl.errors import InputError
from gptpl.generation.text import Completion
from gptpl.model.loss import perplexity

TokenIds = Sequence[int] | NDArray[np.integer[Any]]


def checked_token_ids(name: str, ids: TokenIds) -> NDArray[np.integer[Any]]:
    """The ids as an array (tokens,). Raises InputError unless they are a flat sequence of whole numbers."""
    array = np.asarray(ids)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InputError(
            f"{name} must be a flat sequence of token ids, got {array.ndim} dimensions of {array.dtype}"
        )
    return array if array.size else np.empty(0, dtype=np.int64)


def check_n(n: int) -> None:
    """Raise InputError unless n-grams can have this n."""
    if n < 1:
        raise InputError(f"n must be 1 or more, got {n}")


def distinct_n(samples: Sequence[TokenIds], n: int) -> float:
    """Different n-grams of all samples together, divided by the number of n-grams: 1 is all different.

    It falls as samples get longer or more: compare only sets of the same size.

    Source: Li et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation Models".
    """
    grams = [gram for of_one in _ngrams(samples, n) for gram in of_one]
    return len(set(grams)) / len(grams) if grams else math.nan


def repetition_rate(samples: Sequence[TokenIds], n: int = 4) -> float:
    """Fraction of a sample's n-grams that are repeats, averaged over the samples that have any (seq-rep-n).

    Source: Welleck et al. 2020, "Neural Text Generation with Unlikelihood Training".
    """
    rates = [1 - len(set(grams)) / len(grams) for grams in _ngrams(samples, n) if grams]
    return math.fsum(rates) / len(rates) if rates else math.nan


def self_bleu(samples: Sequence[TokenIds], n: int = 4) -> float:
    """Mean BLEU-n of each sample against all the others: 0 is nothing in common, 1 is all the same.

    Not smoothed: a sample that shares no n-gram with the others counts 0 (Zhu et al. smooth, and give it
    slightly more). Samples of fewer than n tokens are left out; nan if fewer than two remain. 100 samples of
    200 tokens take 10 to 15 s on a CPU core, growing faster than the square of their number.

    Source: Zhu et al. 2018, "Texygen: A Benchmarking Platform for Text Generation Models".

    Raises InputError for fewer than two samples.
    """
    from torchmetrics.functional.text import bleu_score  # slow to import

    if len(samples) < 2:
        raise InputError(f"self-BLEU needs 2 samples or more, got {len(samples)}")
    grams = _ngrams(samples, n)
    ids = [np.asarray(sample).tolist() for sample, found in zip(samples, grams, strict=True) if found]
    if len(ids) < 2:
        return math.nan
    # Shortest first: of two references that are equally close in length NLTK measures the brevity by the
    # shorter, torchmetrics by the first, so that the score would depend on the order of the samples.
    texts = [" ".join(map(str, sample)) for sample in sorted(ids, key=len)]
    scores = [
        float(bleu_score([text], [texts[:i] + texts[i + 1 :]], n_gram=n)) for i, text in enumerate(texts)
    ]
    return math.fsum(scores) / len(scores)


@dataclass(frozen=True, kw_only=True)
class TextStatistics:
    """What `text_statistics` measures."""

    distinct_1: float
    """See `distinct_n`; high is varied."""
    distinct_2: float
    distinct_3: float
    repetition: float
    """See `repetition_rate`, of 4-grams."""
    self_bleu: float | None
    """BLEU-4; high is alike. None for fewer than two samples."""
    mean_log_probability: float
    """Nats per token under the model, at most 0."""
    perplexity: float
    """exp(-mean_log_probability)."""


def text_statistics(
    samples: Sequence[TokenIds], log_probabilities: Sequence[Sequence[float] | NDArray[np.floating[Any]]]
) -> TextStatistics:
    """All statistics of the samples, and how likely they are under the model.

    `log_probabilities` are those of the samples' tokens under the model, in nats. The mean is over all
    tokens: a long sample weighs more than a short one. Raises InputError if there is not one for each token.
    """
    lengths, given = [len(ids) for ids in samples], [len(row) for row in log_probabilities]
    if lengths != given:
        raise InputError(f"log_probabilities must have one for each token: {lengths}, got {given}")
    values = np.concatenate([np.empty(0), *(np.asarray(row, np.float64) for row in log_probabilities)])
    mean = float(values.mean()) if values.size else math.nan
    return TextStatistics(
        distinct_1=distinct_n(samples, 1),
        distinct_2=distinct_n(samples, 2),
        distinct_3=distinct_n(samples, 3),
        repetition=repetition_rate(samples),
        self_bleu=self_bleu(samples) if len(samples) >= 2 else None,
        mean_log_probability=mean,
        perplexity=perplexity(-mean),
    )


def statistics_lines(completions: Sequence[Completion]) -> list[str]:
    """The statistics of texts with details as lines of text."""
    samples = [completion.tokens for completion in completions]
    chances = [[each.log_probability for each in completion.details or ()] for completion in completions]
    found = text_statistics(samples, chances)
    alike = "-" if found.self_bleu is None else f"{found.self_bleu:.3f}"
    return [
        f"statistics of {len(samples)} texts, {sum(map(len, samples))} tokens",
        f"  distinct-1, -2, -3  {found.distinct_1:.3f}  {found.distinct_2:.3f}  {found.distinct_3:.3f}",
        f"  repeated 4-grams    {found.repetition:.3f}",
        f"  self-BLEU           {alike}",
        f"  log-probability     {found.mean_log_probability:.3f} nats per token",
        f"  perplexity          {found.perplexity:.2f}",
    ]


def _ngrams(samples: Sequence[TokenIds], n: int) -> list[list[tuple[int, ...]]]:
    """The n-grams of each sample, from left to right; none where it has fewer than n tokens."""
    check_n(n)
    every = [checked_token_ids(f"samples[{i}]", sample).tolist() for i, sample in enumerate(samples)]
    return [list(zip(*(ids[start:] for start in range(n)), strict=False)) for ids in every]
