"""The attention kernels against attention in float64, position by position."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gptpl.generation import Decoding, SamplingRules
from gptpl.model import GPTConfig, GPTModel
from gptpl.model import attention_kernels as module
from gptpl.model.attention_kernels import Kernel, blocked_attention, chosen_kernel
from gptpl.model.gpt import MultiHeadAttention, causal_attention, explicit_attention

KERNELS: tuple[Kernel, ...] = ("blocked", "sdpa", "explicit")


def exact(qkv: Tensor, n_heads: int) -> Tensor:
    """(B, T, 3 D) -> (B, T, D) in float64."""
    _, T, width = qkv.shape
    D = width // 3
    K = D // n_heads
    query, key, value = qkv.double().split(D, dim=-1)
    rows = []
    for t in range(T):
        heads = []
        for h in range(n_heads):
            part = slice(h * K, (h + 1) * K)
            scores = torch.einsum("bsk,bk->bs", key[:, : t + 1, part], query[:, t, part]) / math.sqrt(K)
            heads.append(torch.einsum("bs,bsk->bk", scores.softmax(-1), value[:, : t + 1, part]))
        rows.append(torch.cat(heads, dim=-1))
    return torch.stack(rows, dim=1)


@pytest.fixture(params=[(256, 2**21), (4, 2**21), (4, 1)], ids=["one block", "blocks", "row by row"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole at a time, some queries at a time, and those of one row of the batch at a time."""
    monkeypatch.setattr(module, "BLOCK_QUERIES", request.param[0])
    monkeypatch.setattr(module, "BLOCK_SCORES", request.param[1])


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(("B", "T", "n_heads", "K"), [(3, 11, 2, 8), (1, 1, 1, 3), (2, 8, 3, 5)])
def test_values_and_gradients(kernel, dtype, tolerance, B, T, n_heads, K) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(B, T, 3 * n_heads * K).to(dtype).requires_grad_()
    weights = torch.randn(B, T, n_heads * K)
    mixed = causal_attention(qkv, n_heads, dropout_p=0.0, kernel=kernel)
    (gradient,) = torch.autograd.grad((mixed * weights).sum(), qkv)
    wide = qkv.detach().double().requires_grad_()
    expected = exact(wide, n_heads)
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), wide)
    assert mixed.dtype == gradient.dtype == dtype
    for ours, theirs in ((mixed, expected), (gradient, expected_gradient)):
        error = (ours.double() - theirs).norm() / theirs.norm().clamp(min=1e-30)
        assert error < tolerance or (ours - theirs).abs().max() == 0


@pytest.mark.usefixtures("blocks")
def test_later_positions_never_reach_earlier_ones() -> None:
    torch.manual_seed(0)
    qkv = torch.randn(2, 11, 24).bfloat16()
    other = qkv.clone()
    other[:, 7:] = 100.0
    before, after = (causal_attention(x, 2, dropout_p=0.0, kernel="blocked") for x in (qkv, other))
    assert before[:, :7].equal(after[:, :7])
    assert not before[:, 7:].equal(after[:, 7:])


def dropped_weights(T: int, p: float, seed: int) -> Tensor:
    """Attention weights (B, T, T) of one head after dropout: mixing the unit matrix shows them."""
    B = 4
    qkv = torch.zeros(B, T, 3, T)  # all scores equal: position t gives each of t + 1 positions 1 / (t + 1)
    qkv[:, :, 2] = torch.eye(T)
    return blocked_attention(qkv.view(B, T, 3 * T), 1, p, torch.tensor(seed))


@pytest.mark.usefixtures("blocks")
def test_dropout_drops_its_share_and_scales_the_rest_up() -> None:
    T, p = 64, 0.3
    weights = dropped_weights(T, p, seed=5)
    seen = torch.ones(T, T).tril().bool().expand_as(weights)
    even = (1 / torch.arange(1, T + 1)[:, None]).expand_as(weights)
    dropped = weights == 0
    n = int(seen.sum())
    assert int(dropped[seen].sum()) / n == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / n))
    kept = seen & ~dropped
    torch.testing.assert_close(weights[kept], even[kept] / (1 - p), rtol=1e-4, atol=0)
    assert bool((weights[~seen] == 0).all())


