"""Embeddings initialised from co-occurrence counts of the training text."""

from typing import Any

import numpy as np
import pytest
import torch

from gptpl.errors import InputError
from gptpl.model import GPTConfig, GPTModel
from gptpl.weights.starting import CooccurrenceWeights, RandomWeights, cooccurrence_vectors, evenly_spread

V, D = 40, 16


def shape(**changes: Any) -> GPTConfig:
    fields: dict[str, Any] = {
        "vocab_size": V,
        "context_length": 8,
        "emb_dim": D,
        "n_heads": 2,
        "n_layers": 1,
        "drop_rate": 0.0,
        "qkv_bias": False,
        "tie_weights": True,
        "init": "gpt2",
    }
    return GPTConfig(**(fields | changes))


def language(length: int = 20_000) -> np.ndarray:
    """Tokens 0 to 29, ten of each of three kinds: any of the next kind follows, each as likely."""
    draws = np.random.default_rng(0).integers(0, 10, length)
    return (draws + 10 * (np.arange(length) % 3)).astype(np.uint16)


def information_by_hand(tokens: list[int], *, size: int, window: int) -> torch.Tensor:
    """Positive pointwise mutual information, pair by pair."""
    met = torch.zeros(size, size, dtype=torch.float64)
    for place, token in enumerate(tokens):
        for distance in range(1, window + 1):
            if place + distance < len(tokens):
                other = tokens[place + distance]
                met[token, other] += 1 / distance
                met[other, token] += 1 / distance
    of_token = met.sum(1)
    company = of_token**0.75 / (of_token**0.75).sum()
    one_way = torch.log(met / (of_token[:, None] * company[None]))
    both = (one_way + one_way.t()) / 2
    return torch.where((met > 0) & (both > 0), both, 0.0)


@pytest.mark.parametrize("window", [1, 3])
def test_dot_products_are_the_information_in_pairs(window):
    """With as many columns as tokens nothing is lost but the signs of the eigenvalues."""
    tokens = np.random.default_rng(1).integers(0, 7, 60)
    vectors = cooccurrence_vectors(tokens, vocab_size=7, size=7, window=window).double()
    values, basis = torch.linalg.eigh(information_by_hand(tokens.tolist(), size=7, window=window))
    expected = basis @ values.abs().diag() @ basis.t()
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(vectors @ vectors.t(), expected, atol=1e-5, rtol=0)


def test_fewer_columns_keep_the_largest():
    tokens = np.random.default_rng(1).integers(0, 9, 80)
    values, basis = torch.linalg.eigh(information_by_hand(tokens.tolist(), size=9, window=2))
    largest = values.abs().argsort(descending=True)[:4]
    vectors = cooccurrence_vectors(tokens, vocab_size=9, size=4, window=2).double()
    expected = basis[:, largest] @ values[largest].abs().diag() @ basis[:, largest].t()
    torch.testing.assert_close(vectors @ vectors.t(), expected, atol=1e-5, rtol=0)


def test_the_largest_are_found_in_a_large_table():
    """Where the random basis does not span everything."""
    sizes = [150, 110, 85, 65, 50, 40, 30, 25, 15, 10, 10, 10]  # of topics: each has an eigenvalue of its own
    draw, firsts = np.random.default_rng(2), np.cumsum([0, *sizes])
    parts = [draw.integers(firsts[topic], firsts[topic + 1], 100) for topic in range(12) for _ in range(25)]
    tokens = np.concatenate(parts)
    values, basis = torch.linalg.eigh(information_by_hand(tokens.tolist(), size=600, window=4))
    largest = values.abs().argsort(descending=True)[:4]
    vectors = cooccurrence_vectors(tokens, vocab_size=600, size=4, window=4).double()
    expected = basis[:, largest] @ values[largest].abs().diag() @ basis[:, largest].t()
    assert (vectors @ vectors.t() - expected).norm() < 0.01 * expected.norm()


def test_a_text_without_information_leaves_random_rows():
    """A token that is alone is no more frequent next to itself than by chance."""
    assert cooccurrence_vectors(np.zeros(50, dtype=np.int64), vocab_size=3, size=2, window=2).eq(0).all()


