"""Decoding with a KV cache: a new token costs the work of one token, not of the whole sequence.

`CachedGPT` runs the model's own forward pass on a copy whose linear layers have the layout that a CPU
multiplies fastest, with a `KVCache` that attention writes to and reads. `Int8GPT` has weights of one byte, a
quarter of what a CPU otherwise reads for every token.
"""

# B rows, T time, D model, H heads, K head width, C capacity, S positions attended to, V vocabulary
# of a linear layer: M rows, I inputs, O outputs, P parts

import copy
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from gptpl.errors import InputError
from gptpl.model.gpt import Cache, GPTModel
from gptpl.model.lora import LowRankLinear

Linear = Callable[[Tensor], Tensor]
Module = TypeVar("Module", bound=nn.Module)

PARTS = 8  # of a layer that is split for one row, so that as many cores share its product
_OPERATIONS = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
# Used by torch's compiler, but not public: where one is missing, layers stay as they are.
_ALIGNED = 64
_STEPS_BEFORE_GRAPH = 3  # recording takes about as long as so many
_RECORDING = threading.Lock()  # one graph at a time in a process
_INT8_OPERATIONS = ("linear_prepack", "linear_with_input_q_dq_qweight_dq_output_fp32")
# FBGEMM's, read in torch 2.11 to 2.13, which means to remove tensors of quantized types some day.
_LARGEST = 127  # of an int8 weight, either sign
_HALF = 63  # of a digit, either sign: products with int8 weights, two by two, then fit into the 16 bits that
# processors without VNNI add them up in
_ROWS = 256  # that an int8 product computes at a time: the digits' outputs are twice as large as its own


