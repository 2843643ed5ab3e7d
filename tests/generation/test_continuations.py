"""Scores of continuations: those of transformers' model, one pair at a time."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from gptpl.errors import InputError
from gptpl.evaluation.likelihood import ContinuationScore, Pair, encode_pair, score_groups
from gptpl.model import GPTBackbone, GPTConfig, GPTModel
from gptpl.tokenizers import BytesTokenizer, GPT2Tokenizer


def score_continuations(net: nn.Module, pairs: Sequence[Pair], **settings: Any) -> list[ContinuationScore]:
    found = dict(score_groups(net, [[pair] for pair in pairs], **settings))
    return [found[place][0] for place in range(len(pairs))]


def test_scores_are_those_of_transformers(twins):
    theirs, ours = twins
    C, V = ours.config.context_length, ours.config.vocab_size
    draw = torch.Generator().manual_seed(4)
    lengths = [(1, 1), (3, 2), (7, 1), (C - 2, 2), (C, 1), (C + 9, 3), (2, C), (5, 4)]

    def drawn(length: int) -> list[int]:
        return torch.randint(0, V, (length,), generator=draw).tolist()

    pairs = [(drawn(before), drawn(after)) for before, after in lengths]
    for text, _ in list(pairs):  # and what the model itself would say
        with torch.no_grad():
            said = theirs(torch.tensor([text[-(C - 1) :]])).logits[0, -1].argmax().item()
        pairs.append((text[-(C - 1) :], [said]))
    for batch_tokens in (1, 3 * C, 10_000):
        scores = score_continuations(ours, pairs, batch_tokens=batch_tokens)
        for (text, continuation), score in zip(pairs, scores, strict=True):
            tokens = torch.tensor([*text, *continuation])[-(C + 1) :]
            with torch.no_grad():
                log_p = theirs(tokens[None, :-1]).logits[0].log_softmax(-1)[-len(continuation) :]
            wanted = log_p[range(len(continuation)), continuation].sum().item()
            assert score.log_probability == pytest.approx(wanted, abs=1e-4)
            assert score.is_greedy == (log_p.argmax(-1).tolist() == list(continuation))
    assert all(score.is_greedy for score in scores[len(lengths) :])


def test_bad_pairs_are_refused_before_the_first_score(twins):
    _, ours = twins
    C, V = ours.config.context_length, ours.config.vocab_size
    with pytest.raises(InputError, match="pair 1 must have a text of 1 token or more"):
        score_continuations(ours, [([1], [2]), ([], [2])])
    with pytest.raises(InputError, match="pair 0 must have a text of 1 token or more"):
        score_continuations(ours, [([1], [])])
    with pytest.raises(InputError, match=f"pair 0 .* a continuation of 1 to {C}, .* got 1 and {C + 1}"):
        score_continuations(ours, [([1], [1] * (C + 1))])
    with pytest.raises(InputError, match=str(V)):
        score_continuations(ours, [([1], [V])])


def test_groups_that_share_a_beginning_have_the_scores_of_each_pair_alone(twins):
    _, ours = twins
    C, V = ours.config.context_length, ours.config.vocab_size
    draw = torch.Generator().manual_seed(5)

    def drawn(length: int) -> list[int]:
        return torch.randint(0, V, (length,), generator=draw).tolist()

    text = drawn(9)
    groups = [
        [(text, drawn(n)) for n in (1, 4, 2, 4)],  # answers to a question, one of them a token
        [([*text, token], [3, 5]) for token in (1, 2)],  # texts that part before the answer
        [(drawn(3), drawn(2)), (drawn(3), drawn(2))],  # that have nothing in common
        [(text, [1, 2]), (text, [1, 2])],  # the same twice
        [(drawn(C - 4), drawn(4)) for _ in range(3)],
        [(long := drawn(C - 3), drawn(4)), (long, drawn(3)), (long, drawn(4))],  # more than fit into a row
        [(drawn(C), drawn(3)), (text, [7])],  # one loses its beginning
        [(text, text)],
    ]
    found = dict(score_groups(ours, groups, batch_tokens=2 * C))
    assert sorted(found) == list(range(len(groups)))
    for place, group in enumerate(groups):
        for (own, continuation), score in zip(group, found[place], strict=True):
            tokens = torch.tensor([*own, *continuation])[-(C + 1) :]
            with torch.no_grad():
                log_p = ours.eval()(tokens[None, :-1])[0].log_softmax(-1)[-len(continuation) :]
            wanted = log_p[range(len(continuation)), continuation].sum().item()
            assert score.log_probability == pytest.approx(wanted, abs=1e-4)
            assert score.tokens == len(continuation)
            assert score.left_out == max(0, len(own) + len(continuation) - C - 1)


def test_a_beginning_is_read_once(twins, monkeypatch):
    _, ours = twins
    read = []
    hidden = GPTBackbone.hidden

    def counted(self, tokens, *, cache=None):
        read.append(tokens.numel())
        return hidden(self, tokens, cache=cache)

    monkeypatch.setattr(GPTBackbone, "hidden", counted)
    list(score_groups(ours, [[(list(range(20)), [1, 2, answer]) for answer in range(4)]]))
    assert read == [22]  # inputs: the question and the two tokens that all answers begin with


def test_a_pair_is_cut_where_the_text_ends():
    tokenizer = BytesTokenizer()
    assert encode_pair(tokenizer, "ab", " c") == ([97, 98], [32, 99])
    assert encode_pair(tokenizer, "ab ", "c") == ([97, 98], [32, 99])
    assert encode_pair(tokenizer, "", "c") == ([256], [99])
    # "thedog" is t, hed, og: the text keeps its own tokens, as in the harness.
    assert encode_pair(GPT2Tokenizer(), "the", "dog") == ([1169], [704, 519])
    with pytest.raises(InputError, match="adds no token"):
        encode_pair(tokenizer, "ab", "")


def test_positions_that_turn_and_rows_in_bf16_are_the_same_as_alone():
    torch.manual_seed(1)
    config = GPTConfig(
        vocab_size=61, context_length=48, emb_dim=24, n_heads=3, n_layers=2, drop_rate=0.0, qkv_bias=False,
        position="rope", norm="rmsnorm", feed_forward="swiglu",
    )  # fmt: skip
    net = GPTModel(config).eval()
    text = list(range(20))
    group = [(text, [5, 6, 7]), (text, [5, 9]), (text, [11, 3, 2, 1]), ([*text, 40], [3])]
    for dtype, near in ((torch.float32, 1e-4), (torch.bfloat16, 0.15)):
        net = net.to(dtype)
        [(_, together)] = score_groups(net, [group])
        alone = score_continuations(net, group)
        for one, other in zip(together, alone, strict=True):
            assert one.log_probability == pytest.approx(other.log_probability, abs=near)


def test_a_model_with_a_hidden_of_its_own_is_read_sequence_by_sequence(twins):
    _, ours = twins

    class Own(GPTModel):
        def hidden(self, tokens, segments=None, cache=None):
            assert cache is None
            return super().hidden(tokens, segments)

    own = Own(ours.config)
    own.load_state_dict(ours.state_dict())
    group = [([1, 2, 3], [4]), ([1, 2, 3], [5, 6])]
    [(_, found)] = score_groups(own, [group])
    [(_, wanted)] = score_groups(ours, [group])
    for one, other in zip(found, wanted, strict=True):
        assert one.log_probability == pytest.approx(other.log_probability, abs=1e-4)


def test_weights_that_are_no_numbers_are_refused(twins):
    _, ours = twins
    net = copy.deepcopy(ours)
    with torch.no_grad():
        net.final_norm.weight[0] = math.nan
    with pytest.raises(InputError, match="logits are nan: its weights are damaged, or have diverged"):
        list(score_groups(net, [[([1], [2])]]))
