"""Which of a format's tensors is which of ours: one row a tensor, one table a format."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

from torch import Tensor

HEAD = "out_head.weight"
TOKENS = "tok_emb.weight"
POSITIONS = "pos_emb.weight"
QKV_BIAS = "attn.qkv.bias"
OWN = "gptpl"
"""The name of gptpl's own format, which holds every model."""


class Layout(Enum):
    """How a format keeps a tensor whose axes here are (out, in), or which has one axis only."""

    SAME = "as here"
    TRANSPOSED = "(in, out)"
    ONE_TRANSPOSED = "(1, in, out)"

    def from_theirs(self, tensor: Tensor) -> Tensor:
        """A view in our layout."""
        if self is Layout.SAME:
            return tensor
        return tensor.T if self is Layout.TRANSPOSED else tensor[0].T

    def to_theirs(self, tensor: Tensor) -> Tensor:
        """A view in their layout."""
        if self is Layout.SAME:
            return tensor
        return tensor.T if self is Layout.TRANSPOSED else tensor.T[None]


@dataclass(frozen=True)
class Row:
    """One of our tensors, and those of a format that it is made of, one below the other.

    `{i}` in the names stands for the number of the block.
    """

    ours: str
    theirs: tuple[str, ...]
    layout: Layout = Layout.SAME


class Head(Enum):
    """What a format has beside the token embedding, whose matrix the head of a tied model is."""

    NEVER = "no head of its own: it holds tied models only"
    TWIN = "always a head, the same as the token embedding: it holds tied models only"
    UNTIED = "a head only where it is another matrix than the token embedding"
    ALWAYS = "always a head, tied or not"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Everything about the tensors of a format.

    Attributes:
        format: its name.
        rows: every tensor, in the order of ours.
        head: see `Head`.
        qkv_bias: whether query, key and value always have a bias there; where ours have none it is zeros.
        masks: names of buffers of each block that hold the causal mask, upper triangle of ones ("upper"), or
            lower ("lower"); they are checked, and never loaded.
        writes_masks: whether the format's own program insists on them.
        ignored: names of constants of each block that the weights do not depend on.
        bias_free: whether a model there may have no biases at all; they are zeros here.
    """

    format: str
    rows: tuple[Row, ...]
    head: Head
    qkv_bias: bool = True
    masks: tuple[str, ...] = ()
    mask_of_ones: str = "lower"
    writes_masks: bool = False
    ignored: tuple[str, ...] = ()
    bias_free: bool = False

    def expanded(self, n_layers: int) -> Iterator[Row]:
        """The rows of a model with so many blocks."""
        for row in self.rows:
            for i in range(n_layers if "{i}" in row.ours else 1):
                theirs = tuple(name.format(i=i) for name in row.theirs)
                yield Row(row.ours.format(i=i), theirs, row.layout)


def of_blocks(names: Iterable[str], n_layers: int) -> list[str]:
    """Names with `{i}`, for every block."""
    return [name.format(i=i) for name in names for i in range(n_layers)]


def both(ours: str, theirs: str, weight: str, bias: str, layout: Layout = Layout.SAME) -> tuple[Row, Row]:
    """The rows of a layer's weight and bias, whose names there end otherwise."""
    return Row(f"{ours}.weight", (theirs + weight,), layout), Row(f"{ours}.bias", (theirs + bias,))


def gpt2_rows(linear: Layout, *, prefix: str = "", head: str = "lm_head.weight") -> tuple[Row, ...]:
    """The rows of transformers and of nanoGPT, which have the same names."""

    def layer(ours: str, theirs: str, layout: Layout = Layout.SAME) -> tuple[Row, Row]:
        return both(ours, prefix + theirs, ".weight", ".bias", layout)

    return (
        Row(TOKENS, (f"{prefix}wte.weight",)),
        Row(POSITIONS, (f"{prefix}wpe.weight",)),
        *layer("blocks.{i}.norm1", "h.{i}.ln_1"),
        *layer("blocks.{i}.attn.qkv", "h.{i}.attn.c_attn", linear),
        *layer("blocks.{i}.attn.out_proj", "h.{i}.attn.c_proj", linear),
        *layer("blocks.{i}.norm2", "h.{i}.ln_2"),
        *layer("blocks.{i}.ff.up_proj", "h.{i}.mlp.c_fc", linear),
        *layer("blocks.{i}.ff.down_proj", "h.{i}.mlp.c_proj", linear),
        *layer("final_norm", "ln_f"),
        Row(HEAD, (head,)),
    )
