"""Filters, penalties and draws by their definitions, written out in plain Python, and by counting."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gptpl.errors import InputError
from gptpl.generation import SamplingRules, next_token, reshape_logits
from gptpl.generation.sampling import (
    NO_TOKEN,
    ban_tokens,
    draw,
    force_token,
    keep_min_p,
    keep_top_p,
    keep_typical,
    penalise_frequency,
    penalise_repetition,
    token_counts,
)

LOGITS = torch.tensor([4.51, 0.89, -1.90, 6.75, 1.63, -1.62, -1.89, 6.28, 1.79])

rows = st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=1, max_size=10)
shares = st.floats(0.01, 1.0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def softmax(logits: list[float]) -> list[float]:
    weights = [math.exp(logit - max(logits)) for logit in logits]
    return [weight / math.fsum(weights) for weight in weights]


def kept(logits: Tensor) -> set[int]:
    return set((logits > -math.inf).nonzero().flatten().tolist())


def smallest_set(order: list[int], p: list[float], mass: float) -> tuple[set[int], bool]:
    """The first tokens of the order that reach the mass, and whether rounding could decide which they are."""
    total = 0.0
    chosen: set[int] = set()
    for token in order:
        if chosen and abs(total - mass) < 1e-5:
            return chosen, True
        if chosen and total >= mass:
            return chosen, False
        chosen.add(token)
        total += p[token]
    return chosen, abs(total - mass) < 1e-5


# --- filters by their definitions ---------------------------------------------------------------------


@given(row=rows, mass=shares)
def test_top_p_keeps_the_fewest_likely_tokens_that_reach_p(row: list[float], mass: float) -> None:
    p = softmax(row)
    order = sorted(range(len(row)), key=lambda token: (-row[token], token))
    expected, uncertain = smallest_set(order, p, mass)
    found = keep_top_p(torch.tensor(row), mass)
    assert uncertain or kept(found) == expected or mass == 1
    assert order[0] in kept(found)
    assert all(found[token] == row[token] for token in kept(found))


@given(row=rows, share=st.floats(0.0, 1.0))
def test_min_p_keeps_what_is_likely_enough(row: list[float], share: float) -> None:
    p = softmax(row)
    found = kept(keep_min_p(torch.tensor(row), share))
    for token, chance in enumerate(p):
        if abs(chance - share * max(p)) > 1e-5:
            assert (token in found) == (chance > share * max(p))
    assert row.index(max(row)) in found


@given(row=rows, mass=shares)
def test_typical_keeps_the_tokens_of_typical_surprise(row: list[float], mass: float) -> None:
    p = softmax(row)
    entropy = -math.fsum(chance * math.log(chance) for chance in p)
    distance = [abs(-math.log(chance) - entropy) for chance in p]
    near = [(round(each, 4), token) for token, each in enumerate(distance)]
    expected, uncertain = smallest_set([token for _, token in sorted(near)], p, mass)
    if uncertain or mass == 1 or len({each for each, _ in near}) < len({*row}):
        return  # rounding decides
    assert kept(keep_typical(torch.tensor(row), mass)) == expected


@given(row=rows, mass=shares)
def test_filters_work_row_by_row(row: list[float], mass: float) -> None:
    logits = torch.tensor([row, row[::-1], [-each for each in row]])
    for rule in (keep_top_p, keep_min_p, keep_typical):
        assert torch.equal(rule(logits, mass), torch.stack([rule(each, mass) for each in logits]))


def test_limits_of_one_change_nothing() -> None:
    for rule in (keep_top_p, keep_typical):
        assert torch.equal(rule(LOGITS, 1.0), LOGITS)
    assert torch.equal(keep_min_p(LOGITS, 0.0), LOGITS)


def test_tokens_already_let_out_stay_out() -> None:
    logits = LOGITS.clone()
    logits[3] = -math.inf
    for rule in (keep_top_p, keep_min_p, keep_typical):
        found = rule(logits, 0.9)
        assert 3 not in kept(found)
        assert kept(found)
        assert not found.isnan().any()


# --- penalties ----------------------------------------------------------------------------------------


@given(row=rows, data=st.data(), penalty=st.floats(0.1, 5.0))
def test_penalties_by_their_formulas(row: list[float], data: Any, penalty: float) -> None:
    tokens = data.draw(st.lists(st.integers(0, len(row) - 1), max_size=6))
    logits, padded = torch.tensor([row]), torch.tensor([[*tokens, NO_TOKEN]])
    counts = Counter(tokens)
    repeated = [
        (x * penalty if x < 0 else x / penalty) if counts[token] else x for token, x in enumerate(row)
    ]
    torch.testing.assert_close(penalise_repetition(logits, padded, penalty)[0], torch.tensor(repeated))
    frequent = [x - penalty * counts[token] - 0.5 * (counts[token] > 0) for token, x in enumerate(row)]
    found = penalise_frequency(logits, padded, frequency=penalty, presence=0.5)
    torch.testing.assert_close(found[0], torch.tensor(frequent))
    assert token_counts(padded, len(row)).tolist() == [[counts[token] for token in range(len(row))]]


def test_bans_and_forced_tokens() -> None:
    assert kept(ban_tokens(LOGITS, [3, 7])) == set(range(9)) - {3, 7}
    assert torch.equal(ban_tokens(LOGITS, []), LOGITS)
    assert kept(force_token(LOGITS, 2)) == {2}
    banned = SamplingRules(temperature=1.0, top_k=2, banned_tokens=(3,))
    assert kept(reshape_logits(LOGITS[None], banned)[0]) == {0, 7}


# --- draws --------------------------------------------------------------------------------------------

rules = st.builds(
    SamplingRules,
    temperature=st.floats(0.05, 20),
    top_k=st.none() | st.integers(1, 9),
    top_p=st.none() | shares,
    min_p=st.none() | st.floats(0, 1),
    typical_p=st.none() | shares,
    repetition_penalty=st.floats(0.5, 3),
    frequency_penalty=st.floats(-2, 2),
    banned_tokens=st.sets(st.integers(0, 8), max_size=8).map(tuple),
)


@settings(max_examples=80)
@given(rules=rules, seed=st.integers(0, 2**32 - 1))
def test_whatever_the_rules_probabilities_sum_to_one_and_no_masked_token_is_drawn(
    rules: SamplingRules, seed: int
) -> None:
    logits = 5 * torch.randn(4, 9, generator=seeded(seed))
    tokens = torch.randint(9, (4, 5), generator=seeded(seed))
    reshaped = reshape_logits(logits, rules, tokens=tokens, written=tokens)
    probabilities = reshaped.softmax(dim=-1)
    torch.testing.assert_close(probabilities.sum(dim=-1), torch.ones(4))
    chosen = next_token(logits, rules, tokens=tokens, written=tokens, generators=seeded(seed))
    assert (probabilities.gather(-1, chosen[:, None]) > 0).all()
    assert not set(chosen.tolist()) & set(rules.banned_tokens)


CHI_SQUARE_LIMITS = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32, 8: 26.12}
"""Exceeded with probability 0.001, by degrees of freedom (any table of the distribution)."""


@pytest.mark.parametrize(
    "rules",
    [
        SamplingRules(temperature=1.0),
        SamplingRules(temperature=3.0, top_k=6),
        SamplingRules(temperature=5.0, top_p=0.8),
        SamplingRules(temperature=2.0, min_p=0.05, banned_tokens=(3,)),
        SamplingRules(temperature=5.0, typical_p=0.6),
    ],
)
def test_frequencies_pass_a_chi_square_test(rules: SamplingRules) -> None:
    n = 20_000
    expected = n * reshape_logits(LOGITS[None], rules)[0].double().softmax(-1)
    counted = next_token(LOGITS.expand(n, -1), rules, generators=seeded(1)).bincount(minlength=9)
    alone = torch.tensor([int(next_token(LOGITS[None], rules, generators=[g])) for g in [seeded(2)] * 2000])
    for counts, share in ((counted, 1.0), (alone.bincount(minlength=9), 0.1)):
        often = expected * share >= 5  # the test's own condition; rarer tokens are taken together
        pairs = [(float(c), float(e)) for c, e in zip(counts[often], expected[often] * share, strict=True)]
        rare = (float(counts[~often].sum()), float(expected[~often].sum() * share))
        pairs += [rare] if rare[1] >= 1 else []
        assert sum(counts[expected == 0]) == 0
        statistic = sum((c - e) ** 2 / e for c, e in pairs)
        assert statistic < CHI_SQUARE_LIMITS[len(pairs) - 1]


def test_each_row_draws_from_its_own_generator() -> None:
    logits = LOGITS.expand(3, -1) / 5
    together = [draw(logits, [seeded(7), seeded(8), seeded(7)]).tolist() for _ in range(2)]
    assert together[0] == together[1]
    assert together[0][0] == together[0][2] == int(draw(logits[:1], [seeded(7)]))
    assert together[0][1] == int(draw(logits[:1], seeded(8)))


# --- bad input, names ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -0.5}, "temperature must be 0 (greedy) or a positive number, got -0.5"),
        ({"temperature": math.nan}, "got nan"),
        ({"temperature": True}, "temperature must be 0 (greedy) or a positive number, got True"),
        ({"temperature": None}, "temperature must be 0 (greedy) or a positive number, got None"),
        ({"top_k": 0}, "top_k must be a positive whole number or null, got 0"),
        ({"top_k": 2.5}, "number or null, got 2.5"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, or null, got 0.0"),
        ({"top_p": 1.01}, "got 1.01"),
        ({"top_p": "high"}, "top_p must be above 0 and at most 1, or null, got 'high'"),
        ({"min_p": -0.1}, "min_p must be from 0 to 1, or null, got -0.1"),
        ({"typical_p": math.nan}, "typical_p must be above 0 and at most 1, or null, got nan"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a positive number (1: no penalty), got 0"),
        ({"repetition_penalty": math.inf}, "got inf"),
        (
            {"frequency_penalty": math.inf},
            "frequency_penalty must be a finite number (0: no penalty)",
        ),
        ({"presence_penalty": math.nan}, "presence_penalty must be a finite number (0: no penalty), got nan"),
        ({"banned_tokens": 5}, "banned_tokens must be a list of token ids, such as [50256], got 5"),
        ({"forced_tokens": ["a"]}, "such as [50256], got ['a']"),
        ({"forced_tokens": ""}, "such as [50256], got ''"),
    ],
)
def test_values_out_of_range_are_named_in_one_line(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as error:
        SamplingRules(**settings)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("rules", "name"),
    [
        (SamplingRules(), "greedy"),
        (SamplingRules(top_k=5, repetition_penalty=1.2), "greedy, repetition penalty 1.2"),
        (SamplingRules(temperature=0.8, top_k=40), "temperature 0.8, top-k 40"),
        (
            SamplingRules(temperature=1, top_p=0.9, banned_tokens=(1, 2)),
            "temperature 1, top-p 0.9, banned tokens 1 2",
        ),
    ],
)
def test_rules_have_a_name(rules: SamplingRules, name: str) -> None:
    assert rules.name == name
    assert SamplingRules.of(rules.changes) == rules