def test_dropout_depends_on_its_seed_alone() -> None:
    assert dropped_weights(16, 0.3, seed=1).equal(dropped_weights(16, 0.3, seed=1))
    assert not dropped_weights(16, 0.3, seed=1).equal(dropped_weights(16, 0.3, seed=2))
    qkv = torch.randn(1, 9, 24)
    torch.manual_seed(3)
    first = causal_attention(qkv, 2, dropout_p=0.5, kernel="blocked")
    second = causal_attention(qkv, 2, dropout_p=0.5, kernel="blocked")
    torch.manual_seed(3)
    assert causal_attention(qkv, 2, dropout_p=0.5, kernel="blocked").equal(first)
    assert not second.equal(first)


@pytest.mark.usefixtures("blocks")
def test_the_gradient_drops_what_was_dropped() -> None:
    """By differences in float64: the mask of a seed is fixed, so the function is smooth."""
    torch.manual_seed(0)
    qkv = torch.randn(2, 5, 3 * 2 * 2, dtype=torch.float64, requires_grad=True)
    seed = torch.tensor(11)
    assert torch.autograd.gradcheck(lambda x: blocked_attention(x, 2, 0.4, seed), qkv)


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_torch_can_trace_and_differentiate_it(p) -> None:
    """torch's own check of a custom operation: what it says of shapes, and autograd when compiled."""
    qkv = torch.randn(2, 6, 24, requires_grad=True)
    torch.library.opcheck(blocked_attention, (qkv, 2, p, torch.tensor(3) if p else None))


@pytest.mark.parametrize(
    ("device_type", "dtype", "dropout_p", "kernel"),
    [
        ("cpu", torch.bfloat16, 0.0, "blocked"),
        ("cpu", torch.bfloat16, 0.1, "blocked"),
        ("cpu", torch.float32, 0.1, "blocked"),
        ("cpu", torch.float32, 0.0, "sdpa"),
        ("cuda", torch.bfloat16, 0.1, "sdpa"),
        ("mps", torch.float32, 0.0, "sdpa"),
    ],
)
def test_what_auto_means(device_type, dtype, dropout_p, kernel) -> None:
    assert chosen_kernel(device_type, dtype, dropout_p) == kernel


def test_weights_written_out_are_handed_over_and_dropped_as_dropout_does() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 7, 4).unbind()  # each (B, H, T, K)
    seen: list[Tensor] = []
    torch.manual_seed(1)
    mixed = explicit_attention(q, k, v, dropout_p=0.5, observe=seen.append)
    [weights] = seen
    assert weights.triu(1).count_nonzero() == 0
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 7))
    torch.manual_seed(1)
    torch.testing.assert_close(mixed, torch.nn.Dropout(0.5)(weights) @ v)


@pytest.mark.parametrize("changes", [{}, {"position": "rope", "norm": "rmsnorm", "feed_forward": "swiglu"}])
def test_a_model_with_attention_written_out_is_the_same_also_with_a_cache(changes) -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "context_length": 24, "emb_dim": 24, "n_heads": 3, "n_layers": 2}
    settings: dict[str, Any] = {**shape, "drop_rate": 0.1, "qkv_bias": True, **changes}
    net = GPTModel(GPTConfig(**settings)).eval()

    def written() -> list[list[int]]:
        rules = SamplingRules(temperature=0.0)
        decoding = Decoding(net, [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10]], rules=rules, max_new_tokens=9)
        while decoding.step():
            pass
        return decoding.written

    with torch.no_grad():
        expected, texts = net(torch.tensor([range(24)])), written()
        for module in net.modules():
            if isinstance(module, MultiHeadAttention):
                module.kernel = "explicit"
        torch.testing.assert_close(net(torch.tensor([range(24)])), expected, rtol=0, atol=1e-5)
        assert written() == texts
