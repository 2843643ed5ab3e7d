"""Limits of settings: what passes, what is refused and how, from Python as from the command line."""

from typing import Annotated, Literal

import pytest

from gptpl.errors import InputError
from gptpl.model import GPTConfig
from gptpl.settings import POSITIVE, SEED, SIZE, check_limits
from gptpl.training.optimizers import adamw


def component(
    *, size: Annotated[int | None, SIZE] = None, rate: Annotated[float | Literal["auto"], POSITIVE] = "auto"
) -> None:
    check_limits(component, "mine.", size=size, rate=rate)


def test_null_and_words_pass_where_the_annotation_has_them():
    component()
    component(size=3, rate=0.5)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"size": 0}, "mine.size must be a positive whole number, got 0"),
        ({"size": True}, "mine.size must be a positive whole number, got True"),
        ({"rate": 0}, "mine.rate must be positive, got 0"),
        ({"rate": float("nan")}, "mine.rate must be positive, got nan"),
    ],
)
def test_a_value_out_of_its_limit(given, said):
    with pytest.raises(InputError, match=f"^{said}$"):
        component(**given)


def test_null_does_not_pass_where_the_annotation_has_none():
    with pytest.raises(InputError, match="n_heads must be a positive whole number, got None"):
        GPTConfig(vocab_size=9, context_length=8, emb_dim=8, n_heads=None, n_layers=1, qkv_bias=False)  # type: ignore[arg-type]


def test_ours_check_what_they_declare():
    with pytest.raises(InputError, match=r"lr must be positive, got -1$"):
        adamw(None, lr=-1)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"betas must be two numbers from 0 to below 1, got \[0.9\]"):
        adamw(None, betas=[0.9])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="seed must be from 0 to 4294967295, got 4294967296"):
        SEED.check("seed", 2**32)
