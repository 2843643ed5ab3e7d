"""Cached decoding against the book's loop, which computes everything anew, and on a model that counts."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from gptpl.errors import InputError
from gptpl.generation import Decoding, SamplingRules, generate
from gptpl.model import GPTConfig, GPTModel

V, C = 12, 6
MODERN = {"position": "rope", "norm": "rmsnorm", "feed_forward": "swiglu", "linear_bias": False}
CONFIG = GPTConfig(
    vocab_size=V, context_length=C, emb_dim=16, n_heads=2, n_layers=2, drop_rate=0.5, qkv_bias=True
)
HOT = SamplingRules(temperature=2.0)


def build(**changes: Any) -> GPTModel:
    """A random model with opinions: its matrices are large enough for logits that are far apart."""
    torch.manual_seed(3)
    model = GPTModel(GPTConfig(**{**vars(CONFIG), **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.7)
    return model


def counter() -> GPTModel:
    """Says token + 1 after each token, whatever came before, and is sure of it."""
    model = GPTModel(GPTConfig(**{**vars(CONFIG), "emb_dim": V, "n_heads": 1}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.tok_emb.weight.copy_(torch.eye(V))
        model.final_norm.weight.fill_(100.0)
        model.out_head.weight.copy_(torch.eye(V).roll(1, dims=0))
    return model


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def book_loop(
    model: GPTModel, prompt: Sequence[int], n: int, *, temperature: float, seed: int = 0
) -> list[int]:
    """The book's loop: the logits of the last position of the last C tokens, argmax or a multinomial draw."""
    generator, tokens = seeded(seed), torch.tensor([prompt])
    model.eval()
    with torch.no_grad():
        for _ in range(n):
            logits = model(tokens[:, -model.config.context_length :])[:, -1, :]
            if temperature > 0:
                chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            else:
                chosen = logits.argmax(dim=-1, keepdim=True)
            tokens = torch.cat([tokens, chosen], dim=1)
    return tokens[0, len(prompt) :].tolist()


def decoded(model: GPTModel, prompts: Sequence[Sequence[int]], n: int, **settings: Any) -> list[list[int]]:
    decoding = Decoding(model, prompts, **{"rules": SamplingRules(), "max_new_tokens": n, **settings})
    while decoding.step():
        pass
    return decoding.written


# --- cached = uncached --------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_tokens_across_the_end_of_the_context_are_the_book_loops(temperature: float) -> None:
    size = {"vocab_size": 211, "context_length": 50, "emb_dim": 48, "n_heads": 4, "n_layers": 3}
    model, prompt = build(**size), list(range(20))
    expected = book_loop(model, prompt, 90, temperature=temperature, seed=5)
    rules = SamplingRules(temperature=temperature)
    assert decoded(model.train(), [prompt], 90, rules=rules, generator=seeded(5)) == [expected]
    assert len(set(expected)) > 20


@pytest.mark.parametrize(("temperature", "architecture"), [(0.0, {}), (0.8, {}), (0.0, MODERN)])
def test_prompts_of_all_lengths_together_are_what_they_are_alone(
    temperature: float, architecture: dict[str, Any]
) -> None:
    """Below, at and above the context length, so that rows leave the cache at different steps."""
    model, prompts = (
        build(**architecture),
        [[1], [2, 3, 4], [5] * (C - 1), [6] * C, [7, 8] * C, list(range(V))],
    )
    rules = SamplingRules(temperature=temperature)
    expected = [book_loop(model, prompt, 9, temperature=temperature, seed=5) for prompt in prompts]
    assert decoded(model, prompts, 9, rules=rules, generator=seeded(5)) == expected
    assert len({token for row in expected for token in row}) > 3


@pytest.mark.parametrize("prompt_length", [1, C - 1, C, C + 3])
def test_tensors_come_back_as_tensors(prompt_length: int) -> None:
    prompt = torch.randint(V, (3, prompt_length), generator=seeded(1))
    tokens = generate(build(), prompt, max_new_tokens=15)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens[:, :prompt_length], prompt)
    assert tokens[:, prompt_length:].tolist() == [
        book_loop(build(), row, 15, temperature=0) for row in prompt.tolist()
    ]


# --- ends ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_each_row_ends_at_its_own_end_of_text(temperature: float) -> None:
    tokens = generate(
        counter(),
        torch.tensor([[0, 3], [0, 5], [7, 1]]),  # 7, the end of text, is in the prompt of the last row
        max_new_tokens=10,
        rules=SamplingRules(temperature=temperature),
        eot_id=7,
        generator=seeded(0),
    )
    assert tokens.tolist() == [
        [0, 3, 4, 5, 6, 7, 7, 7],
        [0, 5, 6, 7, 7, 7, 7, 7],
        [7, 1, 2, 3, 4, 5, 6, 7],
    ]


