"""Sampling rules against the book's nine-token example, sorted lists and counted draws."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gptpl.generation import SamplingRules
from gptpl.generation import next_token as choose
from gptpl.generation.sampling import (
    keep_top_k,
)

# "closer every effort forward inches moves pizza toward you"
LOGITS = torch.tensor([4.51, 0.89, -1.90, 6.75, 1.63, -1.62, -1.89, 6.28, 1.79])

# Few whole numbers: many ties.
tied_rows = st.lists(st.integers(-2, 2), min_size=1, max_size=12)


def next_token(
    logits: Tensor, *, temperature: float, top_k: int | None = None, generator: torch.Generator | None = None
) -> Tensor:
    return choose(logits, SamplingRules(temperature=temperature, top_k=top_k), generators=generator)


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def softmax(logits: list[float]) -> list[float]:
    weights = [math.exp(logit) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def frequencies(rows: int, *, temperature: float, top_k: int | None = None) -> list[float]:
    tokens = next_token(LOGITS.expand(rows, -1), temperature=temperature, top_k=top_k, generator=draw())
    return (torch.bincount(tokens, minlength=9) / rows).tolist()


def test_greedy_picks_forward() -> None:
    assert next_token(LOGITS[None], temperature=0).tolist() == [3]


def test_a_thousand_draws_are_the_books() -> None:
    torch.manual_seed(123)
    draws = [int(next_token(LOGITS[None], temperature=1.0)) for _ in range(1000)]
    assert [draws.count(token) for token in range(9)] == [73, 0, 0, 582, 2, 0, 0, 343, 0]


def test_top_3_keeps_forward_toward_closer() -> None:
    kept = keep_top_k(LOGITS, 3)
    survivors = [0, 3, 7]
    assert kept.isfinite().nonzero().flatten().tolist() == survivors
    assert torch.equal(kept[survivors], LOGITS[survivors])
    assert kept.argsort(descending=True)[:3].tolist() == [3, 7, 0]


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (5.0, None), (0.5, 4), (5.0, 3)])
def test_tokens_come_as_often_as_their_probability(temperature: float, top_k: int | None) -> None:
    logits = LOGITS.tolist()
    last_kept = sorted(logits, reverse=True)[(top_k or 9) - 1]
    expected = softmax([x / temperature if x >= last_kept else -math.inf for x in logits])
    counted = frequencies(40_000, temperature=temperature, top_k=top_k)
    assert counted == pytest.approx(expected, abs=0.01)  # four standard errors
    assert all(share == 0 for share, chance in zip(counted, expected, strict=True) if chance == 0)


@given(row=tied_rows, data=st.data())
def test_exactly_k_survive_and_ties_go_to_the_lowest_ids(row: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(row)))
    best_first = sorted(range(len(row)), key=lambda token: (-row[token], token))
    expected = torch.tensor(
        [float(row[token]) if token in best_first[:k] else -math.inf for token in range(len(row))]
    )
    assert torch.equal(keep_top_k(torch.tensor(row, dtype=torch.float32), k), expected)


@given(
    rows=st.integers(1, 5).flatmap(
        lambda width: st.lists(
            st.lists(st.integers(-2, 2), min_size=width, max_size=width), min_size=1, max_size=4
        )
    ),
    temperature=st.floats(0.01, 100),
    seed=st.integers(0, 2**32),
)
def test_top_1_is_greedy_and_top_v_is_temperature_alone(
    rows: list[list[int]], temperature: float, seed: int
) -> None:
    logits = torch.tensor(rows, dtype=torch.float32)
    greedy = next_token(logits, temperature=0)
    assert greedy.tolist() == [row.index(max(row)) for row in rows]
    assert torch.equal(next_token(logits, temperature=temperature, top_k=1, generator=draw(seed)), greedy)
    everything = next_token(logits, temperature=temperature, top_k=logits.shape[1], generator=draw(seed))
    assert torch.equal(everything, next_token(logits, temperature=temperature, generator=draw(seed)))


def test_rows_are_treated_one_by_one() -> None:
    logits = torch.stack([LOGITS, LOGITS.flip(0), -LOGITS])
    assert next_token(logits, temperature=0).tolist() == [3, 5, 2]
    assert torch.equal(keep_top_k(logits, 4), torch.stack([keep_top_k(row, 4) for row in logits]))


@pytest.mark.parametrize("temperature", [1e-6, 2e-38, 1e-38, 1e-300, 5e-324])
def test_a_tiny_temperature_is_greedy_not_nan(temperature: float) -> None:
    assert next_token(1e3 * LOGITS[None], temperature=temperature, generator=draw()).tolist() == [3]


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_the_arguments_stay_as_they_are(temperature: float) -> None:
    logits = LOGITS[None].clone()
    next_token(logits, temperature=temperature, top_k=2, generator=draw())
    assert torch.equal(logits, LOGITS[None])


def test_half_precision_logits_can_be_drawn_from() -> None:
    tokens = next_token(LOGITS.bfloat16().expand(100, -1), temperature=1.0, generator=draw())
    assert set(tokens.tolist()) <= {0, 3, 4, 7}


def test_the_generator_decides() -> None:
    logits = torch.zeros(50, 9)
    first, again = (next_token(logits, temperature=1.0, generator=draw(7)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, next_token(logits, temperature=1.0, generator=draw(8)))


@pytest.mark.parametrize(("temperature", "generator"), [(0.0, None), (1.0, draw())])
def test_global_randomness_is_left_alone(temperature: float, generator: torch.Generator | None) -> None:
    before = torch.get_rng_state()
    next_token(LOGITS[None], temperature=temperature, top_k=3, generator=generator)
    assert torch.equal(torch.get_rng_state(), before)
