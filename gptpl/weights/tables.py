"""Which tensors of a format are which of ours: one row per tensor, one table per format."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

HEAD = "out_head.weight"
TOKENS = "tok_emb.weight"
POSITIONS = "pos_emb.weight"
QKV_BIAS = "attn.qkv.bias"
OWN = "gptpl"
"""The name of gptpl's own format, which holds every model."""
LAYERS = (
    *("blocks.{i}.norm1", "blocks.{i}.attn.qkv", "blocks.{i}.attn.out_proj"),
    *("blocks.{i}.norm2", "blocks.{i}.ff.up_proj", "blocks.{i}.ff.down_proj", "final_norm"),
)
"""The layers of GPT-2 that have a weight and a bias; `{i}` is the number of the block."""
_WEIGHT_AND_BIAS = (".weight", ".bias")


@dataclass(frozen=True)
class Row:
    """One of our tensors, and those of a format that it consists of, one below the other.

    The names may have `{i}`. `transposed`: theirs are (in, out), ours (out, in).
    """

    ours: str
    theirs: tuple[str, ...]
    transposed: bool = False

    def turned(self, tensor: Tensor) -> Tensor:
        """A view of their tensor in our layout, or of ours in theirs."""
        return tensor.T if self.transposed else tensor


@dataclass(frozen=True, kw_only=True)
class Table:
    """The tensors of a format.

    Attributes:
        format: its name.
        rows: every tensor, in our order.
        tied_only: whether it holds only models whose head is tied to the token embedding.
        writes_head: whether a tied head is written, too, as a copy of the token embedding.
        qkv_bias: whether query, key and value always have a bias: zeros for a model of ours without.
        bias_free: whether models there may have no bias at all: zeros here.
        masks: names of each block's causal masks, with ones in the lower triangle, or where attention is not
            allowed (`mask_is_upper`); they are checked, never loaded, and written where `writes_masks`.
        ignored: names of each block's constants that the weights do not depend on.
    """

    format: str
    rows: tuple[Row, ...]
    tied_only: bool = False
    writes_head: bool = False
    qkv_bias: bool = True
    bias_free: bool = False
    masks: tuple[str, ...] = ()
    mask_is_upper: bool = False
    writes_masks: bool = False
    ignored: tuple[str, ...] = ()

    def expanded(self, n_layers: int) -> Iterator[Row]:
        """The rows of a model of `n_layers` blocks."""
        for row in self.rows:
            for i in range(n_layers if "{i}" in row.ours else 1):
                theirs = tuple(name.format(i=i) for name in row.theirs)
                yield Row(row.ours.format(i=i), theirs, row.transposed)


def of_blocks(names: Iterable[str], n_layers: int) -> list[str]:
    """Names with `{i}`, for every block."""
    return [name.format(i=i) for name in names for i in range(n_layers)]


def gpt2_rows(
    layers: Sequence[str | tuple[str, ...]],
    *,
    tokens: str = TOKENS,
    positions: str = POSITIONS,
    head: str | None = HEAD,
    linear: tuple[str, str] = _WEIGHT_AND_BIAS,
    norm: tuple[str, str] = _WEIGHT_AND_BIAS,
    transposed: bool = False,
) -> tuple[Row, ...]:
    """The rows of a format that names `LAYERS` so, with these ends for weights and biases."""
    rows = [Row(TOKENS, (tokens,)), Row(POSITIONS, (positions,))]
    for ours, theirs in zip(LAYERS, layers, strict=True):
        is_norm, names = "norm" in ours, (theirs,) if isinstance(theirs, str) else theirs
        weight, bias = norm if is_norm else linear
        rows += [
            Row(f"{ours}.weight", tuple(name + weight for name in names), transposed and not is_norm),
            Row(f"{ours}.bias", tuple(name + bias for name in names)),
        ]
    return (*rows, Row(HEAD, (head,))) if head else tuple(rows)
