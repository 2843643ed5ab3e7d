"""The cached model gives the logits of the whole one: prompts of any lengths, row by row, in any order."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gptpl.errors import InputError
from gptpl.model import CachedGPT, GPTConfig, GPTModel, Int8GPT
from gptpl.model.inference import Int8Embedding, Int8Linear, can_multiply_int8, can_pack, packed
from gptpl.model.lora import add_low_rank
from gptpl.model.loss import evaluation_loss

V, C = 31, 16
MODERN = {"position": "rope", "norm": "rmsnorm", "feed_forward": "swiglu", "linear_bias": False}
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [11, 12, 13]]


def build(dtype: torch.dtype = torch.float32, *, tied: bool = False, **changes: Any) -> GPTModel:
    torch.manual_seed(5)
    model = GPTModel(
        GPTConfig(
            vocab_size=V,
            context_length=C,
            emb_dim=32,
            n_heads=4,
            n_layers=3,
            drop_rate=0.5,
            qkv_bias=not tied,
            tie_weights=tied,
            **changes,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model.to(dtype)


def whole(model: GPTModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """Logits after each row by the model itself, one row at a time."""
    with torch.no_grad():
        return torch.stack([model.eval()(torch.tensor([row]))[0, -1] for row in rows])


@torch.no_grad()
def grown(cached: CachedGPT, rows: list[list[int]], steps: int) -> tuple[list[list[int]], Tensor]:
    """The rows with `steps` more tokens each, (7 * row + step) % V, and the logits after them."""
    cache = cached.new_cache(rows=len(rows), capacity=max(map(len, rows)) + steps)
    logits = cached.prefill(rows, cache)
    for step in range(steps):
        new = [(7 * row + step) % V for row in range(len(rows))]
        logits = cached.step(torch.tensor(new), cache)
        rows = [[*row, token] for row, token in zip(rows, new, strict=True)]
    return rows, logits


@pytest.mark.parametrize("steps", [0, 1, 10])
@pytest.mark.parametrize("rows", [PROMPTS, PROMPTS[:1], [PROMPTS[0], PROMPTS[3]]])
@pytest.mark.parametrize("architecture", [{}, MODERN], ids=["gpt2", "modern"])
def test_logits_are_those_of_the_whole_model(
    architecture: dict[str, Any], rows: list[list[int]], steps: int
) -> None:
    model = build(**architecture)
    longer, logits = grown(CachedGPT(model, rows=len(rows)), rows, steps)
    torch.testing.assert_close(logits, whole(model, longer), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", [{}, MODERN], ids=["gpt2", "modern"])
def test_a_row_may_fill_the_context(architecture: dict[str, Any]) -> None:
    model = build(tied=True, **architecture)
    longer, logits = grown(CachedGPT(model, rows=2), [[1] * (C - 3), [2]], 3)
    assert len(longer[0]) == C
    torch.testing.assert_close(logits, whole(model, longer), rtol=1e-4, atol=1e-4)


def test_bf16_stays_bf16_and_close() -> None:
    model = build(torch.bfloat16)
    longer, logits = grown(CachedGPT(model, rows=4), PROMPTS, 5)
    assert logits.dtype == torch.bfloat16
    expected = whole(model, longer)
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()


def test_without_packing_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    monkeypatch.setattr("gptpl.model.inference.can_pack", lambda weight: False)
    longer, logits = grown(CachedGPT(model, rows=4), PROMPTS, 5)
    torch.testing.assert_close(logits, whole(model, longer), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("rows", [[2, 0], [1, 1, 3], [0, 1, 2, 3], []])
def test_rows_can_be_dropped_moved_and_doubled(rows: list[int]) -> None:
    model = build()
    cached = CachedGPT(model, rows=4)
    cache = cached.new_cache(rows=4, capacity=C)
    cached.prefill(PROMPTS, cache)
    cache.select(rows)
    if not rows:
        assert cache.lengths == []
        return
    new = list(range(20, 20 + len(rows)))
    logits = cached.step(torch.tensor(new), cache)
    expected = whole(model, [[*PROMPTS[row], token] for row, token in zip(rows, new, strict=True)])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("rows", [PROMPTS, PROMPTS[:1]], ids=["uneven", "one"])
@pytest.mark.parametrize("architecture", [{}, MODERN], ids=["gpt2", "modern"])
def test_steps_of_fixed_shapes_are_the_same(architecture: dict[str, Any], rows: list[list[int]]) -> None:
    """As a CUDA graph records them: their lengths are on the device."""
    model = build(**architecture)
    cached = CachedGPT(model, rows=len(rows))
    cache = cached.new_cache(rows=len(rows), capacity=C)
    cached.prefill(rows, cache)
    for token in (3, 4, 5):
        cache.ends = torch.tensor(cache.lengths)
        logits = cached.step(torch.full((len(rows),), token), cache)
        rows = [[*row, token] for row in rows]
        torch.testing.assert_close(logits, whole(model, rows), rtol=1e-4, atol=1e-4)
    cache.ends = None  # and what they wrote can be read as ever
    logits = cached.step(torch.full((len(rows),), 6), cache)
    torch.testing.assert_close(logits, whole(model, [[*row, 6] for row in rows]), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_training_mode_is_neither_used_nor_changed() -> None:
    model = build().train()
    cached = CachedGPT(model, rows=1)
    first, again = (cached.prefill([[1, 2, 3]], cached.new_cache(rows=1, capacity=4)) for _ in range(2))
    assert torch.equal(first, again)  # dropout of 0.5 is off
    assert all(module.training for module in model.modules())


@torch.no_grad()
@pytest.mark.parametrize(("lengths", "words"), [([3, 0], "got 0 to 3"), ([C + 1], "1 to 16 tokens, got 17")])
def test_impossible_prompts_are_refused(lengths: list[int], words: str) -> None:
    cached = CachedGPT(build(), rows=1)
    with pytest.raises(InputError, match=words):
        cached.prefill([[1] * length for length in lengths], cached.new_cache(rows=len(lengths), capacity=C))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 24), (8, 24), (2, 5, 24)])
def test_a_packed_layer_multiplies_as_the_layer(
    shape: tuple[int, ...], bias: bool, dtype: torch.dtype
) -> None:
    layer = nn.Linear(24, 57, bias=bias).to(dtype)
    x = torch.randn(shape, dtype=dtype)
    fast = packed(layer, rows=shape[0])
    assert (fast is not layer) == can_pack(layer.weight)
    torch.testing.assert_close(fast(x), layer(x))


def test_what_is_not_a_plain_linear_layer_is_left_alone() -> None:
    class Lora(nn.Linear):
        """Computes something else than its weight says."""

    layer = Lora(3, 4)
    assert packed(layer, rows=1) is layer


# ---------------------------------------------------------------------------------------------- int8 weights

needs_int8 = pytest.mark.skipif(not can_multiply_int8(), reason="int8 products are FBGEMM's, for x86 alone")


def rounded(weight: Tensor) -> Tensor:
    """The matrix with each row rounded to multiples of its largest magnitude / 127, in fp64."""
    scale = weight.detach().double().abs().amax(1, keepdim=True) / 127
    return (weight.detach().double() / scale).round() * scale


def with_rounded_matrices(model: GPTModel) -> GPTModel:
    """A copy of the model whose matrices, but the position table, are rounded."""
    state = {
        name: rounded(tensor).float() if tensor.dim() == 2 and not name.startswith("pos_emb") else tensor
        for name, tensor in model.state_dict().items()
    }
    copy = GPTModel(model.config).eval()
    copy.load_state_dict(state)
    return copy


def test_this_torch_multiplies_int8_where_it_is_built_for_x86() -> None:
    """torch means to remove the types that `_rounded` makes, and with them `quantized::linear_prepack`."""
    assert can_multiply_int8() == ("fbgemm" in torch.backends.quantized.supported_engines)


@needs_int8
@torch.inference_mode()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 24), (2, 5, 24), (600, 24), (0, 24)])
def test_an_int8_layer_multiplies_with_its_rounded_weights(shape: tuple[int, ...], bias: bool) -> None:
    layer = nn.Linear(24, 57, bias=bias)
    x = torch.randn(shape)
    x[..., 3] *= 50  # leaves few levels for the others
    x[:1] = 0
    y = Int8Linear(layer)(x)
    expected = x.double() @ rounded(layer.weight).T + (layer.bias if bias else 0)
    assert y.shape == (*shape[:-1], 57)
    allowed = x.abs().amax(-1, keepdim=True) / 15_800 * layer.weight.abs().sum(1) + 1e-6
    assert ((y - expected).abs() <= allowed).all()


@needs_int8
@torch.inference_mode()
def test_the_largest_products_do_not_overflow() -> None:
    """On a processor without VNNI two products are added up in 16 bits, and cut off at 32,767."""
    layer = nn.Linear(4096, 16, bias=False)
    layer.weight.fill_(1.0)
    x = torch.ones(1, 4096)
    torch.testing.assert_close(Int8Linear(layer)(x), layer(x), rtol=1e-5, atol=0)
    torch.testing.assert_close(Int8Linear(layer)(-x), layer(-x), rtol=1e-5, atol=0)


@needs_int8
@torch.inference_mode()
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", [{}, MODERN], ids=["gpt2", "modern"])
def test_an_int8_model_is_the_model_with_rounded_matrices(architecture: dict[str, Any], tied: bool) -> None:
    model = build(tied=tied, **architecture)
    expected = with_rounded_matrices(model)
    small = Int8GPT(model)
    assert not any(isinstance(module, nn.Linear) for module in small.modules())
    rows, logits = grown(small.cached(rows=4), PROMPTS, 10)
    tokens = torch.randint(V, (3, C))
    for ours, theirs in ((logits, whole(expected, rows)), (small(tokens), expected(tokens))):
        assert (ours - theirs).abs().max() < 3e-3 * theirs.abs().max()
    ours, theirs = (evaluation_loss(each, tokens[:, :-1], tokens[:, 1:]) for each in (small, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)


@needs_int8
@torch.inference_mode()
def test_int8_weights_are_those_of_merged_low_rank_layers() -> None:
    model = build()
    add_low_rank(model, rank=2, alpha=4, dropout=0.0, targets=["qkv", "down_proj", "out_head"])
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.normal_(std=0.3)
    tokens = torch.randint(V, (1, C))
    before = model.eval()(tokens)
    after = Int8GPT(model)(tokens)
    assert (after - before).abs().max() < 0.05 * before.abs().max()


@needs_int8
def test_a_tied_table_has_the_numbers_of_the_head() -> None:
    model = build(tied=True)
    expected = rounded(model.tok_emb.weight)
    small = Int8GPT(model)
    assert isinstance(small.tok_emb, Int8Embedding)
    assert small.tok_emb.weight.dtype == torch.int8
    torch.testing.assert_close(small.tok_emb(torch.arange(V)).double(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("changes", [{}, MODERN], ids=["gpt2", "modern"])
def test_a_prompt_read_in_pieces_gives_the_logits_of_the_whole_one(changes):
    model = build(**changes)
    cached, tokens = CachedGPT(model, rows=2), list(range(1, 14))
    cache = cached.new_cache(rows=1, capacity=C)
    with torch.no_grad():
        found = [
            cached.read([tokens[a:b]], [cache], logits=[b - a])[0]
            for a, b in ((0, 3), (3, 4), (4, 11), (11, 13))
        ]
        expected = model.eval()(torch.tensor([tokens]))[0]
    torch.testing.assert_close(torch.cat(found), expected, rtol=0, atol=2e-4)
    assert cache.lengths == [13]


@pytest.mark.parametrize("changes", [{}, MODERN], ids=["gpt2", "modern"])
@pytest.mark.parametrize("known", [(0, 0, 0, 0), (0, 5, 1, 9), (4, 4, 4, 4)])
@torch.no_grad()
def test_pieces_of_prompts_side_by_side_have_the_logits_of_each_prompt_alone(changes, known):
    model = build(**changes).eval()
    cached = CachedGPT(model, rows=2)
    lengths, wanted = [12, 7, 2, C], [1, 2, 1, 4]
    prompts = [[(7 * row + t) % V for t in range(length)] for row, length in enumerate(lengths)]
    caches = [cached.new_cache(rows=1, capacity=length) for length in lengths]
    known = [min(n, length - 1) for n, length in zip(known, lengths, strict=True)]
    for prompt, cache, n in zip(prompts, caches, known, strict=True):
        if n:
            cached.read([prompt[:n]], [cache], logits=[1])
    pieces = [prompt[n:] for prompt, n in zip(prompts, known, strict=True)]
    wanted = [min(n, len(piece)) for n, piece in zip(wanted, pieces, strict=True)]
    found = cached.read(pieces, caches, logits=wanted)
    for prompt, cache, logits, n in zip(prompts, caches, found, wanted, strict=True):
        torch.testing.assert_close(logits, model(torch.tensor([prompt]))[0, -n:], rtol=0, atol=2e-4)
        alone = cached.new_cache(rows=1, capacity=len(prompt))
        cached.read([prompt], [alone], logits=[1])
        torch.testing.assert_close(cache.keys, alone.keys, rtol=0, atol=2e-4)
        torch.testing.assert_close(cache.values, alone.values, rtol=0, atol=2e-4)
        assert cache.lengths == [len(prompt)]


@torch.no_grad()
def test_rows_of_a_slot_cache_come_and_go_without_touching_one_another():
    model = build()
    cached = CachedGPT(model, rows=3)
    slots = cached.slots(rows=3, capacity=C)

    def add(prompt: Sequence[int]) -> None:
        cache = cached.new_cache(rows=1, capacity=len(prompt))
        cached.read([prompt], [cache], logits=[1])
        slots.add(cache)

    rows = [list(prompt) for prompt in PROMPTS[:3]]
    for row in rows:
        add(row)
    for remove, new in ((0, [20, 21]), (1, None), (1, [22] * 7), (0, None), (0, None), (None, [1])):
        if remove is not None:
            slots.remove(remove)
            rows[remove] = rows[-1]
            rows.pop()
        if new is not None:
            add(new)
            rows.append(new)
        assert slots.lengths == list(map(len, rows))
        if not rows:
            continue
        tokens = [(3 * i + 1) % V for i in range(len(rows))]
        rows = [[*row, token] for row, token in zip(rows, tokens, strict=True)]
        torch.testing.assert_close(
            cached.step(torch.tensor(tokens), slots), whole(model, rows), rtol=0, atol=2e-4
        )


@torch.no_grad()
def test_what_a_removed_row_left_behind_cannot_spoil_the_next_one():
    model = build()
    cached = CachedGPT(model, rows=2)
    slots = cached.slots(rows=2, capacity=C)
    for prompt in ([1, 2], [3, 4, 5, 6, 7]):
        cache = cached.new_cache(rows=1, capacity=8)
        cached.read([prompt], [cache], logits=[1])
        if prompt[0] == 3:
            for tensor in [*cache.keys, *cache.values]:
                tensor.fill_(torch.nan)
        slots.add(cache)
    slots.remove(1)
    cache = cached.new_cache(rows=1, capacity=1)
    cached.read([[9]], [cache], logits=[1])
    slots.add(cache)
    found = cached.step(torch.tensor([10, 11]), slots)
    torch.testing.assert_close(found, whole(model, [[1, 2, 10], [9, 11]]), rtol=0, atol=2e-4)


@torch.no_grad()
def test_a_branch_is_a_copy_of_a_row_s_beginning():
    model = build()
    cached = CachedGPT(model, rows=2)
    cache = cached.new_cache(rows=2, capacity=C)
    cached.prefill([[1, 2, 3, 4], [5, 6]], cache)
    branch = cache.branch(0, length=3, capacity=5)
    cached.step(torch.tensor([7, 7]), cache)  # does not change the branch
    [found] = cached.read([[8, 9]], [branch], logits=[1])
    torch.testing.assert_close(found, whole(model, [[1, 2, 3, 8, 9]]), rtol=0, atol=2e-4)
