"""The memorisation meter: how much of a generated text stands word for word in the training text.

Only verbatim overlap counts, in tokens: a lower bound on what a model has memorised, for a copy with one word
changed goes unseen. And some overlap is to be expected, since common phrases are in every text: compare with
the overlap of held-out text.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gptpl.errors import InputError
from gptpl.evaluation.statistics import TokenIds, check_n, checked_token_ids

if TYPE_CHECKING:
    from gptpl.generation.text import Completion


class TrainingText:
    """The training tokens, (N,) ids, indexed once so that all positions of a token can be looked up.

    One stream: a run may cross the border of two documents, as it may in the sequences that a model is
    trained on. The index takes 8 bytes a token, and `match_lengths` another 4 while it runs.

    Raises InputError unless they are one-dimensional whole numbers and at least one.
    """

    def __init__(self, tokens: TokenIds) -> None:
        tokens = checked_token_ids("the training text", tokens)
        if tokens.size == 0:
            raise InputError("the training text has 0 tokens: give the tokens that the model was trained on")
        if tokens.min() >= 0 and tokens.max() < 2**16:  # GPT-2's are, and numpy sorts 16 bits in linear time
            tokens = tokens.astype(np.uint16)
        self.tokens = tokens.size
        """How many there are."""
        self._positions = np.argsort(tokens, kind="stable")  # (N,) by token, then from left to right
        ordered = tokens[self._positions]
        starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]).tolist()
        slices = map(slice, starts, [*starts[1:], tokens.size])
        self._slices = dict(zip(ordered[starts].tolist(), slices, strict=True))

    def positions(self, token: int) -> NDArray[np.intp]:
        """Where the token stands in the training text, ascending; empty where it never does."""
        return self._positions[self._slices.get(token, slice(0))]

    def match_lengths(self, sample: TokenIds) -> NDArray[np.int64]:
        """For each position i of the sample the greatest L for which sample[i:i+L] is in the training text.

        The time is that of visiting all training positions of every token of the sample, however long the
        matches are: some 2 s on a CPU core for 1,000 tokens against 10 million with a vocabulary like
        GPT-2's, 6 s where the tokens are characters.

        Raises InputError unless the sample is a sequence of token ids.
        """
        ids = checked_token_ids("the sample", sample).tolist()
        ending = np.zeros(
            len(ids), dtype=np.int64
        )  # of the longest match that ends with position j, inclusive
        # run[p + 1]: the tokens before p + 1 in the training text that match those up to j in the sample. By
        # one further, so that run[0] = 0 is what stands before the first token.
        run = np.zeros(self.tokens + 1, dtype=np.int32)
        before = np.empty(0, dtype=np.intp)  # where run is not 0
        for j, token in enumerate(ids):
            here = self.positions(token)
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
    """What a sample has word for word from the training text.

    Attributes:
        longest_run: tokens of the longest run of the sample that is in the training text.
        longest_start: where it starts in the sample, the first of equals; 0 where longest_run is 0.
        shares: n -> share of the sample's n-grams that are in the training text, 0 to 1; nan where the sample
            has fewer than n tokens.
    """

    longest_run: int
    longest_start: int
    shares: Mapping[int, float]


def memorisation(
    sample: TokenIds, training: TrainingText, n_values: Sequence[int] = (4, 8, 16)
) -> Memorisation:
    """The longest run that the sample shares with the training text, and the shares of its n-grams there.

    Give the sample without its prompt, which the model has not made.

    Source: Carlini et al. 2023, "Quantifying Memorization Across Neural Language Models" (verbatim runs);
    McCoy et al. 2023, "How Much Do Language Models Copy From Their Training Data?" (n-grams; their novelty
    is 1 - share).

    Raises InputError unless every n >= 1 and the sample is a sequence of token ids.
    """
    for n in n_values:
        check_n(n)
    lengths = training.match_lengths(sample)
    start = int(lengths.argmax()) if lengths.size else 0
    shares = {}
    for n in n_values:
        grams = lengths[: max(0, len(lengths) - n + 1)]  # one from each start that has n tokens left
        shares[n] = float((grams >= n).mean()) if grams.size else math.nan
    return Memorisation(longest_run=int(lengths.max(initial=0)), longest_start=start, shares=shares)


def memorisation_lines(
    completions: Sequence["Completion"], training: TrainingText, *, decode: Callable[[Sequence[int]], str]
) -> list[str]:
    """What several texts have word for word from the training text: a line a text, to be read."""
    lines = [f"in the training text of {training.tokens:,} tokens word for word:"]
    for number, completion in enumerate(completions, start=1):
        found = memorisation(completion.tokens, training)
        run = decode(completion.tokens[found.longest_start : found.longest_start + found.longest_run])
        shares = [f", {share:.0%} of its {n}-grams" for n, share in found.shares.items() if share >= 0]
        lines.append(f"  text {number}: {found.longest_run} tokens in a row ({run!r}){''.join(shares)}")
    return lines
