"""count_parameters agrees with arithmetic, published sizes and real models, and allocates nothing."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from gptpl.model import (
    ClassifierConfig,
    GPTClassifier,
    GPTConfig,
    GPTModel,
    count_parameters,
    parameters_of,
)


def gpt2(emb_dim: int, n_heads: int, n_layers: int) -> GPTConfig:
    return GPTConfig(
        vocab_size=50257,
        context_length=1024,
        emb_dim=emb_dim,
        n_heads=n_heads,
        n_layers=n_layers,
        drop_rate=0.1,
        qkv_bias=True,
        tie_weights=True,
    )


BOOK = replace(gpt2(768, 12, 12), context_length=256, qkv_bias=False, tie_weights=False)
TINY = GPTConfig(
    vocab_size=11, context_length=5, emb_dim=6, n_heads=2, n_layers=3, drop_rate=0.0, qkv_bias=True
)


def by_hand(config: GPTConfig, *, tied: bool) -> int:
    """Weights and biases of every layer, added up from the description of the architecture."""
    V, C, D, L = config.vocab_size, config.context_length, config.emb_dim, config.n_layers
    layer_norm = D + D
    query_key_value = 3 * (D * D + (D if config.qkv_bias else 0))
    out_projection = D * D + D
    feed_forward = (D * 4 * D + 4 * D) + (4 * D * D + D)
    block = 2 * layer_norm + query_key_value + out_projection + feed_forward
    return V * D + C * D + L * block + layer_norm + (0 if tied else V * D)


@pytest.mark.parametrize(
    ("config", "total", "gigabytes"),
    [
        pytest.param(BOOK, 162_419_712, 0.6, id="book"),
        pytest.param(gpt2(768, 12, 12), 124_439_808, 0.5, id="small"),
        pytest.param(gpt2(1024, 16, 24), 354_823_168, 1.4, id="medium"),
        pytest.param(gpt2(1280, 20, 36), 774_030_080, 3.1, id="large"),
        pytest.param(gpt2(1600, 25, 48), 1_557_611_200, 6.2, id="xl"),
    ],
)
def test_published_sizes(config: GPTConfig, total: int, gigabytes: float) -> None:
    count = count_parameters(config)
    assert count.total == total
    assert count.tied == by_hand(config, tied=True)
    assert count.untied == by_hand(config, tied=False)
    assert count.total == (count.tied if config.tie_weights else count.untied)
    assert round(count.fp32_bytes / 1e9, 1) == gigabytes


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_a_real_model_has_as_many(tied: bool, qkv_bias: bool) -> None:
    config = replace(TINY, tie_weights=tied, qkv_bias=qkv_bias)
    parameters = list(GPTModel(config).parameters())
    count = count_parameters(config)
    assert count.total == sum(parameter.numel() for parameter in parameters)
    assert count.fp32_bytes == sum(parameter.nbytes for parameter in parameters)


@pytest.mark.parametrize("init", ["torch", "gpt2"])
def test_counting_spends_neither_memory_nor_random_numbers(init: Any) -> None:
    terabytes = replace(TINY, emb_dim=2**20, init=init)  # 150 TB of weights, were they allocated
    before = torch.get_rng_state()
    assert count_parameters(terabytes).total == by_hand(terabytes, tied=False)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head_bias", [False, True])
def test_a_classifier_is_counted_with_its_own_head(tied: bool, head_bias: bool) -> None:
    config = GPTConfig(
        vocab_size=90, context_length=16, emb_dim=24, n_heads=2, n_layers=2, qkv_bias=True, tie_weights=tied
    )
    net = GPTClassifier(config, ClassifierConfig(n_classes=3, head_bias=head_bias))
    assert parameters_of(net) == sum(parameter.numel() for parameter in net.parameters())
    assert parameters_of(GPTModel(config)) == sum(p.numel() for p in GPTModel(config).parameters())