def test_a_row_that_has_ended_is_computed_no_longer() -> None:
    batches = []
    decoding = Decoding(counter(), [[3], [5], [1]], rules=SamplingRules(), max_new_tokens=10, eot_id=7)
    while step := decoding.step():
        batches.append((step.rows, step.tokens))
    assert batches == [
        ([0, 1, 2], [4, 6, 2]),
        ([0, 1, 2], [5, 7, 3]),
        ([0, 2], [6, 4]),
        ([0, 2], [7, 5]),
        ([2], [6]),
        ([2], [7]),
    ]


def test_a_row_can_be_ended_from_outside() -> None:
    decoding = Decoding(counter(), [[3], [5]], rules=SamplingRules(), max_new_tokens=3)
    decoding.step()
    decoding.end([0])
    assert decoding.rows == [1]
    while decoding.step():
        pass
    assert decoding.written == [[4], [6, 7, 8]]


def test_a_row_ended_before_the_first_step_writes_nothing() -> None:
    decoding = Decoding(counter(), [[3], [5]], rules=SamplingRules(), max_new_tokens=3, num_samples=2)
    decoding.end([0, 3])
    while decoding.step():
        pass
    assert decoding.written == [[], [4, 5, 6], [6, 7, 8], []]


def test_without_an_end_of_text_rows_run_on() -> None:
    assert generate(counter(), torch.tensor([[6]]), max_new_tokens=3).tolist() == [[6, 7, 8, 9]]


def test_no_new_tokens_give_the_prompt_back() -> None:
    prompt = torch.tensor([[1, 2]])
    tokens = generate(build(), prompt, max_new_tokens=0)
    assert torch.equal(tokens, prompt)
    assert tokens.data_ptr() != prompt.data_ptr()


# --- samples and seeds --------------------------------------------------------------------------------


def test_samples_of_a_prompt_differ_and_do_not_depend_on_company() -> None:
    model = build()

    def sampled(prompts: list[list[int]], num_samples: int) -> list[list[int]]:
        return decoded(model, prompts, 12, rules=HOT, num_samples=num_samples, generator=seeded(4))

    together = sampled([[1, 2], [3], [1, 2]], 3)
    assert together[:3] == together[6:] == sampled([[1, 2]], 3)
    assert together[3:6] == sampled([[3]], 3)
    assert together[:2] == sampled([[1, 2]], 2)
    assert len({tuple(row) for row in together[:3]}) == 3


