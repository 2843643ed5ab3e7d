"""The models of conf/ are the published ones, by their fields and by their sizes."""

import pytest
import torch

from gptpl.config.groups import choices
from gptpl.model import GPTConfig, GPTModel, count_parameters

# Parameters, and the size of the fp32 weights in GB.
PUBLISHED = {
    "gpt_124m": (162_419_712, 0.6),
    "gpt2_small": (124_439_808, 0.5),
    "gpt2_medium": (354_823_168, 1.4),
    "gpt2_large": (774_030_080, 3.1),
    "gpt2_xl": (1_557_611_200, 6.2),
}


FIELDS = {
    "gpt_124m": (50257, 256, 768, 12, 12, 0.1, False, False),
    "gpt2_small": (50257, 1024, 768, 12, 12, 0.1, True, True),
    "gpt2_medium": (50257, 1024, 1024, 16, 24, 0.1, True, True),
    "gpt2_large": (50257, 1024, 1280, 20, 36, 0.1, True, True),
    "gpt2_xl": (50257, 1024, 1600, 25, 48, 0.1, True, True),
}


def fields(c: GPTConfig) -> tuple[object, ...]:
    """What `FIELDS` lists."""
    sizes = (c.vocab_size, c.context_length, c.emb_dim, c.n_heads, c.n_layers)
    return (*sizes, c.drop_rate, c.qkv_bias, c.tie_weights)


def parameters_by_hand(c: GPTConfig) -> int:
    """The sum over the layers of the architecture."""
    D = c.emb_dim
    head = 0 if c.tie_weights else c.vocab_size * D
    if c.position == "rope":  # no table, no biases; three matrices of 8/3 D, rounded up to 64, and RMSNorm
        width = -(-8 * D // 192) * 64
        return c.vocab_size * D + c.n_layers * (4 * D * D + 3 * D * width + 2 * D) + D + head
    attention = D * 3 * D + (3 * D if c.qkv_bias else 0) + D * D + D
    feed_forward = D * 4 * D + 4 * D + 4 * D * D + D
    blocks = c.n_layers * (attention + feed_forward + 2 * 2 * D)
    return c.vocab_size * D + c.context_length * D + blocks + 2 * D + head


@pytest.mark.parametrize("choice", choices("model"))
def test_models_have_the_published_sizes_and_fields(choice, compose):
    config = GPTConfig(**compose("train", f"model={choice}").model)
    count = count_parameters(config)
    assert count.total == parameters_by_hand(config)
    if choice in PUBLISHED:
        total, gigabytes = PUBLISHED[choice]
        assert fields(config) == FIELDS[choice]
        assert count.total == total
        assert count.fp32_bytes / 1e9 == pytest.approx(gigabytes, abs=0.05)
    with torch.device("meta"):
        net = GPTModel(config)
    assert net(torch.zeros(1, 2, dtype=torch.long, device="meta")).shape == (1, 2, config.vocab_size)
