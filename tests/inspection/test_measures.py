"""The inside of a model: against transformers' GPT-2, counting by hand, and models made by hand."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from gptpl.errors import InputError
from gptpl.inspection import ablate, ablation, head_scores, induction_scores, logit_lens, record
from gptpl.inspection.measures import dead_units, neighbours, principal_components
from gptpl.model import GPTConfig, GPTModel

V, C, D, H, L = 61, 16, 24, 3, 2
TOKENS = [7, 3, 3, 9, 0, 21, 7, 3]
BOTH = {"vocab_size": V, "drop_rate": 0.1, "qkv_bias": True, "tie_weights": True}


def build(**changes: Any) -> GPTModel:
    torch.manual_seed(0)
    shape = {"context_length": C, "emb_dim": D, "n_heads": H, "n_layers": L}
    net = GPTModel(GPTConfig(**(BOTH | shape | changes)))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.3)
    return net


def test_attention_weights_and_hidden_states_are_those_of_transformers(to_ours: Callable[..., Any]) -> None:
    net = build()
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=C, n_embd=D, n_head=H, n_layer=L)).eval()
    theirs.set_attn_implementation("eager")
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
    net.load_state_dict(to_ours(dict(theirs.named_parameters()), layers=L, qkv_bias=True))
    tokens = list(range(5, 5 + C))
    with torch.no_grad():
        expected = theirs(torch.tensor([tokens]), output_attentions=True, output_hidden_states=True)
    found = record(net, np.array(tokens, dtype=np.uint32))
    assert len(found.blocks) == L
    for block, weights in zip(found.blocks, expected.attentions, strict=True):
        torch.testing.assert_close(block.weights, weights[0], rtol=0, atol=1e-5)
    # Their last one is normalised.
    for ours, states in zip([*found.hidden[:-1], found.final], expected.hidden_states, strict=True):
        torch.testing.assert_close(ours, states[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"position": "rope", "norm": "rmsnorm", "feed_forward": "swiglu"}])
def test_the_parts_of_a_block_add_up(changes: dict[str, Any]) -> None:
    net = build(**changes).train()
    net.blocks[0].eval()
    before = [(each.training, vars(each).get("kernel")) for each in net.modules()]
    found = record(net, [3, 1, 4, 1, 5])
    for block in found.blocks:
        torch.testing.assert_close(block.between, block.input + block.attention)
        torch.testing.assert_close(block.output, block.between + block.feed_forward)
        assert block.units.shape == (5, net.config.ff_width)
    parts = found.token_embeddings
    if found.position_embeddings is not None:
        parts = parts + found.position_embeddings
    torch.testing.assert_close(found.hidden[0], parts)
    assert (found.position_embeddings is None) == ("position" in changes)
    assert [(each.training, vars(each).get("kernel")) for each in net.modules()] == before
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in net.modules())


def test_what_cannot_be_read_is_refused() -> None:
    for tokens, words in (([], "at least one token"), ([V], "61"), ([1] * (C + 1), "context_length=16")):
        with pytest.raises(InputError, match=words):
            record(build(), tokens)


# --- heads ----------------------------------------------------------------------------------------------


def pattern(T: int, to: Any) -> Tensor:
    """Weights (1, T, T) of a head that attends to one token only."""
    return F.one_hot(torch.tensor([max(0, to(t)) for t in range(T)]), T).float()[None]


def test_heads_that_attend_to_one_place_have_its_score() -> None:
    T = 9
    even = torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None]
    weights = torch.cat(
        [pattern(T, lambda t: t - 1), pattern(T, lambda t: 0), pattern(T, lambda t: t), even[None]]
    )
    found = head_scores([weights])
    # The token before the second is the first, and equal weights give each place its share.
    shares = [1 / (t + 1) for t in range(1, T)]
    mean = sum(shares) / len(shares)
    torch.testing.assert_close(found.previous, torch.tensor([[1, 1 / 8, 0, mean]]))
    torch.testing.assert_close(found.first, torch.tensor([[1 / 8, 1, 0, mean]]))
    torch.testing.assert_close(found.itself, torch.tensor([[0, 0, 1, mean]]))
    torch.testing.assert_close(found.entropy, torch.tensor([[0.0, 0, 0, 1]]), rtol=0, atol=1e-6)
    with pytest.raises(InputError, match="two tokens"):
        head_scores([torch.ones(2, 1, 1)])


def induction_model() -> Any:
    """Two blocks of one head: the first copies the token before, the second looks for the own token there.

    A hidden state is three lists of numbers: the token as one of V, its position as one of C, and the token
    before it as one of V.
    """
    V, C = 12, 24
    D = V + C + V
    config = GPTConfig(
        vocab_size=V, context_length=C, emb_dim=D, n_heads=1, n_layers=2, drop_rate=0.0, qkv_bias=True
    )
    net: Any = GPTModel(config)
    token, place, before = slice(0, V), slice(V, V + C), slice(V + C, D)
    with torch.no_grad():
        for block in net.blocks:
            for parameter in [*block.attn.parameters(), *block.ff.parameters()]:
                parameter.zero_()
        net.tok_emb.weight.zero_()[:, token] = torch.eye(V)
        net.pos_emb.weight.zero_()[:, place] = torch.eye(C)
        query, key, value = (slice(i * D, (i + 1) * D) for i in range(3))
        first, second = (block.attn for block in net.blocks)
        sharp = 300.0
        # Place t asks for t - 1.
        first.qkv.weight[query][:C, place] = sharp * torch.diag(torch.ones(C - 1), 1)
        first.qkv.weight[key][:C, place] = torch.eye(C)
        first.qkv.weight[value][:V, token] = torch.eye(V)
        first.out_proj.weight[before, :V] = torch.eye(V)
        second.qkv.weight[query][:V, token] = sharp * torch.eye(V)
        second.qkv.weight[key][:V, before] = torch.eye(V)
        # Nothing is before the first token: its head attended to itself.
        second.qkv.bias[query][V] = -sharp
        second.qkv.weight[key][V, V] = 1.0
    return net


def test_an_induction_head_made_by_hand_has_score_1() -> None:
    found = induction_scores(induction_model())
    torch.testing.assert_close(found, torch.tensor([[0.0], [1.0]]), rtol=0, atol=0.01)
    # Equal weights: 1 / (t + 1) at each place t of the second half.
    even = induction_model()
    with torch.no_grad():
        even.blocks[1].attn.qkv.weight.zero_()
        even.blocks[1].attn.qkv.bias.zero_()
    expected = sum(1 / (t + 1) for t in range(12, 24)) / 12
    assert float(induction_scores(even)[1]) == pytest.approx(expected, abs=1e-4)


def test_a_context_too_short_for_a_repetition_is_refused() -> None:
    with pytest.raises(InputError, match="4 tokens or more"):
        induction_scores(build(context_length=3))


# --- the logit lens -------------------------------------------------------------------------------------


def test_the_last_depth_of_the_lens_is_the_model_and_each_other_a_model_cut_there() -> None:
    net = build(n_layers=3)
    lens = logit_lens(net, record(net, TOKENS))
    for depth in range(4):
        cut = build(n_layers=3)
        cut.blocks = cut.blocks[:depth]
        with torch.no_grad():
            log_p = cut.eval()(torch.tensor([TOKENS]))[0].log_softmax(-1)
        assert lens.best[depth].tolist() == log_p.argmax(-1).tolist()
        torch.testing.assert_close(lens.probability[depth], log_p.exp().amax(-1))
        for t, following in enumerate(TOKENS[1:]):
            assert lens.rank[depth, t] == sum(p > log_p[t, following] for p in log_p[t])
            assert float(lens.surprisal[depth, t]) == pytest.approx(-float(log_p[t, following]), abs=1e-5)
        assert lens.rank[depth, -1] == -1
        assert math.isnan(lens.surprisal[depth, -1])


def test_the_lens_reads_long_texts_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    net = build()
    recording = record(net, TOKENS)
    whole = logit_lens(net, recording)
    for size in (1, 3, 7):
        monkeypatch.setattr("gptpl.inspection.measures.LENS_POSITIONS", size)
        parts = logit_lens(net, recording)
        assert parts.best.equal(whole.best)
        assert parts.rank.equal(whole.rank)
        torch.testing.assert_close(parts.surprisal, whole.surprisal, equal_nan=True)


# --- ablation -------------------------------------------------------------------------------------------


def loss(net: GPTModel) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(net.eval()(torch.tensor([TOKENS[:-1]]))[0], torch.tensor(TOKENS[1:])))


def without(net: Any, block: int, part: str, head: int | None = None) -> Any:
    """The model with the weights of that part set to zero."""
    with torch.no_grad():
        layer = net.blocks[block].attn.out_proj if part == "attention" else net.blocks[block].ff.down_proj
        K = net.config.emb_dim // H
        if head is None:
            for parameter in layer.parameters():
                parameter.zero_()
        else:
            layer.weight[:, head * K : (head + 1) * K] = 0
    return net


@pytest.mark.parametrize("changes", [{}, {"position": "rope", "norm": "rmsnorm", "feed_forward": "swiglu"}])
def test_a_part_left_out_is_one_whose_weights_are_zero(changes: dict[str, Any]) -> None:
    found = ablation(build(**changes), TOKENS)
    assert found.loss == pytest.approx(loss(build(**changes)), abs=1e-5)
    for block in range(L):
        for head in range(H):
            expected = loss(without(build(**changes), block, "attention", head))
            assert float(found.heads[block, head]) == pytest.approx(expected, abs=1e-5)
        bare = without(build(**changes), block, "attention")
        assert float(found.attention[block]) == pytest.approx(loss(bare), abs=1e-5)
        assert float(found.blocks[block]) == pytest.approx(loss(without(bare, block, "ff")), abs=1e-5)
        bare = without(build(**changes), block, "ff")
        assert float(found.feed_forward[block]) == pytest.approx(loss(bare), abs=1e-5)


def test_ablating_nothing_changes_nothing_and_everything_ends_with_the_block() -> None:
    net = build()
    whole = loss(net)
    with ablate(net):
        assert loss(net) == whole
    with ablate(net, heads=[(1, 2)], feed_forward=[0]):
        expected = loss(without(without(build(), 1, "attention", 2), 0, "ff"))
        assert loss(net) == pytest.approx(expected, abs=1e-6)
        assert abs(loss(net) - whole) > 0.01
    assert loss(net) == whole


@pytest.mark.parametrize("settings", [{"heads": [(0, H)]}, {"attention": [L]}, {"feed_forward": [-1]}])
def test_parts_that_are_not_there_are_refused(settings: dict[str, Any]) -> None:
    with (
        pytest.raises(InputError, match=f"the model has {L} blocks of {H} heads"),
        ablate(build(), **settings),
    ):
        pass
    with pytest.raises(InputError, match="two tokens"):
        ablation(build(), [1])


# --- embeddings and units -------------------------------------------------------------------------------


def test_neighbours_are_those_of_the_smallest_angle() -> None:
    table = torch.randn(V, 8, generator=torch.Generator().manual_seed(1))
    rows = table.numpy()
    [found] = neighbours(table, [5], number=3)

    def cosine(other: int) -> float:
        return float(rows[5] @ rows[other] / np.linalg.norm(rows[5]) / np.linalg.norm(rows[other]))

    nearest = sorted((other for other in range(V) if other != 5), key=cosine, reverse=True)[:3]
    assert [token for token, _ in found] == nearest
    assert [similarity for _, similarity in found] == pytest.approx(
        [cosine(each) for each in nearest], abs=1e-5
    )


def test_principal_components_are_the_directions_of_the_most_variance() -> None:
    rows = torch.randn(50, 6, generator=torch.Generator().manual_seed(2)) * torch.tensor([5.0, 1, 9, 1, 1, 1])
    places, shares = principal_components(rows)
    variances, vectors = np.linalg.eigh(np.cov(rows.numpy().T))
    assert shares == pytest.approx((variances[::-1] / variances.sum())[:2], abs=1e-4)
    expected = (rows - rows.mean(0)).numpy() @ vectors[:, ::-1][:, :2]
    for axis in range(2):  # a direction's sign is free
        assert abs(np.corrcoef(places[:, axis].numpy(), expected[:, axis])[0, 1]) == pytest.approx(
            1, abs=1e-5
        )
    assert principal_components(rows[:1])[0].tolist() == [[0, 0]]


def test_dead_units_are_those_that_never_answer() -> None:
    units = torch.tensor([[0.0, 0.5, -1e-5, -0.2], [9e-3, 0.0, 0.0, 0.011]])
    assert dead_units(units).tolist() == [True, False, True, False]
