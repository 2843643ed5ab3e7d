"""A look at a model in evaluation mode that leaves it as it was found."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put `model` in evaluation mode, and give every submodule its flag back at the end, also after an error.

    `model.train()` would not do: it would also wake submodules that were in evaluation mode (frozen ones).
    """
    found = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in found:
            module.training = training
