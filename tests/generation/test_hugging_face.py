"""Greedy text, beams and filtered distributions are those of Hugging Face's `generate`."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from gptpl.generation import SamplingRules, generate, reshape_logits
from gptpl.generation.decoding import beam_search
from gptpl.generation.sampling import keep_min_p, keep_top_k, keep_top_p, keep_typical, penalise_repetition
from gptpl.model import GPTModel

V = 61
Twins = tuple[Any, GPTModel]


def prompts(rows: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [1, 4])
def test_greedy(twins: Twins, rows: int) -> None:
    theirs, ours = twins
    prompt = prompts(rows, 6)
    expected = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False
    )
    assert generate(ours, prompt, max_new_tokens=40).tolist() == expected.tolist()
    assert len(set(expected[:, 6:].flatten().tolist())) > 5


@pytest.mark.parametrize("penalty", [0.7, 1.3, 2.0])
def test_greedy_with_a_repetition_penalty(twins: Twins, penalty: float) -> None:
    theirs, ours = twins
    prompt = prompts(3, 6)
    settings = {"max_new_tokens": 40, "do_sample": False, "repetition_penalty": penalty}
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    found = generate(ours, prompt, max_new_tokens=40, rules=SamplingRules(repetition_penalty=penalty))
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("num_beams", [1, 2, 5])
def test_beam_search(twins: Twins, num_beams: int) -> None:
    theirs, ours = twins
    ended = 0
    for seed in range(6):
        prompt = prompts(1, 5, seed)
        # A token that the model likes to write, so that some beams end and others do not.
        eot_id = int(generate(ours, prompt, max_new_tokens=8)[0, -1])
        out = theirs.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            num_beams=num_beams,
            num_return_sequences=num_beams,
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=eot_id,
            return_dict_in_generate=True,
            output_scores=True,
        )
        found = beam_search(
            ours,
            prompt[0].tolist(),
            num_beams=num_beams,
            max_new_tokens=12,
            eot_id=eot_id,
        )
        expected = [without_padding(row[5:].tolist(), eot_id) for row in out.sequences]
        assert [list(beam.tokens) for beam in found] == expected
        if num_beams > 1:
            torch.testing.assert_close(torch.tensor([beam.score for beam in found]), out.sequences_scores)
        ended += sum(row[-1] == eot_id for row in expected)
    assert ended > 0


def without_padding(row: list[int], eot_id: int) -> list[int]:
    return row[: row.index(eot_id) + 1] if eot_id in row else row


def random_logits(seed: int) -> Tensor:
    return 3 * torch.randn(5, V, generator=torch.Generator().manual_seed(seed))


RULES = [
    (lambda x: keep_top_k(x, 7), TopKLogitsWarper(7)),
    (lambda x: keep_top_p(x, 0.8), TopPLogitsWarper(0.8)),
    (lambda x: keep_top_p(x, 0.01), TopPLogitsWarper(0.01)),
    (lambda x: keep_min_p(x, 0.05), MinPLogitsWarper(0.05)),
    (lambda x: keep_typical(x, 0.6), TypicalLogitsWarper(0.6)),
    (
        lambda x: keep_typical(keep_top_k(x, 9), 0.9),
        lambda i, x: TypicalLogitsWarper(0.9)(i, TopKLogitsWarper(9)(i, x)),
    ),
]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("ours", "theirs"), RULES)
def test_filtered_distributions(ours: Any, theirs: Any, seed: int) -> None:
    logits = random_logits(seed)
    expected = theirs(prompts(5, 3), logits.clone())
    assert torch.equal(ours(logits), expected)
    kept = expected.isfinite().sum(dim=-1)
    assert kept.min() >= 1
    assert kept.max() < V


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.7])
def test_repetition_penalty(penalty: float) -> None:
    logits, tokens = random_logits(1), prompts(5, 9)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(tokens, logits.clone())
    torch.testing.assert_close(penalise_repetition(logits, tokens, penalty), expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
        {"temperature": 1.8, "top_k": 30, "min_p": 0.02, "repetition_penalty": 1.4},
        {"temperature": 1.3, "top_p": 0.95, "typical_p": 0.7},
        {"temperature": 1.0, "top_k": 25, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.95},
    ],
)
def test_rules_together_act_in_the_same_order(twins: Twins, settings: dict[str, float]) -> None:
    theirs, ours = twins
    prompt = prompts(3, 6)
    torch.manual_seed(0)
    out = theirs.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=True,
        max_new_tokens=5,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_scores=True,
        **({"top_k": 0} | settings),
    )
    rules = SamplingRules(**settings)  # type: ignore[arg-type]
    for n, scores in enumerate(out.scores):
        tokens = out.sequences[:, : 6 + n]
        with torch.no_grad():
            logits = ours(tokens)[:, -1]
        found = reshape_logits(logits, rules, tokens=tokens, written=tokens[:, 6:])
        assert torch.equal(found == -math.inf, scores == -math.inf)
        torch.testing.assert_close(found.softmax(-1), scores.softmax(-1))
        assert (scores == -math.inf).any()
