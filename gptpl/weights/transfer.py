"""The two functions that follow a table: every tensor of both sides once, or an error that names it."""

# C context, V vocabulary

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gptpl.errors import InputError
from gptpl.model import GPTBackbone, GPTConfig, GPTModel
from gptpl.weights.sources import DTYPES, TensorSource
from gptpl.weights.tables import HEAD, POSITIONS, QKV_BIAS, TOKENS, Head, Row, Shape, Table

_NAMED = 3
"""How many tensors a message names."""
_PART = 1 << 20
"""Numbers that are looked at at once."""


@dataclass(frozen=True, kw_only=True)
class Crop:
    """What may be left out of tables that are longer than the model's: only what was asked for."""

    context: bool = False
    vocabulary: bool = False


def load_tensors(net: GPTBackbone, source: TensorSource, table: Table, *, crop: Crop | None = None) -> None:
    """Fills every parameter of the model from a format's tensors, one at a time, cast to the model's type.

    A head of their own must be the token embedding's matrix where the model is tied, and a bias must be zeros
    where the model has none. Nothing is written before all names and shapes are known to be right.

    Raises:
        InputError: naming a tensor that is missing or left over, of another shape or data type, not finite,
            or (a head, a bias, a mask) not what it has to be.
    """
    plan = _Plan(net, source, table, crop or Crop())
    with torch.no_grad():
        for row in plan.absent_biases:
            plan.parameters[row.ours].zero_()
        for row in plan.rows:
            _fill(plan.parameters[row.ours], source, row)
        for row in plan.doubles:
            _check_double(net, source, row)
        for name in plan.masks:
            _check_mask(source, name, table.mask_of_ones)


def check_tensors(
    config: GPTConfig,
    source: TensorSource,
    table: Table,
    *,
    make: Callable[[GPTConfig], GPTBackbone] = GPTModel,
) -> None:
    """What `load_tensors` checks first, for a model that is not there yet: what describes it may be wrong.

    Raises InputError for names and shapes that are not those of the configuration.
    """
    names = [name for row in table.rows if "{i}" in row.ours for name in row.theirs]
    for block in reversed(range(config.n_layers)):  # before thousands of blocks are made
        if source.shapes().keys().isdisjoint(name.format(i=block) for name in names):
            raise InputError(
                f"{source.where} has no tensor of block {block} of n_layers={config.n_layers}: restore what"
                " describes it, or fetch it anew"
            )
    with torch.device("meta"):
        _Plan(make(config), source, table, Crop())


class _Plan:
    """Which row does what, checked by names, shapes and types, before any number is read."""

    def __init__(self, net: GPTBackbone, source: TensorSource, table: Table, crop: Crop) -> None:
        shapes = source.shapes()
        self.parameters = dict(net.named_parameters())  # a tied head comes once, as the token embedding
        self.rows: list[Row] = []
        self.doubles: list[Row] = []
        self.absent_biases: list[Row] = []
        n_layers = net.config.n_layers
        masks = set(table.masks(n_layers))
        bias_free = table.bias_free and not any(name.endswith(".bias") for name in shapes.keys() - masks)
        for row in table.expanded(n_layers):
            if row.ours not in self.parameters:
                self.doubles += [row] if shapes.keys() & set(row.theirs) else []
            elif bias_free and row.ours.endswith(".bias"):
                self.absent_biases.append(row)
            else:
                self.rows.append(row)
        filled = [row.ours for row in (*self.rows, *self.absent_biases)]
        assert sorted(filled) == sorted(self.parameters), "the table must name each parameter once"
        self.masks = sorted(masks & shapes.keys())
        wanted = [name for row in (*self.rows, *self.doubles) for name in row.theirs]
        assert len(wanted) == len(set(wanted)), "the table must use each tensor once"
        constants = table.constants(n_layers)
        self._check_missing(source, set(wanted) - shapes.keys())
        _check_extra(source, known={*wanted, *self.masks, *constants})
        for row in (*self.rows, *self.doubles):
            _check_shapes(source, row, self._shape(net, row), crop)
        for name in wanted:
            if source.dtype(name) not in DTYPES:
                raise InputError(
                    f"{source.where} holds {name!r} as {source.dtype(name)}: weights are read in"
                    f" {', '.join(DTYPES)}; convert them first"
                )

    def _check_missing(self, source: TensorSource, missing: set[str]) -> None:
        if not missing:
            return
        ours = {row.ours for row in self.rows if missing & set(row.theirs)}
        remedy = "give the weights of a model with as many layers, or fetch the file anew"
        if all(name.endswith(QKV_BIAS) for name in ours):
            remedy = "set model.qkv_bias=false"
        elif ours == {HEAD}:
            remedy = "set model.tie_weights=true"
        raise InputError(f"{source.where} lacks {_some(sorted(missing))}, which the model needs: {remedy}")

    def _shape(self, net: GPTBackbone, row: Row) -> Shape:
        """The shape of ours that a row stands for."""
        if row.ours == HEAD:
            return tuple(net.out_head.weight.shape)
        if row.ours in self.parameters:
            return tuple(self.parameters[row.ours].shape)
        assert row.ours.endswith(QKV_BIAS)
        return (3 * net.config.emb_dim,)


def _check_extra(source: TensorSource, *, known: set[str]) -> None:
    if extra := sorted(source.shapes().keys() - known):
        raise InputError(
            f"{source.where} holds {_some(extra)}, which the model has no place for: give a model with as"
            " many layers, or weights without it"
        )


def _some(names: list[str]) -> str:
    named = ", ".join(repr(name) for name in names[:_NAMED])
    return named if len(names) <= _NAMED else f"{named} and {len(names) - _NAMED} more tensors"


