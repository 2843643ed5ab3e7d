"""Which parameters decay: counted, and seen in what decay does to weights that have no gradient."""

import pytest
import torch

from gptpl.errors import InputError
from gptpl.model import GPTConfig, GPTModel
from gptpl.training.optimizers import decay_groups


def net_of(*, tie_weights: bool) -> GPTModel:
    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=11,
        context_length=8,
        emb_dim=8,
        n_heads=2,
        n_layers=2,
        drop_rate=0.0,
        qkv_bias=True,
        tie_weights=tie_weights,
    )
    return GPTModel(config)


def by_name(net: GPTModel, weight_decay: float, decay: str) -> dict[str, float]:
    """The decay of every parameter by its name; fails where one stands in two groups or in none."""
    groups = decay_groups(net, weight_decay=weight_decay, decay=decay)  # type: ignore[arg-type]
    given = [(id(p), group["weight_decay"]) for group in groups for p in group["params"]]
    names = {id(p): name for name, p in net.named_parameters()}
    assert len(given) == len(dict(given)) == len(names)
    return {names[key]: value for key, value in given}


tied = pytest.mark.parametrize("tie_weights", [False, True])


@tied
def test_matrices_decay_and_biases_and_gains_are_spared(tie_weights):
    net = net_of(tie_weights=tie_weights)
    decay_of = by_name(net, 0.1, "matrices")
    for name, decay in decay_of.items():
        is_bias_or_gain = name.endswith("bias") or "norm" in name
        assert decay == (0.0 if is_bias_or_gain else 0.1), name
    assert ("out_head.weight" in decay_of) != tie_weights
    block = ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias")
    assert {f"blocks.1.{name}" for name in block} | {"final_norm.bias"} <= set(decay_of)


@tied
def test_all_decays_everything(tie_weights):
    decay_of = by_name(net_of(tie_weights=tie_weights), 0.1, "all")
    assert set(decay_of.values()) == {0.1}


def test_frozen_parameters_are_left_out():
    net = net_of(tie_weights=False)
    net.requires_grad_(False)
    net.final_norm.requires_grad_(True)
    (spared,) = decay_groups(net, weight_decay=0.1)
    assert {id(p) for p in spared["params"]} == {id(p) for p in net.final_norm.parameters()}
    assert spared["weight_decay"] == 0.0


@tied
@pytest.mark.parametrize("decay", ["matrices", "all"])
def test_without_gradients_weights_shrink_by_the_decay_alone(tie_weights, decay):
    """AdamW multiplies by 1 - lr x decay a step; a tied weight that counted twice would shrink twice."""
    net, steps, lr, weight_decay = net_of(tie_weights=tie_weights), 3, 0.1, 0.5
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    groups = decay_groups(net, weight_decay=weight_decay, decay=decay)
    optimizer = torch.optim.AdamW(groups, lr=lr)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(steps):
        optimizer.step()
    for name, parameter in net.named_parameters():
        shrinks = decay == "all" or not (name.endswith("bias") or "norm" in name)
        expected = before[name]
        for _ in range(steps if shrinks else 0):
            expected = expected * (1 - lr * weight_decay)
        torch.testing.assert_close(parameter.detach(), expected, atol=1e-7, rtol=1e-6, msg=name)


def test_an_unknown_rule_is_refused():
    with pytest.raises(InputError, match=r"optimizer.decay=biases is unknown: choose matrices or all"):
        decay_groups(net_of(tie_weights=False), weight_decay=0.1, decay="biases")  # type: ignore[arg-type]