def test_rows_may_have_generators_of_their_own() -> None:
    model, prompts = build(), [[1, 2], [3]]
    both = decoded(model, prompts, 12, rules=HOT, num_samples=2, generator=[seeded(n) for n in range(4)])
    for row, written in enumerate(both):
        assert [written] == decoded(model, [prompts[row // 2]], 12, rules=HOT, generator=seeded(row))
    with pytest.raises(InputError, match="one for each of 4 rows, got 3"):
        Decoding(
            model,
            prompts,
            rules=HOT,
            max_new_tokens=1,
            num_samples=2,
            generator=[seeded(n) for n in range(3)],
        )


def test_long_prompts_have_samples_too() -> None:
    prompt = [1, 2] * C
    rows = decoded(build(), [prompt, [3]], 4, rules=HOT, num_samples=2, generator=seeded(4))
    assert rows[0] == book_loop(build(), prompt, 4, temperature=2.0, seed=4)
    assert rows[2] == book_loop(build(), [3], 4, temperature=2.0, seed=4)
    assert rows[0] != rows[1]


def test_a_seed_reproduces_and_the_generator_moves_on() -> None:
    model, generator = build(), seeded(4)
    first, second = (decoded(model, [[1], [2]], 12, rules=HOT, generator=generator) for _ in range(2))
    assert first == decoded(model, [[1], [2]], 12, rules=HOT, generator=seeded(4))
    assert first != second


def test_greedy_and_seeded_decoding_leave_global_randomness_alone() -> None:
    model = build()
    before = torch.get_rng_state()
    decoded(model, [[1]], 5)
    decoded(model, [[1]], 5, rules=HOT, generator=seeded(1), num_samples=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_generator_the_global_seed_decides() -> None:
    model = build()

    def sample(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return decoded(model, [[1]], 30, rules=HOT)

    assert sample(1) == sample(1) != sample(2)


def test_top_k_1_is_greedy_and_top_k_v_is_temperature_alone() -> None:
    model, prompts = build(), [[1, 2], [3]]

    def sample(**rules: Any) -> list[list[int]]:
        return decoded(model, prompts, 12, rules=SamplingRules(**rules), generator=seeded(4))

    assert sample(temperature=2.0, top_k=1) == sample()
    assert sample(temperature=2.0, top_k=V) == sample(temperature=2.0)
    assert sample(temperature=2.0) != sample()


# --- rules that look back -----------------------------------------------------------------------------


def test_forced_tokens_come_first_and_banned_ones_never() -> None:
    rules = SamplingRules(temperature=3.0, forced_tokens=(9, 2), banned_tokens=(0, 1, 2))
    rows = decoded(build(), [[1], [2, 3]], 60, rules=rules, generator=seeded(0))
    for row in rows:
        assert row[:2] == [9, 2]
        assert set(row[2:]) == set(range(3, V))


def test_a_frequency_penalty_counts_the_new_text_alone() -> None:
    """The counter says 5 after 4, unless that was punished: by new tokens, not by those of the prompt."""
    strong = SamplingRules(frequency_penalty=1e6)
    assert decoded(counter(), [[5, 4]], 1, rules=strong) == [[5]]
    (row,) = decoded(counter(), [[5, 4]], V, rules=strong)
    assert sorted(row) == list(range(V))
    assert decoded(counter(), [[5, 4]], 1, rules=SamplingRules(presence_penalty=1e6)) == [[5]]


# --- what the model thought ---------------------------------------------------------------------------


def test_details_are_those_of_the_model_itself() -> None:
    model = build()
    rules = SamplingRules(temperature=0.5, top_k=2, repetition_penalty=1.5)
    decoding = Decoding(
        model, [[1, 2], [3]], rules=rules, max_new_tokens=8, generator=seeded(0), alternatives=3
    )
    rows: list[list[int]] = [[1, 2], [3]]
    while step := decoding.step():
        assert step.details is not None
        for row, token, details in zip(step.rows, step.tokens, step.details, strict=True):
            with torch.no_grad():
                p = model.eval()(torch.tensor([rows[row][-C:]]))[0, -1].double().softmax(-1)
            assert details.log_probability == pytest.approx(float(p[token].log()), abs=1e-5)
            assert details.entropy == pytest.approx(float(-(p * p.log()).sum()), abs=1e-5)
            best = p.topk(3)
            assert [token for token, _ in details.alternatives] == best.indices.tolist()
            chances = [chance for _, chance in details.alternatives]
            assert chances == pytest.approx(best.values.log().tolist(), abs=1e-5)
            rows[row].append(token)
    assert len(rows[0]) == 10


def test_no_details_unless_asked_for() -> None:
    step = Decoding(build(), [[1]], rules=SamplingRules(), max_new_tokens=1).step()
    assert step is not None
    assert step.details is None


# --- the model stays as it is -------------------------------------------------------------------------


def flags(model: GPTModel) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def test_modes_weights_and_gradients_are_as_they_were() -> None:
    model = build().train()
    model.blocks[0].eval()
    before, weights = flags(model), {name: p.clone() for name, p in model.named_parameters()}
    tokens = generate(model, torch.tensor([[1, 2]]), max_new_tokens=2 * C)  # in the cache, and beyond it
    assert flags(model) == before
    assert torch.is_grad_enabled()
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    model(tokens[:, :C]).sum().backward()  # the tokens can be trained on
    assert model.tok_emb.weight.grad is not None


# --- bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.int64), {}, "B, T >= 1, got (1, 0)"),
        (torch.zeros(0, 4, dtype=torch.int64), {}, "B, T >= 1, got (0, 4)"),
        (torch.zeros(4, dtype=torch.int64), {}, "prompt must have shape (B, T) with B, T >= 1, got (4,)"),
        (torch.tensor([[1, V]]), {}, f"prompt must hold token ids from 0 to {V - 1}, got {V}"),
        (
            torch.tensor([[1]]),
            {"rules": SamplingRules(top_k=V + 1)},
            "top_k must be from 1 to 12 (the vocabulary), got 13",
        ),
        (
            torch.tensor([[1]]),
            {"rules": SamplingRules(banned_tokens=(V,))},
            "banned_tokens must hold token ids",
        ),
        (torch.tensor([[1]]), {"rules": SamplingRules(banned_tokens=tuple(range(V)))}, "all 12 tokens"),
        (
            torch.tensor([[1]]),
            {"rules": SamplingRules(forced_tokens=(-1,))},
            "forced_tokens must hold token ids",
        ),
        (torch.tensor([[1]]), {"max_new_tokens": -1}, "max_new_tokens must be at least 0, got -1"),
    ],
)
def test_impossible_requests_are_named(prompt: Tensor, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        generate(build(), prompt, **{"max_new_tokens": 0, **settings})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"alternatives": -1}, "got -1"),
        ({"alternatives": V + 1}, "alternatives must be from 0 to 12, got 13"),
        ({"prompts": []}, "there must be one"),
        ({"prompts": [[1], []]}, "at least one token"),
    ],
)
def test_impossible_decodings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        Decoding(build(), **{"prompts": [[1]], "rules": SamplingRules(), "max_new_tokens": 1, **settings})
    assert message in str(error.value)
