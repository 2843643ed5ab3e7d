"""What gptpl asks of a model: little of every one, more of one that can do more. All questions stand here.

A language model is any `nn.Module` whose `forward` maps tokens (B, T) int64 to next-token logits (B, T, V),
position t from the tokens 0..t alone, with two whole numbers, as attributes of its own or of its `config`:
`vocab_size`, V, and `context_length`, the largest T. It trains, is evaluated, resumes, is saved, writes text.

What a model may have besides, and what that gives:

    hidden(tokens), out_head    `forward` in two steps: the logits of some positions without the others', and,
                                where the head is linear without bias, the fused head loss
    cached(rows=)               a form for decoding that keeps what it has read, see `Cached`
    blocks                      an `nn.ModuleList` of layers of one kind: compiled and sharded one by one
    recompute_blocks            a flag: recompute the blocks' activations in the backward pass
    forward(tokens, segments)   several texts in one row, see `GPTBackbone.hidden`, which has `segments` too
    flops_per_token(T)          the arithmetic of training on one token of a row of T: MFU

`GPTModel` has them all (its arithmetic is in `gptpl.training.flops`). What needs one that is not there does
without, or raises InputError and names it. A subclass of `GPTModel` is asked as if it were a stranger's: it
inherits no `cached`, and, with a `forward` but no `hidden` of its own, no `hidden` either.
"""

# B batch, T time, V vocabulary

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gptpl.errors import InputError
from gptpl.model.gpt import GPTModel


class Cached(Protocol):
    """A model that continues rows from what a cache of its own kind holds of them; `CachedGPT` is one.

    A cache has `select(rows)`: keep these rows, in this order, some maybe several times.
    """

    @property
    def model(self) -> nn.Module:
        """The model itself, for what the cache cannot do."""

    def new_cache(self, *, rows: int, capacity: int) -> Any:
        """An empty cache for so many rows of up to `capacity` tokens."""

    def prefill(self, prompts: Sequence[Sequence[int]], cache: Any) -> Tensor:
        """Read the prompts, of up to context_length tokens each: the logits (B, V) after them."""

    def step(self, tokens: Tensor, cache: Any) -> Tensor:
        """Append one token to each row, (B,) int64: the logits (B, V) after it."""


def vocab_size(model: nn.Module | Cached) -> int:
    """V. Raises InputError for a model that does not say it."""
    return _number(model, "vocab_size")


def context_length(model: nn.Module | Cached) -> int:
    """The most tokens that the model reads at once. Raises InputError for a model that does not say it."""
    return _number(model, "context_length")


def device_of(model: nn.Module | Cached) -> torch.device:
    """Where the weights are."""
    return next((model if isinstance(model, nn.Module) else model.model).parameters()).device


def class_path(model: object) -> str:
    """The model's class as a `_target_` names it: `mypackage.models.TinyRNN`."""
    return f"{type(model).__module__}.{type(model).__qualname__}"


def check_language_model(net: nn.Module, *, tokens: int = 1, max_length: int = 1) -> None:
    """Raises InputError for a model that lacks its two numbers or does not map tokens to logits.

    It is asked for the logits of one token, in evaluation mode. Its vocabulary must hold the tokenizer's
    `tokens`, its context the sequences of `max_length` that it will read.
    """
    V, C = vocab_size(net), context_length(net)
    if tokens > V:
        raise InputError(f"{class_path(net)} has vocab_size={V}, the tokenizer {tokens} tokens: enlarge it")
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
            f"{class_path(net)} gives {got} for tokens of shape (1, 1): its forward must give logits"
            f" (B, T, V), here (1, 1, {V})"
        )


def body_and_head(net: nn.Module) -> tuple[Callable[..., Tensor], nn.Module]:
    """`forward` in two steps, `head(body(tokens))`: `body` gives one vector per position, which `head` reads.

    Of a model without such parts: `forward` itself, and a head that changes nothing.
    """
    hidden, head = getattr(net, "hidden", None), getattr(net, "out_head", None)
    if isinstance(net, GPTModel) and type(net).forward is not GPTModel.forward:
        hidden = None if type(net).hidden is GPTModel.hidden else hidden
    if callable(hidden) and not isinstance(hidden, nn.Module) and isinstance(head, nn.Module):
        return hidden, head
    return net, nn.Identity()


def has_fused_head(net: nn.Module) -> bool:
    """Whether `body_and_head` ends with a linear layer without bias, which the loss can be fused with."""
    _, head = body_and_head(net)
    return isinstance(head, nn.Linear) and head.bias is None


def takes_segments(net: nn.Module) -> bool:
    """Whether several texts may be packed into one row."""
    return "segments" in inspect.signature(net.forward).parameters


def blocks_of(net: nn.Module) -> Sequence[nn.Module]:
    """The model's layers of one kind; none where it does not say which they are."""
    blocks = getattr(net, "blocks", None)
    return list(blocks) if isinstance(blocks, nn.ModuleList) else []


def cached_form(model: nn.Module | Cached, *, rows: int) -> Cached | None:
    """The model's form for decoding about so many rows at a time; a form is its own. None: it has none."""
    if not isinstance(model, nn.Module):
        return model
    return model.cached(rows=rows) if "cached" in vars(type(model)) else None  # type: ignore[operator]


def gpt_model(net: nn.Module, need: str) -> GPTModel:
    """The model, for what GPT-2 alone can do: `need`, such as "format=hf holds GPT-2 models".

    Raises InputError for another one.
    """
    if type(net) is GPTModel:
        return net
    raise InputError(f"{need}, this model is a {class_path(net)}")


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


def _number(model: nn.Module | Cached, name: str) -> int:
    for owner in (model, getattr(model, "config", None)):
        if isinstance(value := getattr(owner, name, None), int):
            return value
    raise InputError(f"{class_path(model)} has no {name}: give the model an attribute {name}, a whole number")
