"""The decoding loop against a plain loop, and on a model that counts."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptpl.errors import InputError
from gptpl.generation import generate
from gptpl.model import GPTConfig, GPTModel

V, C = 12, 6
CONFIG = GPTConfig(
    vocab_size=V, context_length=C, emb_dim=16, n_heads=2, n_layers=2, drop_rate=0.5, qkv_bias=True
)


def build() -> GPTModel:
    """A random model with opinions: its matrices are large enough for logits that are far apart."""
    torch.manual_seed(3)
    model = GPTModel(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.7)
    return model


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plain_loop(model: GPTModel, prompt: Tensor, n: int, *, temperature: float, seed: int = 0) -> Tensor:
    """The book's loop: the logits of the last position of the last C tokens, argmax or a multinomial draw."""
    generator, tokens = seeded(seed), prompt
    with torch.no_grad():
        for _ in range(n):
            logits = model.eval()(tokens[:, -C:])[:, -1, :]
            if temperature > 0:
                chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            else:
                chosen = logits.argmax(dim=-1, keepdim=True)
            tokens = torch.cat([tokens, chosen], dim=1)
    return tokens


class Counter(GPTModel):
    """Says token + 1 after each token, whatever came before; a real GPTModel to everybody else."""

    def __init__(self) -> None:
        super().__init__(GPTConfig(**{**vars(CONFIG), "emb_dim": V, "n_heads": 1}))
        self.out_head.weight = nn.Parameter(torch.eye(V))
        self.windows: list[list[list[int]]] = []

    def hidden(self, tokens: Tensor) -> Tensor:
        """One-hot of the successor, which the identity head passes on as logits."""
        self.windows.append(tokens.tolist())
        return F.one_hot((tokens + 1) % V, V).float()


@pytest.mark.parametrize("prompt_length", [1, C - 1, C, C + 3])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_equals_the_plain_loop_across_the_edge_of_the_window(prompt_length: int, temperature: float) -> None:
    prompt = torch.randint(V, (3, prompt_length), generator=seeded(1))
    model = build().train()
    tokens = generate(model, prompt, max_new_tokens=15, temperature=temperature, generator=seeded(5))
    expected = plain_loop(build(), prompt, 15, temperature=temperature, seed=5)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, expected)
    assert len(set(tokens[:, prompt_length:].flatten().tolist())) > 3  # not one token for ever


