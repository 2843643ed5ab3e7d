"""GPTModel as a function and as a module: causality, dropout, limits, tied weights, state dict."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gptpl.errors import InputError
from gptpl.model import GPTConfig, GPTModel

V, C = 13, 9
CONFIG = GPTConfig(
    vocab_size=V, context_length=C, emb_dim=16, n_heads=4, n_layers=2, drop_rate=0.2, qkv_bias=True
)


def build(config: GPTConfig = CONFIG) -> GPTModel:
    torch.manual_seed(0)
    return GPTModel(config).eval()


def some_tokens(rows: int = 2, length: int = C) -> Tensor:
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(1))


MODEL = build()
token_rows = st.lists(st.integers(0, V - 1), min_size=2, max_size=C)


@settings(max_examples=60)
@given(tokens=token_rows, data=st.data())
def test_future_tokens_never_change_past_logits(tokens: list[int], data: st.DataObject) -> None:
    now = data.draw(st.integers(1, len(tokens) - 1), label="tokens of the past")
    future = data.draw(st.lists(st.integers(0, V - 1), max_size=C - now), label="another future")
    with torch.no_grad():
        logits = MODEL(torch.tensor([tokens]))[:, :now]
        others = MODEL(torch.tensor([tokens[:now] + future]))[:, :now]
    torch.testing.assert_close(others, logits, rtol=0, atol=1e-5)


def test_past_tokens_do_change_later_logits() -> None:
    tokens = some_tokens(rows=1)
    changed = tokens.clone()
    changed[0, 2] = (tokens[0, 2] + 1) % V
    with torch.no_grad():
        moved = (MODEL(tokens) - MODEL(changed)).abs().amax(dim=-1)[0]  # (T,)
    assert (moved[2:] > 1e-3).all()


def test_positions_matter() -> None:
    with torch.no_grad():
        logits = MODEL(torch.full((1, C), 5))[0]
    assert (logits[1:] - logits[:-1]).abs().amax(dim=-1).min() > 1e-3


def test_rows_do_not_see_each_other() -> None:
    tokens = some_tokens(rows=3)
    with torch.no_grad():
        torch.testing.assert_close(MODEL(tokens)[1:2], MODEL(tokens[1:2]), rtol=0, atol=1e-5)


def test_forward_is_the_head_on_the_hidden_states() -> None:
    tokens = some_tokens()
    with torch.no_grad():
        hidden = MODEL.hidden(tokens)
        logits = MODEL(tokens)
    assert hidden.shape == (2, C, CONFIG.emb_dim)
    assert logits.shape == (2, C, V)
    assert logits.dtype == torch.float32
    assert torch.equal(MODEL.out_head(hidden), logits)


def test_dropout_is_on_in_training_and_off_in_evaluation() -> None:
    model, tokens = build(), some_tokens()
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))
    still = build(replace(CONFIG, drop_rate=0.0)).train()
    assert torch.equal(still(tokens), still(tokens))


@pytest.mark.parametrize(("place", "times"), [("drop_emb", 1), ("blocks.1.drop_shortcut", 2)])
def test_each_dropout_drops_its_share(place: str, times: int) -> None:
    """Of the embeddings and of each shortcut (the attention weights have a test of their own)."""
    model, seen = build().train(), []
    model.get_submodule(place).register_forward_hook(lambda _m, _in, out: seen.append(out))
    model(some_tokens(rows=64))
    assert len(seen) == times
    dropped = torch.cat([(out == 0).float().flatten() for out in seen]).mean().item()
    assert dropped == pytest.approx(0.2, abs=0.02)


def test_longer_than_the_context_is_refused() -> None:
    with pytest.raises(InputError) as error:
        MODEL(some_tokens(length=C + 1))
    assert "context_length=9 tokens at once, got 10" in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_token_ids_are_refused() -> None:
    with pytest.raises(IndexError):
        MODEL(torch.tensor([[V]]))


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_learns(tied: bool) -> None:
    model = build(replace(CONFIG, tie_weights=tied))
    model(some_tokens()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_a_tied_head_is_the_token_embedding_and_stays_so(tmp_path: Path) -> None:
    model = build(replace(CONFIG, tie_weights=True))
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    loaded = GPTModel(model.config)
    loaded.load_state_dict(torch.load(tmp_path / "weights.pt"))
    for tied in (model, loaded, copy.deepcopy(model), build(model.config).double()):
        assert tied.out_head.weight is tied.tok_emb.weight
        assert "out_head.weight" not in dict(tied.named_parameters())
    assert (tmp_path / "weights.pt").stat().st_size < 1.2 * sum(p.nbytes for p in model.parameters()) + 10_000
    assert build().out_head.weight is not build().tok_emb.weight


@pytest.mark.parametrize("tied", [True, False])
def test_the_state_dict_carries_the_whole_model(tied: bool) -> None:
    config = replace(CONFIG, tie_weights=tied)
    model = build(config)
    torch.manual_seed(1)
    other = GPTModel(config).eval()
    tokens = some_tokens()
    assert not torch.equal(other(tokens), model(tokens))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(tokens), model(tokens))


def test_names_that_checkpoints_rely_on() -> None:
    block = {
        f"{layer}.{kind}"
        for layer in ("norm1", "attn.qkv", "attn.out_proj", "norm2", "ff.up_proj", "ff.down_proj")
        for kind in ("weight", "bias")
    }
    blocks = {f"blocks.{i}.{name}" for i in range(2) for name in block}
    ends = {"tok_emb.weight", "pos_emb.weight", "final_norm.weight", "final_norm.bias", "out_head.weight"}
    assert MODEL.state_dict().keys() == blocks | ends
    without_bias = build(replace(CONFIG, qkv_bias=False)).state_dict().keys()
    assert MODEL.state_dict().keys() - without_bias == {f"blocks.{i}.attn.qkv.bias" for i in range(2)}
