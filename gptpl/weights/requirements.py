"""Whether weights fit the model, and the model the machine: said before anything is fetched or loaded."""

import psutil

from gptpl.errors import InputError
from gptpl.model import GPTConfig
from gptpl.weights.transfer import Crop

FIELDS = ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers", "qkv_bias", "tie_weights")
"""What weights fix; the dropout rate and the way of drawing weights are free."""


def check_fits(
    wanted: GPTConfig, got: GPTConfig, *, name: str, crop: Crop | None = None, choice: str | None = None
) -> None:
    """Raises InputError with every field that differs, what it is on both sides, and what to set.

    Args:
        wanted: the model that is to be filled.
        got: the model that the weights are of.
        name: of the weights, for the message.
        crop: what may be shorter than in the weights; None: nothing, and no setting could allow it.
        choice: the model of conf/model that has just these weights.
    """
    different = [field for field in FIELDS if getattr(wanted, field) != getattr(got, field)]
    allowed = crop or Crop()
    shorter = {
        "context_length": (allowed.context, wanted.context_length < got.context_length),
        "vocab_size": (allowed.vocabulary, wanted.vocab_size < got.vocab_size),
    }
    left = [field for field in different if not all(shorter.get(field, (False, False)))]
    if not left:
        return
    facts = "; ".join(
        f"model.{field}={_spelt(getattr(wanted, field))}, they have {_spelt(getattr(got, field))}"
        for field in left
    )
    overrides = " ".join(f"model.{field}={_spelt(getattr(got, field))}" for field in left)
    remedy = f"set model={choice}" if choice and len(left) > 1 else f"set {overrides}"
    for field, option in (("context_length", "crop_context"), ("vocab_size", "crop_vocabulary")):
        if crop is not None and field in left and shorter[field][1]:
            remedy += f", or init.{option}=true to leave out the rest of their {field.replace('_', ' ')}"
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


def _spelt(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
