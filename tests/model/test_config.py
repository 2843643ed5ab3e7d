"""GPTConfig refuses every impossible shape with one line that names the value."""

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from gptpl.errors import InputError
from gptpl.model import GPTConfig

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
    assert f"{field}={size!r}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("emb_dim", 770, "emb_dim=770 is not divisible by n_heads=12"),
        ("drop_rate", 1.0, "drop_rate=1.0"),
        ("drop_rate", -0.1, "drop_rate=-0.1"),
        ("drop_rate", float("nan"), "drop_rate=nan"),
        ("init", "xavier", "init='xavier' is unknown: choose one of torch, gpt2"),
    ],
)
def test_impossible_values_are_named(field: str, value: object, message: str) -> None:
    with pytest.raises(InputError) as error:
        GPTConfig(**{**BOOK, field: value})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_configuration_cannot_change() -> None:
    config = GPTConfig(**BOOK)
    with pytest.raises(FrozenInstanceError):
        config.emb_dim = 1024  # type: ignore[misc]


def test_a_shape_has_no_defaults() -> None:
    for field in BOOK:
        with pytest.raises(TypeError, match=field):
            GPTConfig(**{name: value for name, value in BOOK.items() if name != field})
