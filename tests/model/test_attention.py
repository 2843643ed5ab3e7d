"""MultiHeadAttention against attention written out head by head, and its dropout."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from gptpl.model import GPTConfig, MultiHeadAttention

CONFIG = GPTConfig(
    vocab_size=11, context_length=16, emb_dim=12, n_heads=3, n_layers=1, drop_rate=0.0, qkv_bias=True
)


def attend_by_hand(attention: MultiHeadAttention, x: Tensor, *, n_heads: int) -> Tensor:
    """For every row, head and position: weights from the dot products with the positions so far."""
    B, T, D = x.shape
    width = D // n_heads
    query, key, value = attention.qkv(x).split(D, dim=-1)
    mixed = torch.zeros_like(x)
    for b in range(B):
        for head in range(n_heads):
            part = slice(head * width, (head + 1) * width)
            for t in range(T):
                scores = key[b, : t + 1, part] @ query[b, t, part] / math.sqrt(width)
                mixed[b, t, part] = torch.softmax(scores, dim=0) @ value[b, : t + 1, part]
    return attention.out_proj(mixed)


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_equals_attention_written_out(qkv_bias: bool) -> None:
    torch.manual_seed(0)
    attention = MultiHeadAttention(replace(CONFIG, qkv_bias=qkv_bias)).eval()
    x = torch.randn(2, 7, 12)
    with torch.no_grad():
        torch.testing.assert_close(attention(x), attend_by_hand(attention, x, n_heads=3), rtol=0, atol=1e-6)


def test_the_fused_projection_draws_the_numbers_of_three_layers() -> None:
    book = replace(CONFIG, emb_dim=768, n_heads=12, qkv_bias=False)
    torch.manual_seed(123)
    attention = MultiHeadAttention(book)
    torch.manual_seed(123)
    separate = [nn.Linear(768, 768, bias=False) for _ in ("query", "key", "value")]
    out_proj = nn.Linear(768, 768)
    assert torch.equal(attention.qkv.weight, torch.cat([layer.weight for layer in separate]))
    assert torch.equal(attention.out_proj.weight, out_proj.weight)
    assert torch.equal(attention.out_proj.bias, out_proj.bias)


def test_dropout_thins_the_attention_weights_in_training_only() -> None:
    torch.manual_seed(0)
    attention = MultiHeadAttention(replace(CONFIG, drop_rate=0.3))
    x = torch.randn(1, 5, 12)
    many = x.expand(20_000, -1, -1)
    with torch.no_grad():
        expected = attention.eval()(x)
        assert torch.equal(attention(x), expected)
        draws = attention.train()(many)
    assert draws.std(dim=0).min() > 0.01
    # What survives is scaled by 1 / (1 - p) and the output is linear in the weights: the mean is unchanged.
    torch.testing.assert_close(draws.mean(dim=0, keepdim=True), expected, rtol=0, atol=0.02)
    # The first position sees itself alone: if all three heads drop that weight, the bias is all that is left.
    silent = (draws[:, 0] - attention.out_proj.bias).abs().amax(dim=-1) < 1e-6
    assert silent.float().mean().item() == pytest.approx(0.3**3, abs=0.01)
