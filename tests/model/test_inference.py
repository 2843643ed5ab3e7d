"""The cached model gives the logits of the whole one: prompts of any lengths, row by row, in any order."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gptpl.errors import InputError
from gptpl.model import CachedGPT, GPTConfig, GPTModel
from gptpl.model.inference import can_pack, packed

V, C = 31, 16
MODERN = {"position": "rope", "norm": "rmsnorm", "feed_forward": "swiglu", "linear_bias": False}
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [11, 12, 13]]


def build(dtype: torch.dtype = torch.float32, *, tied: bool = False, **changes: Any) -> GPTModel:
    torch.manual_seed(5)
    model = GPTModel(
        GPTConfig(
            vocab_size=V,
            context_length=C,
            emb_dim=32,
            n_heads=4,
            n_layers=3,
            drop_rate=0.5,
            qkv_bias=not tied,
            tie_weights=tied,
            **changes,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model.to(dtype)


def whole(model: GPTModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """Logits after each row by the model itself, one row at a time."""
    with torch.no_grad():
        return torch.stack([model.eval()(torch.tensor([row]))[0, -1] for row in rows])


@torch.no_grad()
def grown(cached: CachedGPT, rows: list[list[int]], steps: int) -> tuple[list[list[int]], Tensor]:
    """The rows with `steps` more tokens each, (7 * row + step) % V, and the logits after them."""
    cache = cached.new_cache(rows=len(rows), capacity=max(map(len, rows)) + steps)
    logits = cached.prefill(rows, cache)
    for step in range(steps):
        new = [(7 * row + step) % V for row in range(len(rows))]
        logits = cached.step(torch.tensor(new), cache)
        rows = [[*row, token] for row, token in zip(rows, new, strict=True)]
    return rows, logits


@pytest.mark.parametrize("steps", [0, 1, 10])
@pytest.mark.parametrize("rows", [PROMPTS, PROMPTS[:1], [PROMPTS[0], PROMPTS[3]]])
@pytest.mark.parametrize("architecture", [{}, MODERN], ids=["gpt2", "modern"])
def test_logits_are_those_of_the_whole_model(
    architecture: dict[str, Any], rows: list[list[int]], steps: int
) -> None:
    model = build(**architecture)
    longer, logits = grown(CachedGPT(model, rows=len(rows)), rows, steps)
    torch.testing.assert_close(logits, whole(model, longer), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", [{}, MODERN], ids=["gpt2", "modern"])
def test_a_row_may_fill_the_context(architecture: dict[str, Any]) -> None:
    model = build(tied=True, **architecture)
    longer, logits = grown(CachedGPT(model, rows=2), [[1] * (C - 3), [2]], 3)
    assert len(longer[0]) == C
    torch.testing.assert_close(logits, whole(model, longer), rtol=1e-4, atol=1e-4)


def test_bf16_stays_bf16_and_close() -> None:
    model = build(torch.bfloat16)
    longer, logits = grown(CachedGPT(model, rows=4), PROMPTS, 5)
    assert logits.dtype == torch.bfloat16
    expected = whole(model, longer)
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()


def test_without_packing_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    monkeypatch.setattr("gptpl.model.inference.can_pack", lambda weight: False)
    longer, logits = grown(CachedGPT(model, rows=4), PROMPTS, 5)
    torch.testing.assert_close(logits, whole(model, longer), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("rows", [[2, 0], [1, 1, 3], [0, 1, 2, 3], []])
def test_rows_can_be_dropped_moved_and_doubled(rows: list[int]) -> None:
    model = build()
    cached = CachedGPT(model, rows=4)
    cache = cached.new_cache(rows=4, capacity=C)
    cached.prefill(PROMPTS, cache)
    cache.select(rows)
    if not rows:
        assert cache.lengths == []
        return
    new = list(range(20, 20 + len(rows)))
    logits = cached.step(torch.tensor(new), cache)
    expected = whole(model, [[*PROMPTS[row], token] for row, token in zip(rows, new, strict=True)])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_training_mode_is_neither_used_nor_changed() -> None:
    model = build().train()
    cached = CachedGPT(model, rows=1)
    first, again = (cached.prefill([[1, 2, 3]], cached.new_cache(rows=1, capacity=4)) for _ in range(2))
    assert torch.equal(first, again)  # dropout of 0.5 is off
    assert all(module.training for module in model.modules())


@torch.no_grad()
@pytest.mark.parametrize(("lengths", "words"), [([3, 0], "got 0 to 3"), ([C + 1], "1 to 16 tokens, got 17")])
def test_impossible_prompts_are_refused(lengths: list[int], words: str) -> None:
    cached = CachedGPT(build(), rows=1)
    with pytest.raises(InputError, match=words):
        cached.prefill([[1] * length for length in lengths], cached.new_cache(rows=len(lengths), capacity=C))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 24), (8, 24), (2, 5, 24)])
def test_a_packed_layer_multiplies_as_the_layer(
    shape: tuple[int, ...], bias: bool, dtype: torch.dtype
) -> None:
    layer = nn.Linear(24, 57, bias=bias).to(dtype)
    x = torch.randn(shape, dtype=dtype)
    fast = packed(layer, rows=shape[0])
    assert (fast is not layer) == can_pack(layer.weight)
    torch.testing.assert_close(fast(x), layer(x))


def test_what_is_not_a_plain_linear_layer_is_left_alone() -> None:
    class Lora(nn.Linear):
        """Computes something else than its weight says."""

    layer = Lora(3, 4)
    assert packed(layer, rows=1) is layer
