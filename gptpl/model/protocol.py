"""What gptpl requires of a model, and what more a model can offer. All questions to a model are asked here.

A language model is any `nn.Module` whose `forward` maps tokens (B, T) int64 to next-token logits (B, T, V),
position t from the tokens 0..t alone, with two whole numbers as attributes, its own or of its `config`:
`vocab_size`, V, and `context_length`, the largest T. It can be trained, evaluated, resumed and sampled.

What a model may have besides, and what it is used for:

    hidden(tokens), out_head    `forward` in two steps: logits of some positions only and, where the head is
                                linear without bias, the fused head loss
    cached(rows=)               a form for decoding that keeps what it has read, see `Cached`
    blocks                      an `nn.ModuleList` of equal layers: compiled and sharded one by one
    recompute_blocks            a flag: recompute the blocks' activations in the backward pass
    forward(tokens, segments)   several texts packed into a row, see `GPTBackbone.hidden`
    flops_per_token(T)          the arithmetic of training on one token of a row of T, for MFU

`GPTModel` has them all (its arithmetic is in `gptpl.training.costs`). A feature whose part is missing is
skipped, or raises InputError with its name. A subclass of `GPTModel` inherits no `cached` and, with a
`forward` but no `hidden` of its own, no `hidden` either.
"""

# B batch, T time, V vocabulary

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gptpl.errors import InputError
from gptpl.model.gpt import GPTBackbone, GPTModel


class Cached(Protocol):
    """A model that continues rows from a cache, such as `CachedGPT`.

    A cache has `select(rows)`: keep these rows, in this order; a row may be repeated.
    """

    @property
    def model(self) -> nn.Module:
        """The model itself, where the cache cannot be used."""

    def new_cache(self, *, rows: int, capacity: int) -> Any:
        """An empty cache for so many rows of up to `capacity` tokens."""

    def prefill(self, prompts: Sequence[Sequence[int]], cache: Any) -> Tensor:
        """Read the prompts, up to context_length tokens each: the logits (B, V) after them."""

    def step(self, tokens: Tensor, cache: Any) -> Tensor:
        """Append one token to each row, (B,) int64: the logits (B, V) after it."""


def vocab_size(model: nn.Module | Cached) -> int:
    """V. Raises InputError for a model without it."""
    return _number(model, "vocab_size")


def context_length(model: nn.Module | Cached) -> int:
    """The most tokens that the model reads at once. Raises InputError for a model without it."""
    return _number(model, "context_length")


def device_of(model: nn.Module | Cached) -> torch.device:
    """Where the weights are."""
    return next(module_of(model).parameters()).device


def module_of(model: nn.Module | Cached) -> nn.Module:
    """The model itself, also of a form for decoding."""
    return model if isinstance(model, nn.Module) else model.model


def class_path(model: object) -> str:
    """The model's class as a `_target_` names it: `mypackage.models.TinyRNN`."""
    return f"{type(model).__module__}.{type(model).__qualname__}"


def check_language_model(net: nn.Module, *, tokens: int = 1, max_length: int = 1) -> None:
    """Raise InputError for a model that lacks its two numbers or does not map a token to logits.

    Its vocabulary must hold the tokenizer's `tokens`, its context the sequences of `max_length`.
    """
    V, C = vocab_size(net), context_length(net)
    if tokens > V:
        raise InputError(f"vocab_size of {class_path(net)} must be {tokens} or more (the tokenizer), got {V}")
    if max_length > C:
        raise InputError(
            f"data.max_length={max_length} is longer than context_length={C} of {class_path(net)}:"
            " shorten it, or give the model a longer context"
        )
    with torch.inference_mode(), eval_mode(net):
        logits = net(torch.zeros(1, 1, dtype=torch.int64, device=device_of(net)))
    if not isinstance(logits, Tensor) or logits.shape != (1, 1, V):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise InputError(
            f"{class_path(net)} must map tokens of shape (1, 1) to logits of shape (1, 1, {V}), got {got}"
        )


def body_and_head(net: nn.Module) -> tuple[Callable[..., Tensor], nn.Module]:
    """`forward` in two steps, `head(body(tokens))`; without such parts `forward` itself and an identity."""
    hidden, head = getattr(net, "hidden", None), getattr(net, "out_head", None)
    if isinstance(net, GPTModel) and type(net).forward is not GPTModel.forward:
        hidden = None if type(net).hidden is GPTModel.hidden else hidden
    if callable(hidden) and not isinstance(hidden, nn.Module) and isinstance(head, nn.Module):
        return hidden, head
    return net, nn.Identity()


def reads_branches(net: nn.Module) -> bool:
    """Whether `hidden` takes positions and mask from what stands in place of its cache: GPT-2's own does."""
    body, _ = body_and_head(net)
    return getattr(body, "__func__", None) is GPTBackbone.hidden


def has_fused_head(net: nn.Module) -> bool:
    """Whether the head is a linear layer without bias, which the loss can be fused with."""
    _, head = body_and_head(net)
    return isinstance(head, nn.Linear) and head.bias is None


def takes_segments(net: nn.Module) -> bool:
    """Whether several texts may be packed into one row."""
    return "segments" in inspect.signature(net.forward).parameters


def blocks_of(net: nn.Module) -> Sequence[nn.Module]:
    """The model's equal layers; empty where it has no `blocks`."""
    blocks = getattr(net, "blocks", None)
    return list(blocks) if isinstance(blocks, nn.ModuleList) else []


def cached_form(model: nn.Module | Cached, *, rows: int) -> Cached | None:
    """The model's form for decoding about `rows` rows at a time, or the given form; None: it has none."""
    if not isinstance(model, nn.Module):
        return model
    return model.cached(rows=rows) if "cached" in vars(type(model)) else None  # type: ignore[operator]


def gpt_model(net: nn.Module, need: str) -> GPTModel:
    """The model as a `GPTModel`; InputError, which begins with `need`, for another class."""
    if type(net) is GPTModel:
        return net
    raise InputError(f"{need}, this model is a {class_path(net)}")


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put `model` in evaluation mode, and restore the mode of every submodule at the end.

    `model.train()` would also change submodules that were in evaluation mode before.
    """
    found = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in found:
            module.training = training


def _number(model: nn.Module | Cached, name: str) -> int:
    for owner in (model, getattr(model, "config", None)):
        if isinstance(value := getattr(owner, name, None), int):
            return value
    raise InputError(f"{class_path(model)} needs a whole number as its attribute {name}")
