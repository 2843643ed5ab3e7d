"""Texts packed into one row against the same texts alone."""

# B batch, T time, V vocabulary

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gptpl.model import GPTConfig, GPTModel
from gptpl.model.gpt import segment_mask, segment_positions

MODERN = {"position": "rope", "norm": "rmsnorm", "feed_forward": "swiglu", "linear_bias": False}
LENGTHS = [[3, 1, 5], [4, 2], [9]]
"""Of the texts in each row of 10 tokens; what is left is padding."""


def model(**changes: Any) -> GPTModel:
    settings: dict[str, Any] = {
        "vocab_size": 30,
        "context_length": 12,
        "emb_dim": 16,
        "n_heads": 2,
        "n_layers": 2,
        "drop_rate": 0.0,
        "qkv_bias": True,
    }
    torch.manual_seed(0)
    return GPTModel(GPTConfig(**(settings | changes)))


def packed() -> tuple[Tensor, Tensor]:
    """Tokens and segments, each (3, 10)."""
    tokens = torch.randint(1, 30, (3, 10), generator=torch.Generator().manual_seed(1))
    segments = torch.zeros(3, 10, dtype=torch.int64)
    for row, lengths in enumerate(LENGTHS):
        numbers = [number for number, length in enumerate(lengths, 1) for _ in range(length)]
        segments[row, : len(numbers)] = torch.tensor(numbers)
    return tokens, segments


def texts() -> list[tuple[int, slice]]:
    """Row and place of every text."""
    places = []
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            places.append((row, slice(start, start + length)))
            start += length
    return places


def test_positions_begin_anew_and_each_text_sees_itself_alone():
    segments = torch.tensor([[1, 1, 2, 2, 2, 0, 0]])
    assert segment_positions(segments).tolist() == [[0, 1, 0, 1, 2, 0, 1]]
    expected = [
        "1......",
        "11.....",
        "..1....",
        "..11...",
        "..111..",
        ".....1.",
        ".....11",
    ]
    shown = ["".join("1" if seen else "." for seen in row) for row in segment_mask(segments)[0, 0].tolist()]
    assert shown == expected


@pytest.mark.parametrize("architecture", [{}, MODERN], ids=["gpt2", "modern"])
@pytest.mark.parametrize("kernel", ["auto", "blocked"])
def test_packed_logits_are_those_of_each_text_alone(kernel, architecture):
    net = model(**architecture).eval()
    for block in net.blocks:
        block.get_submodule("attn").kernel = kernel
    tokens, segments = packed()
    logits = net.out_head(net.hidden(tokens, segments))
    for row, part in texts():
        alone = net(tokens[row : row + 1, part])
        torch.testing.assert_close(logits[row, part], alone[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_those_of_each_text_alone(recompute):
    tokens, segments = packed()
    together, apart = model(), model()
    together.recompute_blocks = recompute
    logits = together.out_head(together.hidden(tokens, segments))
    rows = [(logits[row, part], apart(tokens[row : row + 1, part])[0]) for row, part in texts()]
    for (ours, theirs), (row, part) in zip(rows, texts(), strict=True):
        for x in (ours, theirs):
            F.cross_entropy(x, tokens[row, part], reduction="sum").backward(retain_graph=True)
    for (name, ours), theirs in zip(together.named_parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_one_text_a_row_gives_what_no_segments_give():
    net = model().eval()
    tokens, _ = packed()
    torch.testing.assert_close(
        net.hidden(tokens, torch.ones_like(tokens)), net.hidden(tokens), rtol=0, atol=1e-5
    )


def test_padding_is_no_nan_in_a_row_of_nothing_else():
    net = model().eval()
    tokens, segments = packed()
    segments[1] = 0
    assert net.hidden(tokens, segments).isfinite().all()


def test_bf16_and_dropout_take_it():
    net = model(drop_rate=0.5).train()
    tokens, segments = packed()
    with torch.autocast("cpu", torch.bfloat16):
        net.hidden(tokens, segments).float().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


# torch's own tracing looks at the gradient of what is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("architecture", [{}, MODERN], ids=["gpt2", "modern"])
def test_compiled_blocks_take_both(architecture):
    net, compiled = (model(n_layers=1, **architecture).eval() for _ in range(2))
    for block in compiled.blocks:
        block.compile(backend="aot_eager")
    tokens, segments = packed()
    for given in (None, segments, None):
        torch.testing.assert_close(
            compiled.hidden(tokens, given), net.hidden(tokens, given), rtol=0, atol=1e-6
        )
