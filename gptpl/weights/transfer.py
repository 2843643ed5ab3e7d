"""Between a format's tensors and a model, by the format's table: whether they fit, loading, exporting.

Every tensor of both sides is used once, or an error names it.
"""

# C context, V vocabulary

import dataclasses
from collections.abc import Callable, Mapping, Sequence, Set

import psutil
import torch
from torch import Tensor

from gptpl.errors import InputError
from gptpl.model import GPTBackbone, GPTConfig, GPTModel
from gptpl.model.gpt import EXPANSION
from gptpl.text import setting_text
from gptpl.weights.model_files import (
    DTYPES,
    HEAD,
    OWN,
    POSITIONS,
    QKV_BIAS,
    TOKENS,
    Row,
    Table,
    TensorSource,
    of_blocks,
)

_NAMED = 3
"""How many tensors a message names."""
_PART = 1 << 20
"""Numbers that are looked at at once."""
CROPS: Mapping[str, str] = {"context_length": "crop_context", "vocab_size": "crop_vocabulary"}
"""The sizes that weights may have larger than the model, and the settings that leave out the rest."""


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
    wanted: GPTConfig, got: GPTConfig, *, name: str, crop: Set[str] | None = None, choice: str | None = None
) -> None:
    """Raise InputError for a model of another shape than the weights', with every field and what to set.

    `wanted` is the model to be filled, `got` that of the weights `name`, `choice` the same one in conf/model.
    `crop` are the sizes that may be smaller, see `CROPS`; None: no setting could allow it.
    """
    shorter = [field for field in CROPS if getattr(wanted, field) < getattr(got, field)]
    allowed = [field for field in shorter if field in (crop or ())]
    # The dropout rate and the way of drawing weights may differ.
    different = {
        field.name: [setting_text(getattr(config, field.name)) for config in (wanted, got)]
        for field in dataclasses.fields(GPTConfig)
        if field.name not in ("drop_rate", "init", *allowed)
        and getattr(wanted, field.name) != getattr(got, field.name)
    }
    if not different:
        return
    facts = [f"model.{field}={ours}, they have {theirs}" for field, (ours, theirs) in different.items()]
    settings = [f"model.{field}={theirs}" for field, (_, theirs) in different.items()]
    remedy = f"set model={choice}" if choice and len(different) > 1 else f"set {' '.join(settings)}"
    for field in shorter:
        if crop is not None and field in different:
            rest = field.replace("_", " ")
            remedy += f", or init.{CROPS[field]}=true to leave out the rest of their {rest}"
    raise InputError(f"{name} do not fit the model: {'; '.join(facts)}: {remedy}")


def check_memory(config: GPTConfig) -> None:
    """Raise InputError for a model larger than the memory of this machine, before any is taken."""
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
    """Raise InputError for names and shapes that are not the configuration's, before a model takes memory.

    `load_tensors` checks the same; here what describes the model may be wrong, even by thousands of blocks.
    """
    with torch.device("meta"):
        net = make(dataclasses.replace(config, n_layers=1))  # the other blocks have the same shapes
    _checked_rows(net, source, table, frozenset(), n_layers=config.n_layers)


def _checked_rows(
    net: GPTBackbone, source: TensorSource, table: Table, crop: Set[str], *, n_layers: int
) -> list[Row]:
    """The rows of the tensors in a source, checked as by `check_rows`.

    Rows without a parameter are a tied model's head, or a query-key-value bias that it does not have.
    """
    if table.format != OWN:
        check_is_gpt2(net.config, source.where)
    names, first = source.shapes.keys(), "blocks.0."
    unused = {*of_blocks(table.masks, n_layers), *of_blocks(table.ignored, n_layers)}
    bias_free = table.bias_free and not any(name.endswith(".bias") for name in names - unused)
    parameters = {
        name.replace(first, f"blocks.{i}.", 1): parameter.shape
        for name, parameter in net.named_parameters()
        for i in range(n_layers if name.startswith(first) else 1)
    }
    shapes = {HEAD: net.out_head.weight.shape}
    shapes |= {f"blocks.{i}.{QKV_BIAS}": torch.Size([3 * net.config.emb_dim]) for i in range(n_layers)}
    every = list(table.expanded(n_layers))
    assert parameters.keys() <= {row.ours for row in every}, "the table must name every parameter"
    rows = [
        row
        for row in every
        if (row.ours in parameters and not (bias_free and row.ours.endswith(".bias")))
        or (row.ours in shapes and names & set(row.theirs))
    ]
    check_rows(rows, shapes | parameters, source, unused=unused, crop=crop)
    return rows


