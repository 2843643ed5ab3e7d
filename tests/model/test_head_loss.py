"""Head and loss in one against all logits, then the loss."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gptpl.model import GPTConfig, GPTModel
from gptpl.model import loss as module
from gptpl.model.lora import LowRankLinear, add_low_rank
from gptpl.model.loss import (
    head_factors,
    head_loss,
    head_sums,
    summed_next_token_loss,
    summed_scores,
    training_loss,
)

V, D = 50, 16


@pytest.fixture(
    params=[(2048, 32), (7, 3), (1, 1), (7, None)],
    ids=["at once", "in parts", "row by row", "as it is compiled for GPUs"],
    autouse=True,
)
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    product_rows, softmax_rows = request.param
    monkeypatch.setattr(module, "PRODUCT_ROWS", product_rows)
    if softmax_rows is None:
        monkeypatch.setattr(module, "_to_gradient", module.to_gradient_at_once)
    else:
        monkeypatch.setattr(module, "SOFTMAX_ROWS", softmax_rows)


def inputs(scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = (scale * torch.randn(3, 6, D)).requires_grad_()
    weight = torch.randn(V, D).requires_grad_()
    targets = torch.randint(0, V, (3, 6))
    targets[0, :2] = -100
    targets[2, 5] = -100
    return hidden, weight, targets


def exact(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The definition in float64: mean over the counted of -log softmax."""
    log_p = (hidden.double() @ weight.double().t()).log_softmax(-1)
    counted = [-log_p[b, t, targets[b, t]] for b in range(3) for t in range(6) if targets[b, t] >= 0]
    return torch.stack(counted).mean()


@pytest.mark.parametrize("scale", [1.0, 100.0], ids=["usual", "losses in the hundreds"])
@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_loss_and_gradients(scale, factor):
    hidden, weight, targets = inputs(scale)
    loss = head_loss(hidden, weight, targets)
    gradients = torch.autograd.grad(loss * factor, (hidden, weight))
    expected = exact(hidden, weight, targets)
    expected_gradients = torch.autograd.grad(expected * factor, (hidden, weight))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def test_under_autocast_products_are_bf16_and_sums_fp32():
    hidden, weight, targets = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        loss = head_loss(hidden, weight, targets)
        ours = torch.autograd.grad(loss, (hidden, weight))
        logits = F.linear(hidden, weight)
        assert logits.dtype == torch.bfloat16
        plain = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        theirs = torch.autograd.grad(plain, (hidden, weight))
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 1e-2 * b.norm()


def test_bf16_weights_get_bf16_gradients():
    hidden, weight, targets = inputs()
    hidden, weight = (tensor.detach().bfloat16().requires_grad_() for tensor in (hidden, weight))
    loss = head_loss(hidden, weight, targets)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    expected = exact(hidden, weight, targets)
    expected_gradients = torch.autograd.grad(expected, (hidden, weight))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - theirs).norm() < 2e-2 * theirs.norm()


def test_frozen_parts_get_none():
    hidden, weight, targets = inputs()
    head_loss(hidden.detach(), weight, targets).backward()
    assert weight.grad is not None
    weight.grad = None
    head_loss(hidden, weight.detach(), targets).backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_without_gradients_no_product_is_made_for_them(monkeypatch):
    hidden, weight, targets = inputs()
    expected = head_loss(hidden, weight, targets).detach()
    monkeypatch.setattr(module, "_accumulated", None)
    with torch.no_grad():
        assert head_loss(hidden.detach(), weight, targets).equal(expected)


def test_no_target_is_nan_as_in_torch():
    hidden, weight, targets = inputs()
    assert math.isnan(head_loss(hidden, weight, torch.full_like(targets, -100)).item())
    sums = head_sums(hidden, weight, torch.full_like(targets, -100), summed_next_token_loss)
    assert [value.item() for value in sums] == [0, 0]


