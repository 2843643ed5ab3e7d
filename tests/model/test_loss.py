"""Cross-entropy against sums written out in Python floats, and the published pairs of loss and perplexity."""

# B batch, T time, V vocabulary

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gptpl.model.loss import next_token_loss, perplexity, summed_next_token_loss

BOOK_VOCABULARY = 50257


def by_hand(logits: Tensor, targets: Tensor) -> list[float]:
    """-log softmax at each target that is not -100, one Python float at a time."""
    losses = []
    for row, target in zip(logits.flatten(0, 1).tolist(), targets.flatten().tolist(), strict=True):
        if target != -100:
            losses.append(math.log(sum(math.exp(value) for value in row)) - row[target])
    return losses


def example(shape: tuple[int, int, int], seed: int = 0) -> tuple[Tensor, Tensor]:
    B, T, V = shape
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(shape, generator=generator)  # (B, T, V)
    return logits, torch.randint(0, V, (B, T), generator=generator)


def test_the_mean_of_hand_computed_log_softmax():
    logits, targets = example((2, 5, 7))
    losses = by_hand(logits, targets)
    loss = next_token_loss(logits, targets)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(sum(losses) / 10, abs=1e-6)
    total, count = summed_next_token_loss(logits, targets)
    assert total.item() == pytest.approx(sum(losses), abs=1e-5)
    assert count.item() == 10


def test_ignored_targets_count_neither_in_the_sum_nor_in_the_mean():
    logits, targets = example((2, 5, 7))
    targets[0, 1:3] = -100
    targets[1] = -100
    losses = by_hand(logits, targets)
    assert len(losses) == 3
    assert next_token_loss(logits, targets).item() == pytest.approx(sum(losses) / 3, abs=1e-6)
    total, count = summed_next_token_loss(logits, targets)
    assert total.item() == pytest.approx(sum(losses), abs=1e-6)
    assert count.item() == 3


def test_without_any_target():
    logits, targets = example((1, 3, 4))
    targets[:] = -100
    assert math.isnan(next_token_loss(logits, targets).item())
    assert [value.item() for value in summed_next_token_loss(logits, targets)] == [0, 0]


@pytest.mark.parametrize(("probability", "loss"), [(0.9, 0.105), (0.1, 2.303)])
def test_the_loss_is_the_negative_logarithm_of_the_targets_probability(probability, loss):
    logits = torch.tensor([[[math.log(probability), math.log(1 - probability)]]])
    assert next_token_loss(logits, torch.tensor([[0]])).item() == pytest.approx(loss, abs=5e-4)


@pytest.mark.parametrize("V", [2, 257, BOOK_VOCABULARY])
def test_guessing_evenly_costs_the_logarithm_of_the_vocabulary(V):
    loss = next_token_loss(torch.full((1, 2, V), 1.7), torch.tensor([[0, V - 1]])).item()
    assert loss == pytest.approx(math.log(V), abs=1e-5)
    assert perplexity(loss) == pytest.approx(V, rel=1e-4)


def test_guessing_evenly_in_the_book():
    assert math.log(BOOK_VOCABULARY) == pytest.approx(10.8249, abs=1e-4)


def test_half_precision_logits_are_summed_in_float32():
    """In bfloat16 a sum of 512 losses of about 6 would be a multiple of 16."""
    logits, targets = example((4, 128, 300))
    low = logits.bfloat16()
    exact = by_hand(low.float(), targets)
    assert next_token_loss(low, targets).dtype == torch.float32
    assert next_token_loss(low, targets).item() == pytest.approx(sum(exact) / 512, abs=1e-5)
    total, count = summed_next_token_loss(low, targets)
    assert total.item() == pytest.approx(sum(exact), rel=1e-6)
    assert total.dtype == count.dtype == torch.float64


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_the_mean_over_uneven_batches_is_exact(sizes, draw):
    """Sums and counts give the mean over all targets; a mean of the batches' means would not."""
    total = count = 0.0
    losses: list[float] = []
    for seed, B in enumerate(sizes):
        logits, targets = example((B, 3, 5), seed)
        targets[draw.randrange(B), draw.randrange(3)] = -100
        losses += by_hand(logits, targets)
        sums = summed_next_token_loss(logits, targets)
        total, count = total + sums[0].item(), count + sums[1].item()
    assert total / count == pytest.approx(sum(losses) / len(losses), abs=1e-5)


@pytest.mark.parametrize(
    ("loss", "expected", "rel"),
    [(10.79, 48_725, 0.01), (10.7940, 48_725, 1e-3), (5.0, 148, 5e-3), (2.0, 7.4, 5e-3), (0.5, 1.65, 1e-3)],
)
def test_published_pairs_of_loss_and_perplexity(loss, expected, rel):
    assert perplexity(loss) == pytest.approx(expected, rel=rel)


def test_perplexity_at_the_ends():
    assert perplexity(0.0) == 1.0
    assert perplexity(1e6) == math.inf
    assert math.isnan(perplexity(math.nan))
