"""LoRA adapters: small files in PEFT's layout, for GPT-2 as Hugging Face has it."""

# R rank, I inputs, O outputs

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from gptpl.errors import InputError
from gptpl.model import GPTConfig
from gptpl.model.gpt import EXPANSION
from gptpl.model.lora import is_low_rank
from gptpl.weights.hugging_face import bias_as_shift, table, write_tensors
from gptpl.weights.model_files import DTYPES, read_json, required, safetensors_of, write_json
from gptpl.weights.transfer import check_is_gpt2

log = logging.getLogger(__name__)

FORMAT = "adapter"
TARGETS = ("qkv", "out_proj", "up_proj", "down_proj", "out_head")
"""The linear layers of GPT-2: the last part of a name in the state dict before `weight`."""
_CONFIG_FILE = "adapter_config.json"
_STEM = "adapter_model"
_MODEL = "base_model.model."
"""What PEFT has before every name of the model's."""
_HEADS = {"out_head.weight": f"{_MODEL}score.weight", "out_head.bias": f"{_MODEL}score.bias"}
"""A classifier's head, which is new: all of it is in its adapter."""
_FINAL_NORM = {
    "final_norm.weight": f"{_MODEL}transformer.ln_f.weight",
    "final_norm.bias": f"{_MODEL}transformer.ln_f.bias",
}
"""Stands beside a head that has a bias, for PEFT alone: see `_for_peft`."""
_FIXED: Mapping[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "use_rslora": False,
    "use_dora": False,
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
}
"""What PEFT's LoRA can have otherwise, and gptpl's cannot."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What a training by LoRA made: matrices, whose product counts alpha / rank times, and a head."""

    tensors: Mapping[str, Tensor]
    """`<layer>.lora_A` (R, I) and `<layer>.lora_B` (O, R) by the names of our layers.

    And a classifier's `out_head.weight` and `out_head.bias`.
    """
    rank: int
    alpha: float
    dropout: float = 0.0
    """In training; kept for whoever trains on."""
    final_norm: Mapping[str, Tensor] = field(default_factory=dict)
    """The base's, `final_norm.weight` and `final_norm.bias`; needed to write a head with a bias."""

    @property
    def scale(self) -> float:
        """Of the matrices' product."""
        return self.alpha / self.rank


def is_adapter(path: Path) -> bool:
    """Whether this is an adapter's folder."""
    return (path / _CONFIG_FILE).is_file()


def write_adapter(adapter: Adapter, config: GPTConfig, folder: Path, *, base: str) -> None:
    """`adapter_model.safetensors` and `adapter_config.json`, into a folder that is there.

    PEFT opens them on the base model that gptpl exported as `hf`; `base` is what is said there of it.
    """
    check_is_gpt2(config, "format=adapter")
    names, for_peft = _names(config), _for_peft(adapter)
    held = {names[name]: tensor for name, tensor in adapter.tensors.items()} | for_peft
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in held.items()}
    write_tensors(tensors, folder / f"{_STEM}.safetensors")
    # PEFT tells layers by the ends of their names, and c_proj is the name of two.
    layers = {names[name].removeprefix(_MODEL) for name in adapter.tensors if is_low_rank(name)}
    targets = {".".join(layer.partition(".lora_")[0].split(".")[-2:]) for layer in layers}
    classes = "out_head.weight" in adapter.tensors
    their_config = {
        **_FIXED,
        "task_type": "SEQ_CLS" if classes else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": sorted(targets),
        "fan_in_fan_out": True,  # the weights of transformers' Conv1D are (in, out)
        "init_lora_weights": True,
        "modules_to_save": ["score", *(["ln_f"] if for_peft else [])] if classes else None,
    }
    write_json(folder / _CONFIG_FILE, their_config)


def _for_peft(adapter: Adapter) -> dict[str, Tensor]:
    """What does for PEFT the work of a head's bias, which transformers' classifier has no place for.

    A shift of the final LayerNorm's bias, see `bias_as_shift`. Where there is none, as with more classes than
    the model is wide, PEFT's logits are without the bias.
    """
    if "out_head.bias" not in adapter.tensors:
        return {}
    shift = bias_as_shift(adapter.tensors["out_head.weight"], adapter.tensors["out_head.bias"])
    if shift is None:
        log.warning("PEFT has no place for the bias of this head: train with task.head_bias=false to use it")
        return {}
    norm = dict(adapter.final_norm)
    norm["final_norm.bias"] = (norm["final_norm.bias"].double() + shift).to(norm["final_norm.bias"].dtype)
    return {theirs: norm[name] for name, theirs in _FINAL_NORM.items()}


def read_adapter(folder: Path, config: GPTConfig) -> Adapter:
    """The adapter of a folder, for a model of this shape.

    Raises InputError for files that are not whole, another kind of adapter, and tensors that do not fit.
    """
    check_is_gpt2(config, str(folder))
    path = folder / _CONFIG_FILE
    said = read_json(path)
    for fixed, value in _FIXED.items():
        if said.get(fixed, value) != value:
            raise InputError(
                f"{path} says {fixed}={said[fixed]}, gptpl adds plain LoRA: merge the adapter with PEFT, and"
                " use the merged model"
            )
    rank, alpha = required(said, ("r", "lora_alpha"), path)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise InputError(f"{path} says r={rank}: restore the file")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise InputError(f"{path} says lora_alpha={alpha}: restore the file")
    source = safetensors_of(folder, _STEM)
    ours = {theirs: name for name, theirs in _names(config).items()}
    D = config.emb_dim  # outputs and inputs of each kind of layer:
    shapes = ((3 * D, D), (D, D), (EXPANSION * D, D), (D, EXPANSION * D), (config.vocab_size, D))
    sizes = dict(zip(TARGETS, shapes, strict=True))
    tensors: dict[str, Tensor] = {}
    for theirs, shape in source.shapes.items():
        if theirs in _FINAL_NORM.values() and _HEADS["out_head.bias"] in source.shapes:
            continue  # of PEFT's own use, the base has its own
        name = ours.get(theirs)
        if name is None or source.dtypes[theirs] not in DTYPES:
            raise InputError(
                f"{source.where} holds {theirs!r} as {source.dtypes[theirs]}, which gptpl has no place for:"
                " use an adapter of a GPT-2 with as many layers"
            )
        if is_low_rank(name):
            layer, _, matrix = name.rpartition(".")
            outputs, inputs = sizes[layer.rpartition(".")[2]]
            wanted = (rank, inputs) if matrix == "lora_A" else (outputs, rank)
            if shape != wanted:
                raise InputError(
                    f"{source.where} holds {theirs!r} as {shape}, the model wants {wanted}: use the adapter"
                    " with its own base"
                )
        tensors[name] = source.read(theirs)
    for each in tensors:
        twin = each.replace("lora_A", "lora_B") if "lora_A" in each else each.replace("lora_B", "lora_A")
        if twin not in tensors:
            raise InputError(f"{source.where} holds {each} without {twin}: fetch it anew")
    return Adapter(tensors=tensors, rank=rank, alpha=float(alpha))


def _names(config: GPTConfig) -> dict[str, str]:
    """PEFT's name of everything of ours that an adapter may hold."""
    names = dict(_HEADS)
    for row in table().expanded(config.n_layers):
        layer, _, kind = row.ours.rpartition(".")
        if kind == "weight" and layer.rpartition(".")[2] in TARGETS:
            theirs = _MODEL + row.theirs[0].removesuffix(".weight")
            names |= {f"{layer}.{matrix}": f"{theirs}.{matrix}.weight" for matrix in ("lora_A", "lora_B")}
    return names
