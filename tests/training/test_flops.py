"""FLOPs of a training step against torch's own count, and what is known of devices."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gptpl.model import ClassifierConfig, GPTBackbone, GPTClassifier, GPTConfig, GPTModel
from gptpl.model.loss import next_token_loss
from gptpl.model.parameters import TuneAll, TuneHead, TuneLastBlock, TuneLowRank, Tuning
from gptpl.training.costs import (
    counted_flops_per_token,
    matrix_product_flops,
    peak_flops,
    training_flops_per_token,
)

SMALL = GPTConfig(
    vocab_size=96, context_length=32, emb_dim=24, n_heads=3, n_layers=2, drop_rate=0.0, qkv_bias=True
)


MODERN = {"position": "rope", "norm": "rmsnorm", "feed_forward": "swiglu", "linear_bias": False}


@pytest.mark.parametrize("changes", [{}, {"tie_weights": True}, MODERN, {"hidden_dim": 40}])
def test_equals_what_torch_counts(changes):
    """torch counts the products of a real step, with an attention whose products it knows."""
    config = GPTConfig(**{**SMALL.__dict__, **changes})
    net = GPTModel(config)
    B, T = 3, 16
    tokens = torch.randint(0, 96, (B, T))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        next_token_loss(net(tokens), tokens).backward()
    assert counter.get_total_flops() == B * T * training_flops_per_token(config, T)


PARTS: dict[str, Tuning] = {
    "all": TuneAll(),
    "head": TuneHead(),
    "last_block": TuneLastBlock(),
    "lora": TuneLowRank(rank=3, alpha=6.0, dropout=0.0, targets=("qkv", "down_proj", "out_head")),
}


@pytest.mark.parametrize("part", PARTS)
def test_of_a_part_equals_what_torch_counts_of_real_tensors(part):
    config = GPTConfig(**{**SMALL.__dict__, "n_layers": 4})

    def prepare(net: GPTModel) -> GPTBackbone:
        PARTS[part].apply(net)
        return net

    net = prepare(GPTModel(config))
    B, T = 2, 16
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        net(torch.randint(0, 96, (B, T))).sum().backward()
    counted = counted_flops_per_token(config, T, prepare)
    assert B * T * counted == counter.get_total_flops()
    whole = training_flops_per_token(config, T)
    # The forward pass is a third; the small matrices, here of an eighth of the width, add some.
    assert (
        counted == whole if part == "all" else whole / 3 < counted < (0.9 if part == "lora" else 0.7) * whole
    )


def test_a_classifiers_part_is_counted():
    def prepare(net: GPTModel) -> GPTBackbone:
        classifier = GPTClassifier.on(net, ClassifierConfig(n_classes=2))
        TuneLastBlock().apply(classifier)
        return classifier

    config = GPTConfig(**{**SMALL.__dict__, "n_layers": 4})
    D, T = 24, 16
    forward = 4 * (24 * D * D + 4 * T * D)  # of four blocks: two a multiplication and addition
    backward = 2 * (24 * D * D + 4 * T * D)  # of the last
    head = 3 * 2 * D * 2 / T
    assert counted_flops_per_token(config, T, prepare) == pytest.approx(forward + backward + head, rel=1e-3)


def test_published_order_of_gpt2_small():
    """About 6 x 124e6 for the matrices (GPT-2's published size), and 12 x 12 x 1024 x 768 for attention."""
    gpt2 = GPTConfig(
        vocab_size=50257,
        context_length=1024,
        emb_dim=768,
        n_heads=12,
        n_layers=12,
        drop_rate=0.0,
        qkv_bias=True,
    )
    assert training_flops_per_token(gpt2, 1024) == pytest.approx(6 * 124e6 + 12 * 12 * 1024 * 768, rel=0.01)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 125e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("Something new", None),
    ],
)
def test_known_accelerators(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), torch.bfloat16, SMALL) == peak


def test_a_cpu_is_measured():
    peak = peak_flops(torch.device("cpu"), torch.float32, SMALL)
    assert peak is not None
    assert peak > 1e6
    assert peak_flops(torch.device("mps"), torch.float32, SMALL) is None


def test_the_rate_is_operations_over_seconds(monkeypatch):
    """A clock that moves one second a look."""
    ticks = iter(range(100))
    monkeypatch.setattr("gptpl.training.costs.time.perf_counter", lambda: float(next(ticks)))
    assert matrix_product_flops(3, 5, 7, torch.float32) == 2 * 3 * 5 * 7