class KVCache:
    """Keys and values of up to `capacity` tokens per row in every layer, allocated once.

    Rows may differ in length: each is written at its own end, and `mask` hides what lies beyond.

    Attributes:
        keys, values: one tensor (B, H, C, K) per layer.
        lengths: tokens in each row, B integers on the host.
        ends: None, or the lengths on the device, (B,) int64: then a step's operations and their shapes do not
            depend on the lengths, as a CUDA graph needs. One token of each row is written, and it attends to
            the whole capacity, through `mask`.
        graph: None, or the step of these rows as a CUDA graph, see `CachedGPT.step`.
        steps: tokens that these rows have been given one by one.

    It is on the model's device, in the type of its weights; on a CPU always in fp32.

    Bytes: 2 * n_layers * B * C * emb_dim * (4 in fp32, 2 in bf16); 75 MB per row of GPT-2 small in fp32.
    """

    def __init__(self, model: GPTModel, *, rows: int, capacity: int) -> None:
        self._model, config, device = model, model.config, model.device
        # On a CPU attention of one token over bf16 keys takes eight times as long.
        dtype = torch.float32 if device.type == "cpu" else model.tok_emb.weight.dtype
        # Zeros, not uninitialised memory: a masked weight of 0 times NaN would be NaN.
        shape = (rows, config.n_heads, capacity, config.emb_dim // config.n_heads)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layers)]
        self.lengths = [0] * rows
        self.ends: Tensor | None = None
        self.graph: _StepGraph | None = None
        self.steps = 0

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write the first T tokens of every row, or one at every row's end: keys and values (B, H, T, K).

        Returns those they attend to, (B, H, S, K). The caller updates `lengths`, once for all layers.
        """
        ends, T = self.lengths, keys.shape[2]
        all_keys, all_values = self.keys[layer], self.values[layer]
        if self.ends is not None:
            self._write(layer, self.ends, keys, values)
            return all_keys, all_values
        if self._even:
            all_keys[:, :, ends[0] : ends[0] + T] = keys
            all_values[:, :, ends[0] : ends[0] + T] = values
            if not ends[0]:
                return keys, values  # in their own data type
        else:
            self._write(layer, torch.tensor(ends, device=keys.device), keys, values)
        S = max(ends) + T
        return all_keys[:, :, :S], all_values[:, :, :S]

    def _write(self, layer: int, places: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write one token of every row at its place."""
        rows = torch.arange(len(places), device=keys.device)
        self.keys[layer][rows, :, places] = keys[:, :, 0].to(self.keys[layer].dtype)
        self.values[layer][rows, :, places] = values[:, :, 0].to(self.values[layer].dtype)

    def mask(self, T: int) -> Tensor | None:
        """Which keys that `extend` will return each of the next T tokens attends to: (B or 1, 1, T, S).

        None: all, or, in an empty cache, those up to itself.
        """
        if self.ends is not None:
            capacity = self.keys[0].shape[2]
            return torch.arange(capacity, device=self.ends.device) <= self.ends[:, None, None, None]
        if self._even:
            if T == 1 or not self.lengths[0]:
                return None
            S = self.lengths[0] + T
            return torch.ones(1, 1, T, S, dtype=torch.bool, device=self.keys[0].device).tril(S - T)
        ends = torch.tensor(self.lengths, device=self.keys[0].device)[:, None, None, None]  # (B, 1, 1, 1)
        return torch.arange(max(self.lengths) + 1, device=ends.device) <= ends

    def positions(self, T: int) -> Tensor:
        """Positions of each row's next T tokens: (B, T) int64."""
        if self.ends is not None:
            return self.ends[:, None]
        return torch.tensor([range(n, n + T) for n in self.lengths], device=self.keys[0].device)

    def select(self, rows: list[int]) -> None:
        """Keep these rows, in this order; a row may be repeated, as when beams branch."""
        if rows == list(range(len(self.lengths))):
            return
        index = torch.tensor(rows, dtype=torch.int64, device=self.keys[0].device)
        self.keys = [keys.index_select(0, index) for keys in self.keys]
        self.values = [values.index_select(0, index) for values in self.values]
        self.lengths = [self.lengths[row] for row in rows]
        self.graph, self.steps = None, 0  # the graph has the old rows' memory

    def branch(self, row: int, *, length: int, capacity: int) -> "KVCache":
        """A cache with memory of its own and one row: the first `length` tokens of this one's `row`."""
        made = KVCache(self._model, rows=1, capacity=capacity)
        made.lengths = [length]
        for mine, its in zip([*self.keys, *self.values], [*made.keys, *made.values], strict=True):
            its[0, :, :length] = mine[row, :, :length]
        return made

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(tensor.nbytes for tensor in [*self.keys, *self.values])

    @property
    def _even(self) -> bool:
        return len(set(self.lengths)) <= 1


class SlotCache(KVCache):
    """A `KVCache` whose rows come and go one by one; it begins without any, and has memory for `rows`."""

    def __init__(self, model: GPTModel, *, rows: int, capacity: int) -> None:
        super().__init__(model, rows=rows, capacity=capacity)
        self._slots = [*self.keys, *self.values]
        self._use([])

    def add(self, row: KVCache) -> None:
        """Add the only row of another cache behind the others."""
        [length] = row.lengths
        for mine, its in zip(self._slots, [*row.keys, *row.values], strict=True):
            mine[len(self.lengths), :, :length] = its[0, :, :length]
        self._use([*self.lengths, length])

    def remove(self, row: int) -> None:
        """Remove a row; the last one takes its number."""
        *lengths, moved = self.lengths
        last = len(lengths)
        for slots in self._slots:
            slots[row, :, :moved] = slots[last, :, :moved]
            # A value that is not finite would spoil what uses the slot next, masked or not.
            slots[row, :, moved : self.lengths[row]] = 0
            slots[last, :, :moved] = 0
        if row < last:
            lengths[row] = moved
        self._use(lengths)

    def _use(self, lengths: list[int]) -> None:
        self.lengths = lengths
        used = [slots[: len(lengths)] for slots in self._slots]
        self.keys, self.values = used[: len(used) // 2], used[len(used) // 2 :]
        self.graph, self.steps = None, 0


class _SideBySide:
    """Caches of one row, side by side: each is continued by a piece."""

    def __init__(self, caches: Sequence[KVCache], pieces: Sequence[Sequence[int]]) -> None:
        self._caches, self._device = caches, caches[0].keys[0].device
        self._starts = [cache.lengths[0] for cache in caches]
        self._ends = [start + len(piece) for start, piece in zip(self._starts, pieces, strict=True)]

    def _places(self, T: int) -> Tensor:
        starts = torch.tensor(self._starts, device=self._device)
        return starts[:, None] + torch.arange(T, device=self._device)  # (B, T)

    def positions(self, T: int) -> Tensor:
        """Those of padding, which no token attends to, repeat the last one: the context has no more."""
        ends = torch.tensor(self._ends, device=self._device)
        return torch.minimum(self._places(T), ends[:, None] - 1)

    def mask(self, T: int) -> Tensor | None:
        if not any(self._starts):
            return None  # each attends to those up to itself
        keys = torch.arange(max(self._ends), device=self._device)  # (S,)
        return (keys <= self._places(T)[:, :, None])[:, None]  # (B, 1, T, S)

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        mine = [cache.keys[layer] for cache in self._caches], [cache.values[layer] for cache in self._caches]
        return self._append(mine[0], keys), self._append(mine[1], values)

    def _append(self, mine: Sequence[Tensor], new: Tensor) -> Tensor:
        """Write (B, H, T, K) behind what each cache has, (1, H, C, K); returns all of it, (B, H, S, K)."""
        B, H, _, K = new.shape
        every = mine[0].new_zeros(B, H, max(self._ends), K) if any(self._starts) else new
        for row, (its, start, end) in enumerate(zip(mine, self._starts, self._ends, strict=True)):
            its[0, :, start:end] = new[row, :, : end - start]
            if every is not new:
                every[row, :, :end] = its[0, :, :end]
        return every


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
        """An empty cache."""
        return KVCache(self.model, rows=rows, capacity=self._aligned(capacity))

    def slots(self, *, rows: int, capacity: int) -> SlotCache:
        """A cache for up to `rows` rows that come and go."""
        return SlotCache(self.model, rows=rows, capacity=self._aligned(capacity))

    def _aligned(self, capacity: int) -> int:
        """At least so much; on other devices than a CPU a width for which a mask needs no copy."""
        step = 1 if self.model.device.type == "cpu" else _ALIGNED
        return -(-capacity // step) * step

    def read(
        self, pieces: Sequence[Sequence[int]], caches: Sequence[KVCache], *, logits: Sequence[int]
    ) -> list[Tensor]:
        """Append a piece of a prompt to the only row of each cache, which need not be empty.

        Returns for each piece the logits (n, V) after its last n tokens, n as given. There must be room in
        the context and in the caches. Shorter pieces are padded to the longest.
        """
        cache: Cache = caches[0] if len(caches) == 1 else _SideBySide(caches, pieces)
        hidden = self._packed.hidden(padded_rows(pieces, 0, self.model.device), cache=cache)  # (B, T, D)
        last = []
        for row, piece, each, n in zip(hidden, pieces, caches, logits, strict=True):
            each.lengths = [each.lengths[0] + len(piece)]
            last.append(row[len(piece) - n : len(piece)])
        return list(self._packed.out_head(torch.cat(last)).split(list(logits)))

    def prefill(self, prompts: Sequence[Sequence[int]], cache: KVCache) -> Tensor:
        """Read B prompts into the empty cache; returns the logits (B, V) of the token after each.

        Raises InputError for an empty prompt and for one longer than the context.
        """
        lengths, most = [len(prompt) for prompt in prompts], self.config.context_length
        if not 1 <= min(lengths) <= max(lengths) <= most:
            raise InputError(f"prompts must have 1 to {most} tokens, got {min(lengths)} to {max(lengths)}")
        # A shorter row is padded behind its end, where causal attention never looks.
        hidden = self._packed.hidden(padded_rows(prompts, 0, self.model.device), cache=cache)  # (B, T, D)
        cache.lengths = lengths
        last = torch.tensor(lengths, device=self.model.device) - 1
        return self._packed.out_head(hidden[torch.arange(len(lengths), device=self.model.device), last])

    def step(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Append one token to each row, (B,) int64; returns the logits (B, V) of the token after it.

        Every row must have room in the context and in the cache. On a CUDA device, what the same rows have
        done a few times is recorded as a CUDA graph and replayed from then on: to launch a step's some 200
        kernels one by one takes longer than to run them.
        """
        if cache.graph is None and cache.steps >= _STEPS_BEFORE_GRAPH and tokens.is_cuda:
            cache.graph = _StepGraph(self._next_logits, cache)
        next_logits = self._next_logits if cache.graph is None else cache.graph.replay
        logits = next_logits(tokens, cache)
        cache.lengths = [length + 1 for length in cache.lengths]
        cache.steps += 1
        return logits

    def _next_logits(self, tokens: Tensor, cache: KVCache) -> Tensor:
        hidden = self._packed.hidden(tokens[:, None], cache=cache)  # (B, 1, D)
        return self._packed.out_head(hidden[:, 0])


def padded_rows(rows: Sequence[Sequence[int]], token: int, device: torch.device) -> Tensor:
    """The rows as one (B, T) int64 tensor, the shorter ones padded with the token."""
    tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=token).to(device)


class _StepGraph:
    """`step`, (tokens, cache) -> logits, as a CUDA graph for the rows and the memory of `cache`.

    The graph reads its tokens and the rows' lengths from the device, and masks what lies beyond them.
    """

    def __init__(self, step: Callable[[Tensor, KVCache], Tensor], cache: KVCache) -> None:
        device = cache.keys[0].device
        self._tokens = torch.zeros(len(cache.lengths), dtype=torch.int64, device=device)
        self._ends = torch.tensor(cache.lengths, device=device)
        self._graph = torch.cuda.CUDAGraph()
        cache.ends = self._ends
        try:
            with _RECORDING, torch.cuda.device(device):
                # Libraries set themselves up in a first call, which must not be recorded. What it writes, at
                # each row's end, the first replay overwrites.
                aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
                aside.wait_stream(torch.cuda.current_stream(device))
                with torch.cuda.stream(aside):
                    step(self._tokens, cache)
                torch.cuda.current_stream(device).wait_stream(aside)
                with torch.cuda.graph(self._graph, stream=aside, capture_error_mode="thread_local"):
                    self._logits = step(self._tokens, cache)
        finally:
            cache.ends = None

    def replay(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """The logits (B, V) after these tokens (B,), which are appended to the rows."""
        self._tokens.copy_(tokens)
        self._ends.copy_(torch.tensor(cache.lengths))
        self._graph.replay()
        return self._logits.clone()  # the next replay writes to the same memory


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
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    outputs, inputs = weight.shape
    if rows == 1 and weight.dtype == torch.float32 and outputs <= inputs and outputs % PARTS == 0:
        return _split(weight, bias)
    reordered = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    multiply = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: multiply(x, reordered, bias, "none", [], "")


def can_pack(weight: Tensor) -> bool:
    """Whether `packed` rearranges such weights: fp32 or bf16, on a CPU, in a torch built with oneDNN."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if not all(hasattr(torch.ops.mkldnn, name) for name in _OPERATIONS):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def _split(weight: Tensor, bias: Tensor | None) -> Linear:
    """The layer as a batch of products on its own weights (O, I), which several cores share.

    For one row and no more outputs than inputs this is as fast as oneDNN's layout, or faster.
    """
    outputs, inputs = weight.shape
    parts = weight.view(PARTS, outputs // PARTS, inputs).transpose(1, 2)  # (P, I, O / P)

    def multiply(x: Tensor) -> Tensor:
        rows = x.reshape(1, -1, inputs).expand(PARTS, -1, -1)  # (P, M, I)
        y = torch.bmm(rows, parts).transpose(0, 1)  # (M, P, O / P)
        y = y.reshape(*x.shape[:-1], outputs)
        return y if bias is None else y + bias

    return multiply


# ---------------------------------------------------------------------------------------------- int8 weights


class Int8GPT(GPTModel):
    """A `GPTModel` on a CPU whose matrices are int8, to evaluate and to generate; it cannot be trained.

    Its logits are those of the model with every matrix rounded to 255 levels a row, see `Int8Linear`, the
    token embedding included: weights take 165 MB for GPT-2 small, not 498. It is made from the layers of
    `net`, whose own weights are freed one by one: `net` cannot be used any more. Low-rank layers are merged.

    Raises InputError where torch has no int8 products.
    """

    def __init__(self, net: GPTModel) -> None:
        if not can_multiply_int8():
            raise InputError(
                "precision=int8 needs an x86 processor with AVX2, and a torch with FBGEMM, this machine's"
                f" {torch.__version__} has none: use precision=bf16-true or 32-true"
            )
        nn.Module.__init__(self)
        self.config, self.recompute_blocks = net.config, False
        for name, child in net.named_children():
            self.add_module(name, child)
        for name, module in list(self.named_modules()):
            if isinstance(module, LowRankLinear):
                module = module.merged()
            if isinstance(module, nn.Linear):
                self.set_submodule(name, Int8Linear(module))
        self.tok_emb = Int8Embedding(self.tok_emb)  # type: ignore[assignment]
        self.eval()

    def cached(self, *, rows: int) -> CachedGPT:
        """The form for decoding, for any number of rows; it takes no memory for weights."""
        return CachedGPT(self, rows=rows)


class Int8Linear(nn.Module):
    """A linear layer, (..., I) -> (..., O), of int8 weights and one fp32 scale per output.

    A row x of inputs is two digits, x = s (hi + lo / 126) with hi and lo from -63 to 63 and s its largest
    magnitude / 63, so that integer products compute both with one reading of the weights. Rounding the inputs
    costs at most 1/16,000 of the largest, less than bf16 does for most; rounding the weights at most 1/254 of
    the largest in their row.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = None if layer.bias is None else layer.bias.detach().float()
        self._packed = torch.ops.quantized.linear_prepack(_rounded(layer.weight), None)
        self._multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
        self._tiny = torch.tensor(1e-30)
        # Of hi and of x / s in the two digits, for inputs of two or three dimensions.
        of_hi, of_inputs = torch.tensor([1.0, -2 * _HALF]), torch.tensor([0.0, 2 * _HALF])
        self._factors = {
            n: (of_hi.view(2, *[1] * n), of_inputs.view(2, *[1] * n)) for n in (2, 3)
        }  # each (2, 1, ...)

    def get_extra_state(self) -> tuple[Tensor, ...]:
        """Weights (O, I), scales (O,) and bias (O,), if there is one: for `state_dict`, which copies them."""
        weight, _ = torch.ops.quantized.linear_unpack(self._packed)
        bias = () if self.bias is None else (self.bias,)
        return weight.int_repr(), weight.q_per_channel_scales(), *bias

    def forward(self, x: Tensor) -> Tensor:
        """(M, I) -> (M, O), or (B, T, I) -> (B, T, O), fp32."""
        if x.numel() > _ROWS * self.in_features:
            parts = torch.split(x.reshape(-1, self.in_features), _ROWS)
            return torch.cat([self(part) for part in parts]).view(*x.shape[:-1], self.out_features)
        # As few operations as possible: for one row each takes longer to call than to compute.
        of_hi, of_inputs = self._factors[x.dim()]
        scale = torch.add(self._tiny, x.abs().amax(-1, keepdim=True), alpha=1 / _HALF)  # (..., 1), not zero
        inputs = x / scale
        digits = torch.addcmul(inputs.round() * of_hi, inputs, of_inputs)  # (2, ..., I)
        # The operator rounds its inputs to integers; their zero point as unsigned bytes is 64.
        hi, lo = self._multiply(digits, 1.0, _HALF + 1, self._packed).unbind()  # each (..., O)
        y = torch.add(hi, lo, alpha=1 / (2 * _HALF))
        return y.mul_(scale) if self.bias is None else torch.addcmul(self.bias, y, scale)


class Int8Embedding(nn.Module):
    """An embedding of int8 rows with one fp32 scale each: the numbers of an `Int8Linear` tied to it."""

    weight: Tensor

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        rounded = _rounded(embedding.weight)
        self.register_buffer("weight", rounded.int_repr())  # (V, D)
        self._scale = rounded.q_per_channel_scales().float()[:, None]  # (V, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., T) int64 -> (..., T, D), fp32."""
        return self.weight[tokens] * self._scale[tokens]


def can_multiply_int8() -> bool:
    """Whether torch has the products of `Int8Linear` for this processor."""
    there = "fbgemm" in torch.backends.quantized.supported_engines
    return there and all(hasattr(torch.ops.quantized, name) for name in _INT8_OPERATIONS)


def _rounded(weight: Tensor) -> Tensor:
    """The matrix (O, I) in torch's type of int8 with one scale per row, its largest magnitude / 127."""
    weight = weight.detach().float()
    scales = weight.abs().amax(1).double().div(_LARGEST).clamp(min=1e-30)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
        zeros = torch.zeros(len(weight), dtype=torch.int64)
        return torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
