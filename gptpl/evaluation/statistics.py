"""Statistics of generated texts, taken as token ids: how varied, how repetitive, how alike, how likely.

Every function takes `samples`, one sequence of token ids a text, and raises InputError for what is none, and
for an n below 1. A text may be empty, for a model may end it at once. Where no text is long enough to have a
value it is nan, so that a table of a study shows it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gptpl.errors import InputError

if TYPE_CHECKING:
    from gptpl.generation.text import Completion

TokenIds = Sequence[int] | NDArray[np.integer[Any]]

# Rounding may lift the log-probability of a sure token just above 0; anything more is another quantity.
ROUNDING_NATS = 1e-3


def checked_token_ids(name: str, ids: TokenIds) -> NDArray[np.integer[Any]]:
    """The ids as an array (tokens,), empty for none. Raises InputError unless they are flat whole numbers."""
    array = np.asarray(ids)
    if array.ndim != 1:
        raise InputError(f"{name} has {array.ndim} dimensions: give one flat sequence of token ids a text")
    if array.size == 0:
        return np.empty(0, dtype=np.int64)
    if array.dtype.kind not in "iu":
        raise InputError(f"{name} holds {array.dtype} values: give token ids, which are whole numbers")
    return array


def check_n(n: int) -> None:
    """Raise InputError unless n >= 1."""
    if n < 1:
        raise InputError(f"n={n} is out of range: an n-gram has at least 1 token")


def distinct_n(samples: Sequence[TokenIds], n: int) -> float:
    """Different n-grams of all samples together, divided by the number of n-grams: 1 is all different.

    It falls as the samples get longer or more, so compare only sets of the same size. nan where no sample
    has n tokens.

    Source: Li et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation Models".
    """
    check_n(n)
    grams = list(chain.from_iterable(_ngrams(ids, n) for ids in _id_lists(samples)))
    return len(set(grams)) / len(grams) if grams else math.nan


def repetition_rate(samples: Sequence[TokenIds], n: int = 4) -> float:
    """Share of a sample's n-grams that are repeats, 0 to below 1, averaged over the samples (seq-rep-n).

    A sample of fewer than n tokens has no such share and does not count; nan where none counts.

    Source: Welleck et al. 2020, "Neural Text Generation with Unlikelihood Training".
    """
    check_n(n)
    samples_grams = (list(_ngrams(ids, n)) for ids in _id_lists(samples))
    rates = [1 - len(set(grams)) / len(grams) for grams in samples_grams if grams]
    return math.fsum(rates) / len(rates) if rates else math.nan


def self_bleu(samples: Sequence[TokenIds], n: int = 4) -> float:
    """Mean BLEU-n of each sample against all the others: 0 is nothing in common, 1 is all the same.

    Not smoothed: a sample that shares no n-gram with the others counts 0. (The program of Zhu et al. smooths
    and gives such samples slightly more.) Samples of fewer than n tokens have no n-gram and take no part; nan
    where fewer than two are left. 100 samples of 200 tokens take 10 to 15 s on a CPU core; the time grows
    faster than the square of their number.

    Source: Zhu et al. 2018, "Texygen: A Benchmarking Platform for Text Generation Models".

    Raises InputError for fewer than two samples.
    """
    # Imported here, for it is slow to import and nothing else needs it.
    from torchmetrics.functional.text import bleu_score

    check_n(n)
    if len(samples) < 2:
        raise InputError(f"samples={len(samples)} is too few for self-BLEU: give at least 2 texts to compare")
    id_lists = [ids for ids in _id_lists(samples) if len(ids) >= n]
    if len(id_lists) < 2:
        return math.nan
    # Shortest first: of two references that are equally close in length NLTK measures the brevity by the
    # shorter, torchmetrics by the first, so that the score would depend on the order of the samples.
    texts = [" ".join(map(str, ids)) for ids in sorted(id_lists, key=len)]
    scores = [
        float(bleu_score([text], [texts[:i] + texts[i + 1 :]], n_gram=n)) for i, text in enumerate(texts)
    ]
    return math.fsum(scores) / len(scores)


@dataclass(frozen=True, kw_only=True)
class TextStatistics:
    """What `text_statistics` measures; nan where no sample is long enough.

    Attributes:
        distinct_1, distinct_2, distinct_3: see `distinct_n`; high is varied.
        repetition: see `repetition_rate`, of 4-grams.
        self_bleu: see there, BLEU-4; high is alike. None for fewer than two samples.
        mean_log_probability: nats per token under the model, at most 0.
        perplexity: exp(-mean_log_probability).
    """

    distinct_1: float
    distinct_2: float
    distinct_3: float
    repetition: float
    self_bleu: float | None
    mean_log_probability: float
    perplexity: float


def text_statistics(
    samples: Sequence[TokenIds], log_probabilities: Sequence[Sequence[float] | NDArray[np.floating[Any]]]
) -> TextStatistics:
    """All statistics of the samples, and how likely the model holds them.

    `log_probabilities` are those of each token of each sample under the model, in nats; -inf gives a
    perplexity of inf. The mean is over all tokens, so that a long sample weighs more than a short one.

    Raises InputError for log-probabilities that are nan or positive or of which there are not as many as
    tokens.
    """
    id_lists = _id_lists(samples)
    if len(log_probabilities) != len(id_lists):
        raise InputError(
            f"log_probabilities has {len(log_probabilities)} rows for {len(id_lists)} samples: give one each"
        )
    values: list[float] = []
    for i, (ids, given) in enumerate(zip(id_lists, log_probabilities, strict=True)):
        row = np.asarray(given, dtype=np.float64)
        if row.shape != (len(ids),):
            raise InputError(
                f"log_probabilities[{i}] has the shape {row.shape} for {len(ids)} tokens: give one a token"
            )
        wrong = row[~(row <= ROUNDING_NATS)]  # not `row > ...`, which nan would pass
        if wrong.size:
            raise InputError(
                f"log_probabilities[{i}] holds {wrong[0]}: give natural logarithms, which are at most 0"
            )
        values += row.tolist()
    mean = math.fsum(values) / len(values) if values else math.nan
    with np.errstate(over="ignore"):  # too unlikely a text has a perplexity of inf
        perplexity = float(np.exp(-mean))
    return TextStatistics(
        distinct_1=distinct_n(id_lists, 1),
        distinct_2=distinct_n(id_lists, 2),
        distinct_3=distinct_n(id_lists, 3),
        repetition=repetition_rate(id_lists),
        self_bleu=self_bleu(id_lists) if len(id_lists) >= 2 else None,
        mean_log_probability=mean,
        perplexity=perplexity,
    )


def statistics_lines(completions: Sequence["Completion"]) -> list[str]:
    """The statistics of texts with details, a line each, to be read."""
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


def _id_lists(samples: Sequence[TokenIds]) -> list[list[int]]:
    """The samples as lists of Python's own integers, which hash and print alike whatever they came from."""
    return [checked_token_ids(f"samples[{i}]", sample).tolist() for i, sample in enumerate(samples)]


def _ngrams(ids: list[int], n: int) -> Iterator[tuple[int, ...]]:
    """All runs of n ids, from left to right; none where there are fewer than n."""
    return zip(*(ids[start:] for start in range(n)), strict=False)
