"""One forward pass of a `GPTModel` with everything that its parts compute kept."""

# T time, D model, H heads, L blocks, V vocabulary, W inner width of the feed-forward network

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gptpl.generation.decoding import check_prompts
from gptpl.model.gpt import GPTModel, MultiHeadAttention
from gptpl.model.protocol import eval_mode


@dataclass(frozen=True, kw_only=True)
class Block:
    """What one block computed."""

    input: Tensor
    """(T, D), the hidden states before it."""
    norm1: Tensor
    """(T, D), normalised for attention."""
    weights: Tensor
    """(H, T, T), query by key: where each head attended, rows that sum to 1."""
    mixed: Tensor
    """(T, D), the heads' values side by side, before the output projection."""
    attention: Tensor
    """(T, D), what attention adds."""
    between: Tensor
    """(T, D), the hidden states between attention and feed-forward network."""
    norm2: Tensor
    """(T, D), normalised for the feed-forward network."""
    units: Tensor
    """(T, W), its units after the activation function."""
    feed_forward: Tensor
    """(T, D), what the feed-forward network adds."""
    output: Tensor
    """(T, D), the hidden states after the block."""


@dataclass(frozen=True, kw_only=True)
class Recording:
    """What a model computed for tokens (T,), in evaluation mode."""

    tokens: Tensor
    token_embeddings: Tensor
    """(T, D)"""
    position_embeddings: Tensor | None
    """(T, D); None with rotary positions, which have no table."""
    blocks: Sequence[Block]
    final: Tensor
    """(T, D), normalised for the head."""

    @property
    def hidden(self) -> list[Tensor]:
        """The hidden states (T, D) before the first block and after each: L + 1 of them."""
        return [self.blocks[0].input, *(block.output for block in self.blocks)]


def record(model: GPTModel, tokens: Iterable[int]) -> Recording:
    """Read tokens, as many as the context holds or fewer, and keep what every part computed.

    Attention is written out for it, see `explicit_attention`; the model is as before when it ends. Takes the
    memory of all attention weights: 38 MB for 256 tokens and GPT-2 small in fp32.

    Raises InputError for no tokens, unknown ids and more than the context holds.
    """
    tokens = [int(token) for token in tokens]  # a tokenizer's are an array
    check_prompts([tokens], vocab_size=model.config.vocab_size)
    kept: dict[nn.Module, dict[str, Tensor]] = {module: {} for module in model.modules()}

    def keep(module: nn.Module, name: str, value: Tensor) -> None:
        kept[module][name] = (value[0] if value.dim() > 2 else value).float()  # positions have no batch

    def keep_call(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        keep(module, "input", inputs[0])
        keep(module, "output", output)

    given = torch.tensor([tokens], device=model.device)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(eval_mode(model))
        for module in model.modules():
            stack.callback(module.register_forward_hook(keep_call).remove)
        for module in attention_layers(model):
            stack.enter_context(_observed(module, partial(keep, module, "weights")))
        final = model.hidden(given)[0].float()
    by_name = {name: kept[module] for name, module in model.named_modules()}
    return Recording(
        tokens=given[0],
        token_embeddings=by_name["tok_emb"]["output"],
        position_embeddings=by_name.get("pos_emb", {}).get("output"),
        blocks=[_block(by_name, f"blocks.{i}") for i in range(len(model.blocks))],
        final=final,
    )


def _block(kept: dict[str, dict[str, Tensor]], name: str) -> Block:
    def of(part: str, what: str = "output") -> Tensor:
        return kept[f"{name}.{part}"][what]

    return Block(
        input=kept[name]["input"],
        norm1=of("norm1"),
        weights=of("attn", "weights"),
        mixed=of("attn.out_proj", "input"),
        attention=of("attn"),
        between=of("norm2", "input"),
        norm2=of("norm2"),
        units=of("ff.down_proj", "input"),
        feed_forward=of("ff"),
        output=kept[name]["output"],
    )


def attention_layers(model: nn.Module) -> list[MultiHeadAttention]:
    """The attention layers in the order of the blocks."""
    return [module for module in model.modules() if isinstance(module, MultiHeadAttention)]


@contextmanager
def _observed(layer: MultiHeadAttention, observe: Callable[[Tensor], Any]) -> Iterator[None]:
    """Write attention out, and hand its weights (1, H, T, T) over."""
    before = layer.kernel, layer.observe
    layer.kernel, layer.observe = "explicit", observe
    try:
        yield
    finally:
        layer.kernel, layer.observe = before
