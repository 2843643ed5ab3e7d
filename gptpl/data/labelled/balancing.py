"""Two ways to give rare classes their due: fewer examples of the others, or a larger weight in the loss."""

from collections.abc import Sequence

import numpy as np

from gptpl.data.labelled.examples import Example, label_counts


def undersample(examples: Sequence[Example], *, seed: int) -> list[Example]:
    """As many examples of every class as the smallest has, class after class in alphabetical order.

    They are drawn as pandas' `DataFrame.sample(n, random_state=seed)` draws them, without replacement, from
    each class that is larger; the smallest keeps its order. For two classes of which the first is larger this
    is the book's `create_balanced_dataset`.
    """
    counts = label_counts(examples)
    least = min(counts.values())
    chosen: list[Example] = []
    for label, count in counts.items():
        members = [example for example in examples if example.label == label]
        if count > least:
            # A generator for every class, as the book's call has; RandomState, for pandas uses it.
            order = np.random.RandomState(seed).permutation(count)[:least]
            members = [members[i] for i in order]
        chosen += members
    return chosen


def inverse_frequency_weights(counts: Sequence[int]) -> list[float]:
    """Weights w_c = N / (C n_c) of C classes with n_c of N examples: in the sum every class counts the same.

    The mean weight of an example is 1 (scikit-learn's `class_weight="balanced"`).
    """
    return [sum(counts) / (len(counts) * count) for count in counts]
