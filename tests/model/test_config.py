"""GPTConfig refuses every impossible shape with one line that names the value."""

from dataclasses import FrozenInstanceError
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gptpl.errors import InputError
from gptpl.model import GPTConfig, GPTModel
from gptpl.weights.starting import RandomWeights

BOOK: dict[str, Any] = {
    "vocab_size": 50257,
    "context_length": 256,
    "emb_dim": 768,
    "n_heads": 12,
    "n_layers": 12,
    "drop_rate": 0.1,
    "qkv_bias": False,
}


def test_the_defaults_are_the_books_model() -> None:
    config = GPTConfig(**BOOK)
    assert (config.tie_weights, config.init) == (False, "torch")


@pytest.mark.parametrize("field", ["vocab_size", "context_length", "emb_dim", "n_heads", "n_layers"])
@pytest.mark.parametrize("size", [0, -3, 2.5, "12"])
def test_a_size_is_a_positive_whole_number(field: str, size: object) -> None:
    with pytest.raises(InputError) as error:
        GPTConfig(**{**BOOK, field: size})
    assert f"{field} must be a positive whole number, got {size!r}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("emb_dim", 770, "emb_dim must be a multiple of n_heads, got emb_dim=770, n_heads=12"),
        ("drop_rate", 1.0, "below 1, got 1.0"),
        ("drop_rate", -0.1, "below 1, got -0.1"),
        ("drop_rate", float("nan"), "below 1, got nan"),
        ("init", "xavier", "init='xavier' is unknown: choose one of torch, gpt2"),
        ("norm", "batchnorm", "norm='batchnorm' is unknown: choose one of layernorm, rmsnorm"),
        ("hidden_dim", 0, "hidden_dim must be a positive whole number, got 0"),
        ("rope_base", 1.0, "rope_base must be a number above 1, got 1.0"),
    ],
)
def test_impossible_values_are_named(field: str, value: object, message: str) -> None:
    with pytest.raises(InputError) as error:
        GPTConfig(**{**BOOK, field: value})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": 3_000_000, "emb_dim": 12}, "n_layers must be at most 10,000, got 3000000"),
        ({"emb_dim": 12 * 10**8}, "emb_dim=1200000000 makes a model of 207,3"),
        ({"vocab_size": 10**18}, "bytes in float32, which no memory holds: give smaller sizes"),
        ({"hidden_dim": 10**12}, "hidden_dim=1000000000000 makes a model of"),
        ({"context_length": 10**30}, "context_length=1000000000000000000000000000000 makes a model of"),
        ({"n_heads": True}, "n_heads must be a positive whole number, got True"),
    ],
)
def test_sizes_that_no_memory_holds_are_refused_at_once(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        GPTConfig(**{**BOOK, **changes})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"qkv_bias": True},
        {"tie_weights": True},
        {"position": "rope"},
        {"norm": "rmsnorm"},
        {"feed_forward": "swiglu"},
        {"feed_forward": "swiglu", "linear_bias": False, "hidden_dim": 77},
        {"linear_bias": False},
    ],
)
def test_the_number_of_parameters_is_that_of_the_model(changes: dict[str, Any]) -> None:
    config = GPTConfig(**{**BOOK, **changes})
    with torch.device("meta"):
        model = GPTModel(config)
    assert config.n_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert config.block_matrices == sum(p.numel() for p in model.blocks[0].parameters() if p.dim() == 2)


def test_rotary_positions_need_pairs() -> None:
    GPTConfig(**{**BOOK, "n_heads": 3, "emb_dim": 9})
    with pytest.raises(InputError, match="even head width, got emb_dim / n_heads = 3"):
        GPTConfig(**{**BOOK, "n_heads": 3, "emb_dim": 9, "position": "rope"})


def test_a_configuration_cannot_change() -> None:
    config = GPTConfig(**BOOK)
    with pytest.raises(FrozenInstanceError):
        config.emb_dim = 1024  # type: ignore[misc]


def test_a_shape_has_no_defaults() -> None:
    for field in BOOK.keys() - {"drop_rate"}:
        with pytest.raises(TypeError, match=field):
            GPTConfig(**{name: value for name, value in BOOK.items() if name != field})
    assert GPTConfig(**{name: value for name, value in BOOK.items() if name != "drop_rate"}).drop_rate == 0.1


def test_a_model_that_the_machine_has_no_memory_for_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    config = GPTConfig(**{**BOOK, "n_layers": 1})
    memory = SimpleNamespace(total=2 * config.n_parameters)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    monkeypatch.setattr("psutil.swap_memory", lambda: memory)
    RandomWeights().make_model(config)
    memory.total -= 1
    with pytest.raises(InputError, match=r"a model of 84,[\d,]+ parameters takes 0 GB in float32"):
        RandomWeights().make_model(config)