def test_sums():
    hidden, weight, targets = inputs()
    total, count = head_sums(hidden, weight, targets, summed_next_token_loss)
    assert count.item() == 15
    assert total.dtype == torch.float64
    assert not total.requires_grad
    assert total.item() == pytest.approx(15 * exact(hidden, weight, targets).item(), rel=1e-6)


def test_sums_with_the_best_guesses():
    hidden, weight, targets = inputs()
    targets[1, :3] = (hidden @ weight.t())[1, :3].argmax(-1)
    total, count, correct = head_sums(hidden, weight, targets, summed_scores)
    by_hand = [
        bool((hidden[b, t] @ weight.t()).argmax() == targets[b, t])
        for b in range(3)
        for t in range(6)
        if targets[b, t] >= 0
    ]
    assert [count.item(), correct.item()] == [15, sum(by_hand)]
    assert 3 <= sum(by_hand) < 15
    torch.testing.assert_close(total, head_sums(hidden, weight, targets, summed_next_token_loss)[0])
    nothing = head_sums(hidden, weight, torch.full_like(targets, -100), summed_scores)
    assert [value.item() for value in nothing] == [0, 0, 0]


def test_an_infinite_logit_is_not_hidden():
    hidden, weight, targets = inputs()
    hidden.data[1, 1] = math.inf
    assert not math.isfinite(head_loss(hidden, weight, targets).item())


def test_fp16_is_refused_where_gradients_would_be_lost():
    hidden, weight, targets = inputs()
    with pytest.raises(TypeError, match="fp16"):
        head_loss(hidden.half(), weight.half(), targets)


def test_no_logits_of_all_positions_in_fp32(monkeypatch):
    """torch's profiler tells of every allocation: none has room for N x V fp32 numbers."""
    monkeypatch.setattr(module, "PRODUCT_ROWS", 16)
    monkeypatch.setattr(module, "SOFTMAX_ROWS", 8)
    N, vocabulary = 64, 4096
    hidden = torch.randn(N, 8, requires_grad=True)
    weight = torch.randn(vocabulary, 8, requires_grad=True)
    targets = torch.randint(0, vocabulary, (N,))

    def largest(run):
        with torch.profiler.profile(profile_memory=True) as profile:
            run().backward()
        return max(event.cpu_memory_usage for event in profile.events())

    assert largest(lambda: F.cross_entropy(hidden @ weight.t(), targets)) >= 4 * N * vocabulary
    assert largest(lambda: head_loss(hidden, weight, targets)) < 4 * N * vocabulary


@pytest.mark.parametrize("trained", [True, False], ids=["training", "evaluation"])
def test_a_low_rank_head_has_the_loss_and_the_gradients_of_all_logits(trained):
    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=V, context_length=6, emb_dim=D, n_heads=2, n_layers=1,
        drop_rate=0.1, qkv_bias=False, tie_weights=False, init="torch",
    )  # fmt: skip
    net = GPTModel(config).train(trained)
    add_low_rank(net, rank=2, alpha=4.0, dropout=0.5, targets=["out_head", "qkv"])
    assert isinstance(net.out_head, LowRankLinear)
    torch.nn.init.normal_(net.out_head.lora_B)
    net.out_head.weight.requires_grad_(False)
    tokens, targets = torch.randint(0, V, (3, 6)), inputs()[2]
    found = []
    for head in ("fused", "plain"):
        torch.manual_seed(1)  # the same are dropped
        net.zero_grad()
        loss = training_loss(net, tokens, targets, head=head)
        loss.backward()
        found.append(
            {name: p.grad for name, p in net.named_parameters() if p.grad is not None} | {"loss": loss}
        )
    fused, plain = found
    assert fused.keys() == plain.keys()
    assert "out_head.weight" not in fused
    assert fused["out_head.lora_A"].abs().sum() > 0
    for name, tensor in plain.items():
        torch.testing.assert_close(fused[name], tensor, atol=1e-6, rtol=1e-4, msg=name)
    if not trained:
        total, count = head_sums(*head_factors(net, tokens), targets, summed_next_token_loss)
        assert (total / count).item() == pytest.approx(plain["loss"].item(), rel=1e-5)
