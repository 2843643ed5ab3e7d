"""Scores of continuations: those of transformers' model, one pair at a time."""

import pytest
import torch

from gptpl.errors import InputError
from gptpl.evaluation.surprisal import score_continuations


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
    for batch_size in (1, 3, 100):
        scores = list(score_continuations(ours, pairs, batch_size=batch_size))
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
