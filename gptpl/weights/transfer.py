"""Between a format's tensors and a model: whether they fit, and the two functions that follow a table.

Every tensor of both sides is used once, or an error names it.
"""

# C context, V vocabulary

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from gptpl.errors import InputError
from gptpl.model import GPTBackbone, GPTConfig, GPTModel
from gptpl.model.gpt import EXPANSION
from gptpl.text import setting_text
from gptpl.weights.model_files import DTYPES, TensorSource
from gptpl.weights.tables import HEAD, OWN, POSITIONS, QKV_BIAS, TOKENS, Head, Row, Table, of_blocks

_NAMED = 3
"""How many tensors a message names."""
_PART = 1 << 20
"""Numbers that are looked at at once."""


@dataclass(frozen=True, kw_only=True)
class Crop:
    """What may be left out of tables that are longer than the model's: only what was asked for."""

    context: bool = False
    vocabulary: bool = False


# -------------------------------------------------------------------- before anything is fetched or loaded

_GPT2: Mapping[str, bool | int | str] = {
    "position": "learned",
    "norm": "layernorm",
    "feed_forward": "gelu",
    "linear_bias": True,
}
"""What every GPT-2 has, and so every format but gptpl's own."""


def check_is_gpt2(config: GPTConfig, name: str) -> None:
    """Raise InputError, naming the setting, for a model that GPT-2's formats have no place for.

    All formats but gptpl's own are checked here, written or read; `name` is the format or file.
    """
    for field, value in {**_GPT2, "ff_width": EXPANSION * config.emb_dim}.items():
        if (got := getattr(config, field)) != value:
            setting = "hidden_dim" if field == "ff_width" else field
            raise InputError(
                f"{name} holds GPT-2 models, which have model.{setting}={setting_text(value)}, got"
                f" {setting_text(got)}: use format=gptpl"
            )


def check_fits(
    wanted: GPTConfig, got: GPTConfig, *, name: str, crop: Crop | None = None, choice: str | None = None
) -> None:
    """Raises InputError with every field that differs, what it is on both sides, and what to set.

    `wanted` is the model to be filled, `got` the one that the weights `name` are of, `choice` the one of
    conf/model that is the same. `crop` None: nothing may be shorter, and no setting could allow it.
    """
    croppable = {"context_length": "context", "vocab_size": "vocabulary"}
    shorter = [field for field in croppable if getattr(wanted, field) < getattr(got, field)]
    # The dropout rate and the way of drawing weights are free.
    fixed = [each.name for each in dataclasses.fields(GPTConfig) if each.name not in ("drop_rate", "init")]
    left = {
        field: setting_text(getattr(got, field))
        for field in fixed
        if getattr(wanted, field) != getattr(got, field)
        and not (field in shorter and getattr(crop or Crop(), croppable[field]))
    }
    if not left:
        return
    facts = "; ".join(
        f"model.{field}={setting_text(getattr(wanted, field))}, they have {theirs}"
        for field, theirs in left.items()
    )
    overrides = " ".join(f"model.{field}={theirs}" for field, theirs in left.items())
    remedy = f"set model={choice}" if choice and len(left) > 1 else f"set {overrides}"
    for field in shorter:
        if crop is not None and field in left:
            remedy += (
                f", or init.crop_{croppable[field]}=true to leave out the rest of their"
                f" {field.replace('_', ' ')}"
            )
    raise InputError(f"{name} do not fit the model: {facts}: {remedy}")


def check_memory(config: GPTConfig) -> None:
    """Raises InputError for a model that this machine has no memory for, before any is taken."""
    needed = 4 * config.n_parameters
    there = psutil.virtual_memory().total + psutil.swap_memory().total
    if needed > there:
        raise InputError(
            f"a model of {config.n_parameters:,} parameters takes {needed / 1e9:,.0f} GB in float32, this"
            f" machine has {there / 1e9:,.0f} GB of memory: give smaller sizes, such as model.emb_dim"
        )


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
        if source.shapes.keys().isdisjoint(name.format(i=block) for name in names):
            raise InputError(
                f"{source.where} has no tensor of block {block} of n_layers={config.n_layers}: restore what"
                " describes it, or fetch it anew"
            )
    with torch.device("meta"):
        _Plan(make(config), source, table, Crop())


class _Plan:
    """Which row does what, checked by names, shapes and types, before any number is read."""

    def __init__(self, net: GPTBackbone, source: TensorSource, table: Table, crop: Crop) -> None:
        if table.format != OWN:
            check_is_gpt2(net.config, source.where)
        names, n_layers = source.shapes.keys(), net.config.n_layers
        self.parameters = dict(net.named_parameters())  # a tied head comes once, as the token embedding
        self.rows: list[Row] = []
        self.doubles: list[Row] = []
        self.absent_biases: list[Row] = []
        masks = set(of_blocks(table.masks, n_layers))
        self.masks = sorted(masks & names)
        bias_free = table.bias_free and not any(name.endswith(".bias") for name in names - masks)
        for row in table.expanded(n_layers):
            if row.ours not in self.parameters:
                doubled = row.ours == HEAD or row.ours.endswith(QKV_BIAS)
                self.doubles += [row] if doubled and names & set(row.theirs) else []
            elif bias_free and row.ours.endswith(".bias"):
                self.absent_biases.append(row)
            else:
                self.rows.append(row)
        filled = [row.ours for row in (*self.rows, *self.absent_biases)]
        assert sorted(filled) == sorted(self.parameters), "the table must name each parameter once"
        wanted = [name for row in (*self.rows, *self.doubles) for name in row.theirs]
        assert len(wanted) == len(set(wanted)), "the table must use each tensor once"
        if missing := set(wanted) - names:
            ours = {row.ours for row in self.rows if missing & set(row.theirs)}
            remedy = "give the weights of a model with as many layers, or fetch the file anew"
            if all(name.endswith(QKV_BIAS) for name in ours):
                remedy = "set model.qkv_bias=false"
            elif ours == {HEAD}:
                remedy = "set model.tie_weights=true"
            raise InputError(f"{source.where} lacks {_some(missing)}, which the model needs: {remedy}")
        if extra := names - {*wanted, *masks, *of_blocks(table.ignored, n_layers)}:
            raise InputError(
                f"{source.where} holds {_some(extra)}, which the model has no place for: give a model with as"
                " many layers, or weights without it"
            )
        for row in (*self.rows, *self.doubles):
            absent = net.out_head.weight.shape if row.ours == HEAD else (3 * net.config.emb_dim,)
            parameter = self.parameters.get(row.ours)
            _check_shapes(source, row, tuple(absent if parameter is None else parameter.shape), crop)
        for name in wanted:
            if source.dtypes[name] not in DTYPES:
                raise InputError(
                    f"{source.where} holds {name!r} as {source.dtypes[name]}: weights are read in"
                    f" {', '.join(DTYPES)}; convert them first"
                )


