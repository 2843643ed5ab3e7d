"""Surprisals against the losses of the whole model, window by window."""

import math

import pytest
import torch
from torch.nn import functional as F

from gptpl.errors import InputError
from gptpl.evaluation.likelihood import surprisals
from gptpl.model import GPTModel
from gptpl.model.gpt import GPTConfig

V, C, EOT = 23, 8, 22


@pytest.fixture
def model() -> GPTModel:
    torch.manual_seed(2)
    net = GPTModel(
        GPTConfig(
            vocab_size=V,
            context_length=C,
            emb_dim=16,
            n_heads=2,
            n_layers=2,
            drop_rate=0.5,
            qkv_bias=True,
        )
    )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.5)
    return net.train()


def text(length: int) -> list[int]:
    return torch.randint(V, (length,), generator=torch.Generator().manual_seed(1)).tolist()


def test_a_text_that_fits_has_the_losses_of_the_model(model: GPTModel) -> None:
    tokens = text(C)
    found = list(surprisals(model, tokens, eot_id=EOT))
    with torch.no_grad():
        logits = model.eval()(torch.tensor([[EOT, *tokens[:-1]]]))[0]
    expected = F.cross_entropy(logits, torch.tensor(tokens), reduction="none")
    assert [each.surprisal for each in found] == pytest.approx(expected.tolist(), abs=1e-5)
    assert [each.token for each in found] == tokens


@pytest.mark.parametrize("length", [1, C - 1, C, C + 1, 2 * C, 5 * C + 3])
def test_every_token_sees_half_a_context_or_all_before_it(model: GPTModel, length: int) -> None:
    """Each window begins half a context before its first new token; written out token by token."""
    tokens = text(length)
    found = list(surprisals(model, tokens, eot_id=EOT))
    whole = [EOT, *tokens]
    begin, end, seen = 0, C, []
    for i, token in enumerate(tokens):
        if i == end:  # the window is used up
            begin, end = i - C // 2, i - C // 2 + C
        with torch.no_grad():
            p = model.eval()(torch.tensor([whole[begin : i + 1]]))[0, -1].double().softmax(-1)
        seen.append(i + 1 - begin)
        each = found[i]
        assert each.token == token
        assert each.surprisal == pytest.approx(-math.log(p[token]), abs=1e-5)
        assert each.entropy == pytest.approx(float(-(p * p.log()).sum()), abs=1e-5)
        assert each.rank == int((p > p[token]).sum())
        best = p.topk(5)
        assert [other for other, _ in each.alternatives] == best.indices.tolist()
        assert [chance for _, chance in each.alternatives] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert len(found) == length
    assert all(n > C // 2 or n == i + 1 for i, n in enumerate(seen))


def test_the_model_is_left_as_it_was(model: GPTModel) -> None:
    model.blocks[0].eval()
    before = [module.training for module in model.modules()]
    for _ in surprisals(model, text(20), eot_id=EOT):  # also while the caller has its turn
        assert [module.training for module in model.modules()] == before
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize(
    ("tokens", "alternatives", "words"),
    [
        ([], 5, "the text has no tokens"),
        ([V], 5, f"token ids from 0 to {V - 1}, got {V}"),
        ([1], -1, f"alternatives must be 0 to {V}, got -1"),
        ([1], V + 1, f"alternatives must be 0 to {V}, got {V + 1}"),
    ],
)
def test_bad_input_is_refused_before_the_first_token(
    model: GPTModel, tokens: list[int], alternatives: int, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        surprisals(model, tokens, eot_id=EOT, alternatives=alternatives)