def test_only_the_last_context_length_tokens_are_seen() -> None:
    model = Counter()
    prompt = torch.tensor([[9, 9, 9, 0, 1, 2, 3, 4]])
    assert generate(model, prompt, max_new_tokens=2).tolist() == [[9, 9, 9, 0, 1, 2, 3, 4, 5, 6]]
    assert model.windows == [[[9, 0, 1, 2, 3, 4]], [[0, 1, 2, 3, 4, 5]]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_each_row_ends_at_its_own_end_of_text(temperature: float) -> None:
    model = Counter()
    with torch.no_grad():
        model.out_head.weight.mul_(1000)  # sure of itself: a draw is the greedy choice
    tokens = generate(
        model,
        torch.tensor([[0, 3], [0, 5], [7, 1]]),  # 7, the end of text, is in the prompt of the last row
        max_new_tokens=10,
        temperature=temperature,
        eot_id=7,
        generator=seeded(0),
    )
    assert tokens.tolist() == [
        [0, 3, 4, 5, 6, 7, 7, 7],
        [0, 5, 6, 7, 7, 7, 7, 7],
        [7, 1, 2, 3, 4, 5, 6, 7],
    ]
    assert len(model.windows) == 6  # nothing is computed after the last row has ended


def test_without_an_end_of_text_rows_run_on() -> None:
    assert generate(Counter(), torch.tensor([[6]]), max_new_tokens=3).tolist() == [[6, 7, 8, 9]]


def test_rows_that_do_not_end_use_up_max_new_tokens() -> None:
    tokens = generate(Counter(), torch.tensor([[6], [0]]), max_new_tokens=3, eot_id=7)
    assert tokens.tolist() == [[6, 7, 7, 7], [0, 1, 2, 3]]


def test_no_new_tokens_give_the_prompt_back() -> None:
    prompt = torch.tensor([[1, 2]])
    tokens = generate(build(), prompt, max_new_tokens=0)
    assert torch.equal(tokens, prompt)
    assert tokens.data_ptr() != prompt.data_ptr()


def test_a_batch_gives_what_its_rows_give_alone() -> None:
    prompt = torch.randint(V, (4, 3), generator=seeded(2))
    alone = [generate(build(), row[None], max_new_tokens=12) for row in prompt]
    assert torch.equal(generate(build(), prompt, max_new_tokens=12), torch.cat(alone))


def test_top_k_1_is_greedy_and_top_k_v_is_temperature_alone() -> None:
    model, prompt = build(), torch.randint(V, (3, 4), generator=seeded(2))

    def sample(**settings: Any) -> Tensor:
        return generate(model, prompt, max_new_tokens=12, generator=seeded(4), **settings)

    assert torch.equal(sample(temperature=2.0, top_k=1), sample())
    assert torch.equal(sample(temperature=2.0, top_k=V), sample(temperature=2.0))
    assert not torch.equal(sample(temperature=2.0), sample())
    assert torch.equal(sample(temperature=2.0), sample(temperature=2.0))


def test_top_k_is_obeyed() -> None:
    model, prompt = build().eval(), torch.randint(V, (64, 4), generator=seeded(2))
    tokens = generate(model, prompt, max_new_tokens=1, temperature=50.0, top_k=3, generator=seeded(0))
    with torch.no_grad():
        best = model(prompt)[:, -1].argsort(descending=True)[:, :3]  # (B, 3)
    places = (best == tokens[:, -1:]).nonzero()
    assert places[:, 0].tolist() == list(range(64))
    assert set(places[:, 1].tolist()) == {0, 1, 2}


@pytest.mark.parametrize(("temperature", "generator"), [(0.0, None), (0.0, seeded(1)), (1.0, seeded(1))])
def test_global_randomness_is_left_alone(temperature: float, generator: torch.Generator | None) -> None:
    model = build().train()
    before = torch.get_rng_state()
    generate(model, torch.tensor([[1]]), max_new_tokens=5, temperature=temperature, generator=generator)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_generator_the_global_seed_decides() -> None:
    model, prompt = build(), torch.tensor([[1]])

    def sample(seed: int) -> list[int]:
        torch.manual_seed(seed)
        return generate(model, prompt, max_new_tokens=30, temperature=1.5)[0].tolist()

    assert sample(1) == sample(1) != sample(2)


def flags(model: GPTModel) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def test_every_training_flag_is_as_it_was() -> None:
    model, seen = build().train(), []
    model.blocks[0].eval()
    before = flags(model)
    model.drop_emb.register_forward_hook(
        lambda *_: seen.append((any(flags(model).values()), torch.is_grad_enabled()))
    )
    generate(model, torch.tensor([[1]]), max_new_tokens=2)
    assert seen == [(False, False), (False, False)]
    assert flags(model) == before
    assert torch.is_grad_enabled()


def test_every_training_flag_is_as_it_was_after_an_error() -> None:
    model = build().train()
    model.blocks[1].eval()
    before = flags(model)
    with pytest.raises(IndexError):
        generate(model, torch.tensor([[V]]), max_new_tokens=2)  # an unknown token: torch raises midway
    assert flags(model) == before


def test_the_tokens_can_be_trained_on() -> None:
    model = build().train()
    tokens = generate(model, torch.tensor([[1, 2]]), max_new_tokens=3)
    model(tokens).sum().backward()
    assert model.tok_emb.weight.grad is not None


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.int64), {}, "prompt of shape (1, 0) is empty"),
        (torch.zeros(0, 4, dtype=torch.int64), {}, "prompt of shape (0, 4) is empty"),
        (torch.zeros(4, dtype=torch.int64), {}, "prompt has shape (4,)"),
        (torch.zeros(1, 1, dtype=torch.int64), {"temperature": -0.1}, "temperature=-0.1"),
        (torch.zeros(1, 1, dtype=torch.int64), {"temperature": float("nan")}, "temperature=nan"),
        (torch.zeros(1, 1, dtype=torch.int64), {"top_k": 0}, "top_k=0"),
        (torch.zeros(1, 1, dtype=torch.int64), {"top_k": V + 1}, "top_k=13 is out of range: give 1 to 12"),
        (torch.zeros(1, 1, dtype=torch.int64), {"max_new_tokens": -1}, "max_new_tokens=-1"),
    ],
)
def test_impossible_requests_are_named_before_any_work(
    prompt: Tensor, settings: dict[str, Any], message: str
) -> None:
    model = Counter()
    with pytest.raises(InputError) as error:
        generate(model, prompt, **{"max_new_tokens": 0, **settings})
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert model.windows == []
