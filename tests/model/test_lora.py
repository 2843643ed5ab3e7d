"""LoRA's formula by hand, and a model with it: merged, cached, recomputed, in bf16."""

# B batch, T time, V vocabulary, I inputs, O outputs, R rank

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptpl.errors import InputError
from gptpl.model import CachedGPT, GPTConfig, GPTModel
from gptpl.model.lora import LowRankLinear, add_low_rank, merged_weights

V, C, D, R, ALPHA = 31, 12, 16, 3, 6.0
TARGETS = ("qkv", "out_proj", "up_proj", "down_proj", "out_head")
BLOCK_LAYERS = ("attn.qkv", "attn.out_proj", "ff.up_proj", "ff.down_proj")


def model(*, tied: bool = False, drop_rate: float = 0.0) -> GPTModel:
    torch.manual_seed(4)
    return GPTModel(
        GPTConfig(
            vocab_size=V,
            context_length=C,
            emb_dim=D,
            n_heads=2,
            n_layers=2,
            drop_rate=drop_rate,
            qkv_bias=tied,
            tie_weights=tied,
            init="gpt2" if tied else "torch",
        )
    )


def low_rank(net: GPTModel, **changes: Any) -> GPTModel:
    """The model with matrices that are not zeros, as if it had trained."""
    settings: dict[str, Any] = {"rank": R, "alpha": ALPHA, "dropout": 0.0, "targets": TARGETS}
    add_low_rank(net, **(settings | changes))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.3)
    return net


TOKENS = torch.arange(2 * C).view(2, C) * 7 % V


def by_hand(x: Tensor, layer: LowRankLinear) -> Tensor:
    """The paper's formula in float64, with the matrices' product made first."""
    weight = layer.weight.double() + ALPHA / R * (layer.lora_B.double() @ layer.lora_A.double())  # (O, I)
    bias = 0 if layer.bias is None else layer.bias.double()
    return x.double() @ weight.T + bias


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_computes_the_formula_and_so_does_the_merged_one(bias):
    torch.manual_seed(0)
    plain = nn.Linear(5, 7, bias=bias)
    layer = LowRankLinear(plain, rank=R, alpha=ALPHA, dropout=0.5).eval()
    with torch.no_grad():
        layer.lora_B.normal_()
    x = torch.randn(4, 2, 5)
    torch.testing.assert_close(layer(x).double(), by_hand(x, layer), atol=1e-5, rtol=0)
    assert layer.weight is plain.weight
    merged = layer.merged()
    assert type(merged) is nn.Linear
    torch.testing.assert_close(merged(x).double(), by_hand(x, layer), atol=1e-5, rtol=0)
    assert not torch.equal(merged.weight, plain.weight)  # which stays what it was


def test_dropout_is_of_the_inputs_of_a_and_in_training_only():
    torch.manual_seed(0)
    layer = LowRankLinear(nn.Linear(5, 7), rank=R, alpha=ALPHA, dropout=0.5)
    with torch.no_grad():
        layer.lora_B.normal_()
    x = torch.randn(4, 5)
    torch.manual_seed(1)
    trained = layer.train()(x)
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.5)
    expected = F.linear(x, layer.weight, layer.bias) + ALPHA / R * dropped @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(trained, expected)
    assert not torch.allclose(layer.eval()(x), expected)


@pytest.mark.parametrize("tied", [False, True])
def test_at_first_the_model_is_what_it_was_bit_for_bit(tied):
    net = model(tied=tied)
    before, names = net(TOKENS), list(net.state_dict())
    targets = [target for target in TARGETS if not (tied and target == "out_head")]
    add_low_rank(net, rank=R, alpha=ALPHA, dropout=0.0, targets=targets)
    assert torch.equal(net(TOKENS), before)
    layers = [f"blocks.{i}.{layer}" for i in range(2) for layer in BLOCK_LAYERS]
    layers += [] if tied else ["out_head"]
    added = {f"{layer}.{matrix}" for layer in layers for matrix in ("lora_A", "lora_B")}
    assert set(net.state_dict()) == {*names, *added}
    # As PEFT and the authors draw A: U(-1/sqrt(I), 1/sqrt(I)).
    A = net.state_dict()["blocks.1.ff.down_proj.lora_A"]
    assert A.shape == (R, 4 * D)
    assert 0.9 / (4 * D) ** 0.5 < A.abs().max() <= 1 / (4 * D) ** 0.5