def check_rows(
    rows: Sequence[Row],
    shapes: Mapping[str, tuple[int, ...]],
    source: TensorSource,
    *,
    unused: Set[str] = frozenset(),
    crop: Set[str] = frozenset(),
) -> None:
    """Raise InputError unless a source has these rows' tensors, in our shapes, and only `unused` others."""
    names, wanted = source.shapes.keys(), {name for row in rows for name in row.theirs}
    if missing := wanted - names:
        ours = {row.ours for row in rows if missing & set(row.theirs)}
        remedy = "give the weights of a model with as many layers, or fetch the file again"
        if all(name.endswith(QKV_BIAS) for name in ours):
            remedy = "set model.qkv_bias=false"
        elif ours == {HEAD}:
            remedy = "set model.tie_weights=true"
        raise InputError(f"{source.where} lacks {_some(missing)}, which the model needs: {remedy}")
    if extra := names - wanted - unused:
        raise InputError(
            f"{source.where} holds {_some(extra)}, which the model has no place for: give a model with as"
            " many layers, or weights without it"
        )
    for row in rows:
        _check_row(row, shapes[row.ours], source, crop)


def _some(names: Set[str]) -> str:
    named = ", ".join(repr(name) for name in sorted(names)[:_NAMED])
    return named if len(names) <= _NAMED else f"{named} and {len(names) - _NAMED} more tensors"