def test_tokens_of_one_kind_begin_side_by_side():
    weights = CooccurrenceWeights()
    weights.read_text(language())
    torch.manual_seed(3)
    net, start = weights.make_model(shape())
    rows = torch.nn.functional.normalize(net.tok_emb.weight[:30].detach())
    alike = (rows @ rows.t()).view(3, 10, 3, 10).mean((1, 3))  # of the kinds
    assert alike.diag().min() > alike.fill_diagonal_(0).max() + 0.3
    assert start == {"init": "cooccurrence", "std": 0.1, "window": 4, "counted_tokens": 20_000_000}


@pytest.mark.parametrize("tie_weights", [True, False])
def test_unseen_tokens_and_all_else_are_as_drawn(tie_weights):
    torch.manual_seed(3)
    random, _ = RandomWeights().make_model(shape(tie_weights=tie_weights))
    after = torch.rand(())
    weights = CooccurrenceWeights(std=0.2)
    weights.read_text(language())
    torch.manual_seed(3)
    net, _ = weights.make_model(shape(tie_weights=tie_weights))
    assert torch.rand(()).equal(after)  # no number of the run's generator is taken
    changed = {"tok_emb.weight", "out_head.weight"}
    for name, tensor in net.state_dict().items():
        drawn = random.state_dict()[name]
        if name not in changed:
            assert tensor.equal(drawn), name
            continue
        assert tensor[30:].equal(drawn[30:])
        assert not torch.isclose(tensor[:30], drawn[:30]).all(1).any()
        rms = tensor[:30].square().mean(1).sqrt()
        torch.testing.assert_close(rms, torch.full((30,), 0.2))
    if not tie_weights:
        both = net.tok_emb.weight[:30], net.out_head.weight[:30]
        torch.testing.assert_close(*map(torch.nn.functional.normalize, both))


def test_a_vocabulary_smaller_than_the_model_leaves_columns_empty():
    vectors = cooccurrence_vectors(np.arange(50) % 5, vocab_size=6, size=D, window=2)
    assert vectors.shape == (6, D)
    assert vectors[:, 6:].eq(0).all()
    assert vectors[5].eq(0).all()  # token 5 is not in the text
    assert vectors[:5].norm(dim=1).gt(0).all()


def test_it_is_the_same_again_and_whatever_was_drawn_before():
    tokens = language(500).astype(np.int64)
    torch.manual_seed(1)
    first = cooccurrence_vectors(tokens, vocab_size=V, size=4, window=2)
    torch.manual_seed(2)
    assert cooccurrence_vectors(tokens, vocab_size=V, size=4, window=2).equal(first)


def test_a_long_text_is_counted_in_places_all_over_it(caplog):
    tokens = np.arange(100_000)
    kept = evenly_spread(tokens, 6_400)
    assert len(kept) == 6_400
    assert kept[0] == 0
    assert kept[-1] > 98_000
    assert np.diff(kept).max() < 2 * 100_000 / 64  # no larger hole
    assert np.array_equal(evenly_spread(tokens, 100_000), tokens)
    caplog.set_level("INFO")
    CooccurrenceWeights(counted_tokens=6_400).read_text(tokens)
    assert "init=cooccurrence counts 6,400 of 100,000 tokens" in caplog.text


def test_text_too_short_for_a_pair_leaves_random_rows():
    weights = CooccurrenceWeights()
    weights.read_text(np.array([3]))
    torch.manual_seed(3)
    net, _ = weights.make_model(shape())
    torch.manual_seed(3)
    assert net.tok_emb.weight.equal(GPTModel(shape()).tok_emb.weight)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"std": 0.0}, "init.std must be positive, got 0.0"),
        ({"window": 0}, "init.window must be a positive whole number, got 0"),
        ({"counted_tokens": -1}, "init.counted_tokens must be a positive whole number, got -1"),
    ],
)
def test_numbers_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        CooccurrenceWeights(**settings)


def test_a_model_with_large_random_positions_is_refused():
    CooccurrenceWeights().check(shape(), {})
    with pytest.raises(InputError, match=r"init=cooccurrence needs model\.init=gpt2, got torch"):
        CooccurrenceWeights().check(shape(init="torch"), {})


def test_without_a_text_it_is_refused():
    with pytest.raises(InputError, match="init=cooccurrence has read no text: call read_text first"):
        CooccurrenceWeights().make_model(shape())


def test_a_model_of_another_class_is_refused():
    weights = CooccurrenceWeights()
    weights.read_text(language(100))
    with pytest.raises(InputError, match=r"init=cooccurrence is for a GPTModel, not \S*Embedding"):
        weights.fill(torch.nn.Embedding(3, 3), {}, {})
