"""eval_mode gives every submodule its own flag back."""

import pytest
from torch import nn

from gptpl.model import eval_mode


def half_frozen() -> nn.Sequential:
    frozen = nn.Dropout(0.5).eval()
    return nn.Sequential(nn.Dropout(0.5), nn.Sequential(frozen), nn.Dropout(0.5))


def flags(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def test_every_flag_comes_back() -> None:
    model = half_frozen()
    with eval_mode(model):
        assert not any(flags(model))
    assert flags(model) == flags(half_frozen()) == [True, True, True, False, True]


def test_also_after_an_error() -> None:
    model = half_frozen()
    with pytest.raises(KeyError), eval_mode(model):
        raise KeyError
    assert flags(model) == flags(half_frozen())