def _some(names: set[str]) -> str:
    named = ", ".join(repr(name) for name in sorted(names)[:_NAMED])
    return named if len(names) <= _NAMED else f"{named} and {len(names) - _NAMED} more tensors"


def _check_shapes(source: TensorSource, row: Row, ours: tuple[int, ...], crop: Crop) -> None:
    """Refuses a shape that is not the row's, but for a table of rows that may be cut."""
    part = torch.empty(ours[0] // len(row.theirs), *ours[1:], device="meta")
    wanted = tuple(row.layout.to_theirs(part).shape)
    for name in row.theirs:
        got = source.shapes[name]
        if got == wanted:
            continue
        place = f"{source.where} holds {name!r} as {got}, the model wants {wanted}"
        if row.ours in (POSITIONS, TOKENS, HEAD) and got[1:] == wanted[1:]:
            longer = len(got) == 2 and got[0] > wanted[0]
            size, option = (
                ("context_length", "context") if row.ours == POSITIONS else ("vocab_size", "vocabulary")
            )
            if longer and getattr(crop, option):
                continue
            raise InputError(
                f"{place}: set model.{size}={got[0]}{f', or init.crop_{option}=true' if longer else ''}"
            )
        if got == wanted[::-1]:
            raise InputError(f"{place}: it is transposed, so the file is of another program than it seems")
        raise InputError(f"{place}: give the model the sizes that its weights have")


# ---------------------------------------------------------------------------------------------------- reading


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
        for row in plan.rows:  # a row's tensors, one below the other
            pieces = plan.parameters[row.ours].chunk(len(row.theirs))
            for piece, name in zip(pieces, row.theirs, strict=True):
                piece.copy_(row.layout.from_theirs(_read(source, name))[: piece.shape[0]])
        for row in plan.doubles:
            _check_double(net, source, row)
        for name in plan.masks:
            _check_mask(source, name, table.mask_of_ones)


def _read(source: TensorSource, name: str) -> Tensor:
    tensor = source.read(name)
    # In parts, for what isfinite makes on its way is larger than the tensor.
    if not all(torch.isfinite(part).all() for part in torch.split(tensor.flatten(), _PART)):
        raise InputError(f"{source.where} holds {name!r} with NaN or infinite numbers: use other weights")
    return tensor


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
    if square.dim() != 2 or not torch.equal(square.bool(), _causal_mask(square.shape[0], ones).bool()):
        raise InputError(
            f"{source.where} holds {name!r}, which is no causal mask, as gptpl's models have: use others"
        )


def _causal_mask(context: int, ones: str) -> Tensor:
    """(C, C) of zeros, with ones where attention is allowed ("lower") or where it is not ("upper")."""
    square = torch.ones(context, context)
    return torch.tril(square) if ones == "lower" else torch.triu(square, diagonal=1)


# ---------------------------------------------------------------------------------------------------- writing


def export_tensors(net: GPTBackbone, table: Table, *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The model's tensors under a format's names and in its layout, contiguous, on the CPU.

    Raises InputError for a model that the format cannot hold.
    """
    check_is_gpt2(net.config, f"format={table.format}")
    if table.head in (Head.NEVER, Head.TWIN) and not net.config.tie_weights:
        raise InputError(
            f"format={table.format} has {table.head.value}, and this model's is untied"
            " (model.tie_weights=false): use format=hf or format=book"
        )
    parameters = dict(net.named_parameters())
    theirs: dict[str, Tensor] = {}
    for row in table.expanded(net.config.n_layers):
        tensor: Tensor | None = parameters.get(row.ours)
        # What a format has in place of a parameter that the model does not have.
        if tensor is None and row.ours == HEAD and table.head in (Head.ALWAYS, Head.TWIN):
            tensor = net.tok_emb.weight
        elif tensor is None and row.ours.endswith(QKV_BIAS) and table.qkv_bias:
            tensor = torch.zeros(3 * net.config.emb_dim, dtype=net.tok_emb.weight.dtype)
        if tensor is not None:
            pieces = tensor.chunk(len(row.theirs))
            theirs |= zip(row.theirs, map(row.layout.to_theirs, pieces), strict=True)
    if table.writes_masks:
        for name in of_blocks(table.masks, net.config.n_layers):
            theirs[name] = _causal_mask(net.config.context_length, table.mask_of_ones)
    return {
        name: tensor.detach().to(device="cpu", dtype=dtype).contiguous() for name, tensor in theirs.items()
    }
