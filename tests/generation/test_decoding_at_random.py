"""Random models, prompts and settings: each row of a batch is what a plain loop without a cache writes."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from gptpl.generation import Decoding, SamplingRules, next_token
from gptpl.generation.sampling import row_generators
from gptpl.model import GPTConfig, GPTModel

CPU = torch.device("cpu")


def random_model(draw: random.Random) -> GPTModel:
    n_heads = draw.choice([1, 2])
    model = GPTModel(
        GPTConfig(
            vocab_size=draw.choice([2, 5, 17, 40]),
            context_length=draw.choice([1, 2, 3, 7, 12]),
            emb_dim=8 * n_heads,
            n_heads=n_heads,
            n_layers=draw.choice([1, 2]),
            drop_rate=0.3,
            qkv_bias=draw.random() < 0.5,
            tie_weights=draw.random() < 0.5,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.6)
    return model


def random_rules(draw: random.Random, vocab_size: int) -> SamplingRules:
    choices: dict[str, Any] = {
        "temperature": draw.choice([0.5, 1.0, 3.0]),
        "top_k": draw.randint(1, vocab_size),
        "top_p": draw.choice([0.5, 0.9]),
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.7,
        "banned_tokens": (draw.randrange(vocab_size),),
        "forced_tokens": (draw.randrange(vocab_size), draw.randrange(vocab_size)),
    }
    return SamplingRules(**{name: value for name, value in choices.items() if draw.random() < 0.4})


@torch.no_grad()
def plain_loop(
    model: GPTModel,
    prompt: Sequence[int],
    n: int,
    *,
    rules: SamplingRules,
    generator: torch.Generator,
    eot_id: int | None,
) -> list[int]:
    """The whole window anew for every token of one row."""
    new: list[int] = []
    model.eval()
    while len(new) < n and (not new or new[-1] != eot_id):
        tokens = torch.tensor([[*prompt, *new]])
        logits = model(tokens[:, -model.config.context_length :])[:, -1]
        written = tokens[:, len(prompt) :]
        chosen = next_token(logits, rules, tokens=tokens, written=written, generators=[generator])
        new.append(int(chosen))
    return new


@pytest.mark.parametrize("seed", range(60))
def test_every_row_is_what_a_plain_loop_writes(seed: int) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    model = random_model(draw)
    V, C = model.config.vocab_size, model.config.context_length
    rules, samples, n = random_rules(draw, V), draw.choice([1, 1, 2, 3]), draw.randint(0, 15)
    prompts = [
        [draw.randrange(V) for _ in range(draw.randint(1, 2 * C + 1))] for _ in range(draw.randint(1, 4))
    ]
    eot_id = draw.choice([None, 0])
    decoding = Decoding(
        model.train(),
        prompts,
        rules=rules,
        max_new_tokens=n,
        num_samples=samples,
        eot_id=eot_id,
        generator=torch.Generator().manual_seed(seed),
    )
    while decoding.step():
        pass
    expected = []
    for prompt in prompts:
        generator = torch.Generator().manual_seed(seed)
        for own in row_generators(generator, prompts=1, samples=samples, device=CPU):
            expected.append(plain_loop(model, prompt, n, rules=rules, generator=own, eot_id=eot_id))
    assert decoding.written == expected
