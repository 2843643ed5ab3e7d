"""Which of a format's tensors is which of ours: one row a tensor, one table a format."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum

from torch import Tensor

HEAD = "out_head.weight"
TOKENS = "tok_emb.weight"
POSITIONS = "pos_emb.weight"
QKV_BIAS = "attn.qkv.bias"

Shape = tuple[int, ...]


class Layout(Enum):
    """How a format keeps a tensor whose axes here are (out, in), or which has one axis only."""

    SAME = "as here"
    TRANSPOSED = "(in, out)"
    ONE_TRANSPOSED = "(1, in, out)"

    def shape(self, ours: Shape) -> Shape:
        """The shape there of a tensor of this shape here."""
        if self is Layout.SAME:
            return ours
        return ours[::-1] if self is Layout.TRANSPOSED else (1, *ours[::-1])

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
        mask: name of a buffer of each block that holds the causal mask, upper triangle of ones ("upper"), or
            lower ("lower"); it is checked, and never loaded.
        writes_mask: whether the format's own program insists on that buffer.
        ignored: names of constants of each block that the weights do not depend on.
        bias_free: whether a model there may have no biases at all; they are zeros here.
    """

    format: str
    rows: tuple[Row, ...]
    head: Head
    qkv_bias: bool = True
    mask: str | None = None
    mask_of_ones: str = "lower"
    writes_mask: bool = False
    ignored: tuple[str, ...] = ()
    bias_free: bool = False

    def expanded(self, n_layers: int) -> Iterator[Row]:
        """The rows of a model with so many blocks."""
        for row in self.rows:
            if "{i}" not in row.ours:
                yield row
                continue
            for i in range(n_layers):
                theirs = tuple(name.format(i=i) for name in row.theirs)
                yield Row(row.ours.format(i=i), theirs, row.layout)

    def masks(self, n_layers: int) -> list[str]:
        """Names of the causal masks of all blocks."""
        return [] if self.mask is None else [self.mask.format(i=i) for i in range(n_layers)]

    def constants(self, n_layers: int) -> set[str]:
        """Names of what is left unread."""
        return {name.format(i=i) for name in self.ignored for i in range(n_layers)}

    def renamed(self, rename: Callable[[str], str]) -> "Table":
        """The same table under other names of theirs."""
        return replace(
            self,
            rows=tuple(Row(row.ours, tuple(map(rename, row.theirs)), row.layout) for row in self.rows),
            mask=None if self.mask is None else rename(self.mask),
            ignored=tuple(map(rename, self.ignored)),
        )


def both(ours: str, theirs: str, layout: Layout = Layout.SAME) -> tuple[Row, Row]:
    """The rows of a layer's weight and bias, which have the same names on both sides."""
    return (
        Row(f"{ours}.weight", (f"{theirs}.weight",), layout),
        Row(f"{ours}.bias", (f"{theirs}.bias",)),
    )
