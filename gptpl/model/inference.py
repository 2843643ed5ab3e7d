"""Decoding with a KV cache: a new token costs the work of one token, not of the whole sequence.

`CachedGPT` runs the model's own forward pass on a copy whose linear layers have the layout that a CPU
multiplies fastest, with a `KVCache` that attention writes to and reads.
"""

# B rows, T time, D model, H heads, K head width, C capacity, S positions attended to, V vocabulary
# of a linear layer: M rows, I inputs, O outputs, P parts

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gptpl.errors import InputError
from gptpl.model.gpt import GPTConfig, GPTModel
from gptpl.model.lora import LowRankLinear

Linear = Callable[[Tensor], Tensor]
Module = TypeVar("Module", bound=nn.Module)

PARTS = 8  # of a layer that is split for one row, so that as many cores share its product
_OPERATIONS = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
# Used by torch's compiler, but not public: where one is missing, layers stay as they are.


class KVCache:
    """Keys and values of up to `capacity` tokens per row in every layer, allocated once.

    Rows may differ in length: each is written at its own end, and `mask` hides what lies beyond.

    Attributes:
        keys, values: one tensor (B, H, C, K) per layer.
        lengths: tokens in each row, B integers on the host.

    Bytes: 2 * n_layers * B * C * emb_dim * (4 in fp32, 2 in bf16); 75 MB per row of GPT-2 small in fp32.
    """

    def __init__(
        self, config: GPTConfig, *, rows: int, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        # Zeros, not uninitialised memory: a masked weight of 0 times NaN would be NaN.
        shape = (rows, config.n_heads, capacity, config.emb_dim // config.n_heads)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layers)]
        self.lengths = [0] * rows

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write the first T tokens of every row, or one at every row's end: keys and values (B, H, T, K).

        Returns those they attend to, (B, H, S, K). The caller updates `lengths`, once for all layers.
        """
        ends, T = self.lengths, keys.shape[2]
        all_keys, all_values = self.keys[layer], self.values[layer]
        if self._even:
            all_keys[:, :, ends[0] : ends[0] + T] = keys
            all_values[:, :, ends[0] : ends[0] + T] = values
            if not ends[0]:
                return keys, values  # in their own data type
        else:
            rows = torch.arange(len(ends), device=keys.device)
            places = torch.tensor(ends, device=keys.device)
            all_keys[rows, :, places] = keys[:, :, 0].to(all_keys.dtype)
            all_values[rows, :, places] = values[:, :, 0].to(all_values.dtype)
        S = max(ends) + T
        return all_keys[:, :, :S], all_values[:, :, :S]

    def mask(self) -> Tensor | None:
        """Which keys that `extend` will return belong to each row: (B, 1, 1, S); None: all."""
        if self._even:
            return None
        ends = torch.tensor(self.lengths, device=self.keys[0].device)[:, None, None, None]  # (B, 1, 1, 1)
        return torch.arange(max(self.lengths) + 1, device=ends.device) <= ends

    def positions(self, T: int) -> Tensor:
        """Positions of each row's next T tokens: (B, T) int64."""
        return torch.tensor([range(n, n + T) for n in self.lengths], device=self.keys[0].device)

    def select(self, rows: list[int]) -> None:
        """Keep these rows, in this order; a row may be repeated, as when beams branch."""
        if rows == list(range(len(self.lengths))):
            return
        index = torch.tensor(rows, dtype=torch.int64, device=self.keys[0].device)
        self.keys = [keys.index_select(0, index) for keys in self.keys]
        self.values = [values.index_select(0, index) for values in self.values]
        self.lengths = [self.lengths[row] for row in rows]

    @property
    def _even(self) -> bool:
        return len(set(self.lengths)) <= 1


class CachedGPT:
    """Next-token logits of `model` with a `KVCache`, equal to `GPTModel.forward` up to rounding.

    It works as in evaluation mode, whatever mode the model is in. The linear layers are packed (see `packed`)
    for about `rows` rows at a time, which takes the memory of their weights again and 0.1 s for GPT-2 small:
    to decode many texts, make one and pass it in place of the model. Make a new one when the weights have
    changed. Call it without gradients.
    """

    def __init__(self, model: GPTModel, *, rows: int) -> None:
        self.config = model.config
        self.model = model
        self._packed = _packed_copy(model, rows=rows)

    def new_cache(self, *, rows: int, capacity: int) -> KVCache:
        """An empty cache on the model's device, in the type of its weights; on a CPU always in fp32."""
        # On a CPU, attention of one token over bf16 keys takes eight times as long as over fp32 ones.
        dtype = torch.float32 if self.model.device.type == "cpu" else self.model.tok_emb.weight.dtype
        return KVCache(self.config, rows=rows, capacity=capacity, device=self.model.device, dtype=dtype)

    def prefill(self, prompts: Sequence[Sequence[int]], cache: KVCache) -> Tensor:
        """Read B prompts into the empty cache; returns the logits (B, V) of the token after each.

        Raises InputError for an empty prompt and for one longer than the context.
        """
        lengths, most = [len(prompt) for prompt in prompts], self.config.context_length
        T = max(lengths)
        if not 1 <= min(lengths) <= T <= most:
            raise InputError(f"prompts must have 1 to {most} tokens, got {min(lengths)} to {T}")
        # A shorter row is padded behind its end, where causal attention never looks.
        padded = [[*prompt, *[0] * (T - len(prompt))] for prompt in prompts]
        hidden = self._packed.hidden(torch.tensor(padded, device=self.model.device), cache=cache)  # (B, T, D)
        cache.lengths = lengths
        last = torch.tensor(lengths, device=self.model.device) - 1
        return self._packed.out_head(hidden[torch.arange(len(lengths), device=self.model.device), last])

    def step(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Append one token to each row, (B,) int64; returns the logits (B, V) of the token after it.

        Every row must have room in the context and in the cache.
        """
        hidden = self._packed.hidden(tokens[:, None], cache=cache)  # (B, 1, D)
        cache.lengths = [length + 1 for length in cache.lengths]
        return self._packed.out_head(hidden[:, 0])


def _packed_copy(module: Module, *, rows: int) -> Module:
    """The module in evaluation mode, with packed linear layers; all other weights are shared."""
    made = copy.copy(module)
    made.training = False
    # In the instance's own dictionary they hide the submodules and are found and called faster.
    vars(made).update({name: _called(child, rows) for name, child in module.named_children()})
    return made


def _called(module: nn.Module, rows: int) -> Any:
    """A callable in place of a submodule."""
    if isinstance(module, nn.ModuleList):
        return [_called(each, rows) for each in module]
    if isinstance(module, nn.Linear):
        return packed(module, rows=rows)
    return (lambda x: x) if isinstance(module, nn.Dropout) else _packed_copy(module, rows=rows).forward


# --------------------------------------------------------------------------------------------- linear layers


def packed(layer: nn.Linear, *, rows: int) -> Linear:
    """The layer, (..., I) -> (..., O), with its weights rearranged for about `rows` rows at a time.

    On a CPU with oneDNN the weights are copied into its blocked layout: torch's own product of one fp32 row
    uses one core and, of a few rows, rearranges the weights at each call. GPT-2 small, two cores: one row in
    17 ms instead of 36, eight in 21 instead of 56 (experiments/generation_speed). Anything but a plain
    `nn.Linear` on such a CPU is returned unchanged. A low-rank layer is merged first, on any device.

    The copy does not follow later changes of the weights, and has no gradients.
    """
    if isinstance(layer, LowRankLinear):
        layer = layer.merged()
    if type(layer) is not nn.Linear or not can_pack(layer.weight):
        return layer
    splits = layer.weight.dtype == torch.float32 and layer.out_features <= layer.in_features
    if rows == 1 and splits and layer.out_features % PARTS == 0:
        return _split(layer)
    weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows)
    bias = None if layer.bias is None else layer.bias.detach()
    multiply = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: multiply(x, weight, bias, "none", [], "")


def can_pack(weight: Tensor) -> bool:
    """Whether `packed` rearranges such weights: fp32 or bf16, on a CPU, in a torch built with oneDNN."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if not all(hasattr(torch.ops.mkldnn, name) for name in _OPERATIONS):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def _split(layer: nn.Linear) -> Linear:
    """The layer as a batch of products on its own weights, which several cores share.

    For one row and no more outputs than inputs this is as fast as oneDNN's layout, or faster.
    """
    outputs, inputs = layer.weight.shape
    parts = layer.weight.detach().view(PARTS, outputs // PARTS, inputs).transpose(1, 2)  # (P, I, O / P)
    bias = None if layer.bias is None else layer.bias.detach()

    def multiply(x: Tensor) -> Tensor:
        rows = x.reshape(1, -1, inputs).expand(PARTS, -1, -1)  # (P, M, I)
        y = torch.bmm(rows, parts).transpose(0, 1)  # (M, P, O / P)
        y = y.reshape(*x.shape[:-1], outputs)
        return y if bias is None else y + bias

    return multiply
