"""What a new model's weights look like, for each name that `init` knows."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from gptpl.model import GPTConfig, GPTModel

CONFIG = GPTConfig(
    vocab_size=500, context_length=64, emb_dim=128, n_heads=4, n_layers=3, drop_rate=0.0, qkv_bias=True
)
MATRICES = ("attn.qkv", "attn.out_proj", "ff.up_proj", "ff.down_proj")


@pytest.mark.parametrize("tied", [True, False])
def test_gpt2_draws_gpt2s_distributions(tied: bool) -> None:
    torch.manual_seed(0)
    model = GPTModel(replace(CONFIG, init="gpt2", tie_weights=tied))
    residual = 0.02 / math.sqrt(2 * 3)
    expected_std = {"tok_emb.weight": 0.02, "pos_emb.weight": 0.02}
    for i in range(3):
        for matrix in MATRICES:
            name = f"blocks.{i}.{matrix}.weight"
            expected_std[name] = residual if matrix in ("attn.out_proj", "ff.down_proj") else 0.02
    if not tied:
        expected_std["out_head.weight"] = 0.02

    drawn = {name: parameter for name, parameter in model.named_parameters() if parameter.dim() == 2}
    assert drawn.keys() == expected_std.keys()
    for name, weight in drawn.items():
        # 8,192 numbers at least: their standard deviation is known to 0.8 %, their mean to 1.1 % of it
        assert weight.std().item() == pytest.approx(expected_std[name], rel=0.04), name
        assert abs(weight.mean().item()) < 0.05 * expected_std[name], name
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name


@pytest.mark.parametrize("tied", [True, False])
def test_gpt2_starts_near_uniform_guessing(tied: bool) -> None:
    torch.manual_seed(0)
    model = GPTModel(replace(CONFIG, init="gpt2", tie_weights=tied)).eval()
    tokens = torch.randint(500, (8, 65))
    with torch.no_grad():
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(500), abs=0.1)


def test_torch_keeps_what_torchs_layers_draw() -> None:
    torch.manual_seed(0)
    model = GPTModel(CONFIG)
    torch.manual_seed(0)
    assert torch.equal(model.tok_emb.weight, torch.nn.Embedding(500, 128).weight)
    assert torch.equal(model.pos_emb.weight, torch.nn.Embedding(64, 128).weight)
    bound = 1 / math.sqrt(4 * 128)
    last = model.get_parameter("blocks.2.ff.down_proj.weight").abs().max().item()
    assert 0.98 * bound < last <= bound
    assert model.get_parameter("blocks.0.attn.qkv.bias").any()


@pytest.mark.parametrize("init", ["torch", "gpt2"])
def test_tying_changes_the_head_and_nothing_else(init: Any) -> None:
    """torch draws the head last: a tied model of the same seed starts from the same other weights."""
    torch.manual_seed(0)
    untied = GPTModel(replace(CONFIG, init=init)).state_dict()
    torch.manual_seed(0)
    tied = GPTModel(replace(CONFIG, init=init, tie_weights=True)).state_dict()
    assert tied.keys() == untied.keys()
    if init == "torch":
        assert all(torch.equal(tied[name], untied[name]) for name in untied if name != "out_head.weight")
    assert torch.equal(tied["out_head.weight"], tied["tok_emb.weight"])
    assert not torch.equal(untied["out_head.weight"], untied["tok_emb.weight"])