def _check_row(row: Row, ours: tuple[int, ...], source: TensorSource, crop: Set[str]) -> None:
    """Refuse a type that weights do not have, and another shape than ours, but of what may be cropped."""
    wanted = (ours[0] // len(row.theirs), *ours[1:])
    wanted = wanted[::-1] if row.transposed else wanted
    for name in row.theirs:
        got, dtype = source.shapes[name], source.dtypes[name]
        if dtype not in DTYPES:
            known = ", ".join(DTYPES)
            raise InputError(f"{source.where} holds {name!r} as {dtype}: convert it to {known}")
        if got == wanted:
            continue
        place = f"{source.where} holds {name!r} as {got}, the model wants {wanted}"
        if row.ours in (POSITIONS, TOKENS, HEAD) and got[1:] == wanted[1:]:
            size = "context_length" if row.ours == POSITIONS else "vocab_size"
            is_longer = len(got) == 2 and got[0] > wanted[0]
            if is_longer and size in crop:
                continue
            or_crop = f", or init.{CROPS[size]}=true" if is_longer else ""
            raise InputError(f"{place}: set model.{size}={got[0]}{or_crop}")
        if got == wanted[::-1]:
            raise InputError(f"{place}: it is transposed, as in the files of another program")
        raise InputError(f"{place}: give the model the sizes of its weights")


# ---------------------------------------------------------------------------------------------------- loading


def load_tensors(
    net: GPTBackbone, source: TensorSource, table: Table, *, crop: Set[str] = frozenset()
) -> None:
    """Fill every parameter of the model from a format's tensors, one at a time, cast to the model's type.

    A head must be the token embedding's matrix where the model's is tied, and a bias must be zeros where the
    model has none. Nothing is written before all names and shapes are known to be right.

    Raises InputError, naming the tensor, for one that is missing or left over, of another shape or data type,
    not finite, or (a head, a bias, a mask) not what it has to be.
    """
    found = _checked_rows(net, source, table, crop, n_layers=net.config.n_layers)
    rows = {row.ours: row for row in found}
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name not in rows:
                parameter.zero_()  # a bias that the format may lack
                continue
            row = rows.pop(name)
            pieces = parameter.chunk(len(row.theirs))
            for piece, theirs in zip(pieces, row.theirs, strict=True):
                piece.copy_(row.turned(_read(source, theirs))[: piece.shape[0]])
        for row in rows.values():
            _check_double(net, source, row)
        for name in of_blocks(table.masks, net.config.n_layers):
            if name in source.shapes:
                _check_mask(source, name, table)


def _read(source: TensorSource, name: str) -> Tensor:
    tensor = source.read(name)
    # In parts: what isfinite makes on its way is larger than the tensor.
    if not all(torch.isfinite(part).all() for part in torch.split(tensor.flatten(), _PART)):
        raise InputError(f"{source.where} holds {name!r} with NaN or infinite numbers: use other weights")
    return tensor


def _check_double(net: GPTBackbone, source: TensorSource, row: Row) -> None:
    """Check what the model has no parameter for: the head of a tied one, a bias that must be zeros."""
    ours = net.tok_emb.weight
    for name in row.theirs:
        tensor = _read(source, name)
        if row.ours == HEAD and not torch.equal(tensor[: ours.shape[0]].to(ours), ours):
            raise InputError(
                f"{source.where} holds a head of its own in {name!r}, the model's is tied to the token"
                " embedding: set model.tie_weights=false"
            )
        if row.ours != HEAD and tensor.any():
            raise InputError(
                f"{source.where} holds {name!r}, a bias of query, key and value, which the model does not"
                " have: set model.qkv_bias=true"
            )


def _check_mask(source: TensorSource, name: str, table: Table) -> None:
    mask = source.read(name).bool()
    C = mask.shape[-1] if mask.dim() else 0
    if mask.numel() != C * C or not torch.equal(mask.reshape(C, C), _causal_mask(C, table).bool()):
        raise InputError(f"{source.where} holds {name!r}, which is not a causal mask: use other weights")


def _causal_mask(C: int, table: Table) -> Tensor:
    """(C, C) of zeros, with ones where the table has them."""
    square = torch.ones(C, C)
    return torch.triu(square, diagonal=1) if table.mask_is_upper else torch.tril(square)


# -------------------------------------------------------------------------------------------------- exporting


def export_tensors(net: GPTBackbone, table: Table, *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The model's tensors under a format's names and in its layout, contiguous, on the CPU.

    Raises InputError for a model that the format cannot hold.
    """
    check_is_gpt2(net.config, f"format={table.format}")
    if table.tied_only and not net.config.tie_weights:
        raise InputError(
            f"format={table.format} holds tied models only, and this model's head is untied"
            " (model.tie_weights=false): use format=hf or format=book"
        )
    parameters: dict[str, Tensor] = dict(net.named_parameters())
    if table.writes_head:
        parameters.setdefault(HEAD, net.tok_emb.weight)
    theirs: dict[str, Tensor] = {}
    for row in table.expanded(net.config.n_layers):
        tensor: Tensor | None = parameters.get(row.ours)
        if tensor is None and row.ours.endswith(QKV_BIAS) and table.qkv_bias:
            tensor = torch.zeros(3 * net.config.emb_dim, dtype=net.tok_emb.weight.dtype)
        if tensor is not None:
            pieces = tensor.chunk(len(row.theirs))
            theirs |= zip(row.theirs, map(row.turned, pieces), strict=True)
    if table.writes_masks:
        for name in of_blocks(table.masks, net.config.n_layers):
            theirs[name] = _causal_mask(net.config.context_length, table)
    return {
        name: tensor.detach().to(device="cpu", dtype=dtype).contiguous() for name, tensor in theirs.items()
    }