def merge(net: GPTModel) -> None:
    """Puts each layer's merged one into its place."""
    for name, layer in list(net.named_modules()):
        if isinstance(layer, LowRankLinear):
            net.set_submodule(name, layer.merged())


def test_merged_equals_unmerged_by_layers_and_in_a_state_dict():
    net = low_rank(model()).eval()
    names, plain_names = list(net.state_dict()), list(model().state_dict())
    logits, base = net(TOKENS), model().eval()(TOKENS)
    other = model().eval()
    other.load_state_dict(merged_weights(net.state_dict(), scale=ALPHA / R))
    assert (logits - base).abs().max() > 0.1
    merge(net)
    assert list(net.state_dict()) == plain_names != names
    assert not any(isinstance(layer, LowRankLinear) for layer in net.modules())
    for merged in (net, other):
        torch.testing.assert_close(merged(TOKENS), logits, atol=1e-5, rtol=0)
    assert net.out_head.weight.requires_grad


def test_only_named_layers_get_matrices():
    net = low_rank(model(), targets=["qkv", "down_proj"])
    named = {name for name, layer in net.named_modules() if isinstance(layer, LowRankLinear)}
    assert named == {f"blocks.{i}.{layer}" for i in range(2) for layer in ("attn.qkv", "ff.down_proj")}


def test_the_cached_model_has_the_matrices_and_drops_nothing():
    net = low_rank(model(drop_rate=0.5), dropout=0.5).train()
    rows = TOKENS[:, :5].tolist()
    cached = CachedGPT(net, rows=2)
    cache = cached.new_cache(rows=2, capacity=6)
    with torch.no_grad():
        first = cached.prefill(rows, cache)
        second = cached.step(torch.tensor([3, 4]), cache)
        expected = net.eval()(torch.tensor([[*rows[0], 3], [*rows[1], 4]]))
    torch.testing.assert_close(first, expected[:, 4], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(second, expected[:, 5], atol=1e-5, rtol=1e-5)


def gradients(net: GPTModel) -> dict[str, Tensor]:
    net.zero_grad()
    torch.manual_seed(9)
    net(TOKENS).square().mean().backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def test_recomputed_blocks_have_the_same_gradients():
    net = low_rank(model(drop_rate=0.2), dropout=0.3).train()
    for name, parameter in net.named_parameters():
        parameter.requires_grad_("lora" in name)
    kept = gradients(net)
    net.recompute_blocks = True
    again = gradients(net)
    assert kept.keys() == again.keys() == {name for name in net.state_dict() if "lora" in name}
    for name, gradient in kept.items():
        assert torch.equal(again[name], gradient), name


def test_bf16_autocast_and_bf16_weights_stay_near_fp32():
    net = low_rank(model()).eval()
    exact = net(TOKENS)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(net(TOKENS).float(), exact, atol=0.1, rtol=0.05)
    net.to(torch.bfloat16)
    merge(net)
    assert net.out_head.weight.dtype == torch.bfloat16
    torch.testing.assert_close(net(TOKENS).float(), exact, atol=0.1, rtol=0.05)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"targets": []}, "tune.targets must name some of the layers qkv, .*, out_head, got none"),
        (
            {"targets": ["qkv", "c_attn"]},
            "tune.targets must name some of the layers qkv, .*, got c_attn",
        ),
        ({"rank": 0}, "tune.rank must be from 1 to 16, got 0"),
        ({"rank": 17}, "tune.rank must be from 1 to 16, got 17"),
        ({"alpha": 0.0}, "tune.alpha must be positive, such as twice tune.rank, got 0.0"),
        ({"alpha": float("nan")}, "tune.alpha must be positive, .*got nan"),
        ({"dropout": 1.0}, "tune.dropout must be at least 0 and below 1, got 1.0"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    net = model()
    with pytest.raises(InputError, match=f"^{message}"):
        low_rank(net, **changes)
    assert list(net.state_dict()) == list(model().state_dict())


def test_a_tied_head_is_no_target():
    with pytest.raises(InputError, match=r"^tune\.targets has out_head, which is tied .*: omit it"):
        low_rank(model(tied=True))