def _check_shapes(source: TensorSource, row: Row, ours: Shape, crop: Crop) -> None:
    """Refuses a shape that is not the row's, but for a table of rows that may be cut."""
    part = (ours[0] // len(row.theirs), *ours[1:])
    wanted = row.layout.shape(part)
    for name in row.theirs:
        got = source.shapes()[name]
        if got == wanted:
            continue
        place = f"{source.where} holds {name!r} as {got}, the model wants {wanted}"
        longer = len(got) == 2 and got[1:] == wanted[1:] and got[0] > wanted[0]
        if row.ours == POSITIONS and got[1:] == wanted[1:]:
            if longer and crop.context:
                continue
            remedy = f"set model.context_length={got[0]}"
            raise InputError(f"{place}: {remedy}{', or init.crop_context=true' if longer else ''}")
        if row.ours in (TOKENS, HEAD) and got[1:] == wanted[1:]:
            if longer and crop.vocabulary:
                continue
            remedy = f"set model.vocab_size={got[0]}"
            raise InputError(f"{place}: {remedy}{', or init.crop_vocabulary=true' if longer else ''}")
        if got == wanted[::-1]:
            raise InputError(f"{place}: it is transposed, so the file is of another program than it seems")
        raise InputError(f"{place}: give the model the sizes that its weights have")


def _read(source: TensorSource, name: str) -> Tensor:
    tensor = source.read(name)
    # In parts, for what isfinite makes on its way is larger than the tensor.
    if not all(torch.isfinite(part).all() for part in torch.split(tensor.flatten(), _PART)):
        raise InputError(f"{source.where} holds {name!r} with NaN or infinite numbers: use other weights")
    return tensor


def _fill(parameter: Tensor, source: TensorSource, row: Row) -> None:
    """Copies a row's tensors, one below the other, into a parameter."""
    for piece, name in zip(parameter.chunk(len(row.theirs)), row.theirs, strict=True):
        piece.copy_(row.layout.from_theirs(_read(source, name))[: piece.shape[0]])


def _check_double(net: GPTBackbone, source: TensorSource, row: Row) -> None:
    """Checks what the model has no parameter for: the head of a tied one, a bias that is none."""
    if row.ours == HEAD:
        ours = net.tok_emb.weight
        if not torch.equal(_read(source, row.theirs[0])[: ours.shape[0]].to(ours), ours):
            raise InputError(
                f"{source.where} holds a head of its own in {row.theirs[0]!r}, the model's is tied to the"
                " token embedding: set model.tie_weights=false"
            )
        return
    for name in row.theirs:
        if _read(source, name).any():
            raise InputError(
                f"{source.where} holds {name!r}, a bias of query, key and value, which the model does not"
                " have: set model.qkv_bias=true"
            )


def _check_mask(source: TensorSource, name: str, ones: str) -> None:
    mask = source.read(name)
    rows = mask.shape[-1] if mask.dim() >= 2 else 0
    square = mask.reshape(rows, rows) if mask.numel() == rows**2 else mask
    if square.dim() != 2 or not torch.equal(square.bool(), causal_mask(square.shape[0], ones).bool()):
        raise InputError(
            f"{source.where} holds {name!r}, which is no causal mask, as gptpl's models have: use others"
        )


def causal_mask(context: int, ones: str) -> Tensor:
    """(C, C) of zeros, with ones where attention is allowed ("lower") or where it is not ("upper")."""
    square = torch.ones(context, context)
    return torch.tril(square) if ones == "lower" else torch.triu(square, diagonal=1)


def export_tensors(net: GPTBackbone, table: Table, *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The model's tensors under a format's names and in its layout, contiguous, on the CPU.

    Raises InputError for a model that the format cannot hold.
    """
    if table.head in (Head.NEVER, Head.TWIN) and not net.config.tie_weights:
        raise InputError(
            f"format={table.format} has {table.head.value}, and this model's is untied"
            " (model.tie_weights=false): use format=hf or format=book"
        )
    return {
        name: tensor.detach().to(device="cpu", dtype=dtype).contiguous()
        for name, tensor in _exported(net, table).items()
    }


def _exported(net: GPTBackbone, table: Table) -> Mapping[str, Tensor]:
    parameters = dict(net.named_parameters())
    theirs: dict[str, Tensor] = {}
    used: set[str] = set()
    for row in table.expanded(net.config.n_layers):
        used.add(row.ours)
        tensor = parameters[row.ours] if row.ours in parameters else _stand_in(net, table, row)
        if tensor is not None:
            for name, piece in zip(row.theirs, tensor.chunk(len(row.theirs)), strict=True):
                assert name not in theirs, f"the table must use {name} once"
                theirs[name] = row.layout.to_theirs(piece)
    assert used >= parameters.keys(), "the table must name each parameter once"
    theirs.update(_written_masks(net, table))
    return theirs


def _stand_in(net: GPTBackbone, table: Table, row: Row) -> Tensor | None:
    """What a format has in place of a parameter that the model does not have; None: nothing."""
    if row.ours == HEAD:
        return net.tok_emb.weight if table.head in (Head.ALWAYS, Head.TWIN) else None
    assert row.ours.endswith(QKV_BIAS)
    kind = net.tok_emb.weight.dtype
    return torch.zeros(3 * net.config.emb_dim, dtype=kind) if table.qkv_bias else None


def _written_masks(net: GPTBackbone, table: Table) -> Iterator[tuple[str, Tensor]]:
    if table.writes_mask:
        for name in table.masks(net.config.n_layers):
            yield name, causal_mask(net.config.context_length, table.mask_of_ones)
