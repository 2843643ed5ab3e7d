"""LoRA adapters: small files in PEFT's layout, for GPT-2 as Hugging Face has it."""

# R rank, I inputs, O outputs

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptpl.errors import InputError
from gptpl.model import GPTConfig, GPTModel
from gptpl.model.lora import is_low_rank
from gptpl.weights.hugging_face import bias_as_shift, table, write_tensors
from gptpl.weights.model_files import Row, check_settings, read_json, required, safetensors_of, write_json
from gptpl.weights.transfer import check_is_gpt2, check_rows

log = logging.getLogger(__name__)

FORMAT = "adapter"
TARGETS = ("qkv", "out_proj", "up_proj", "down_proj", "out_head")
"""The linear layers of GPT-2: the last part of a name in the state dict before `weight`."""
_CONFIG_FILE = "adapter_config.json"
_STEM = "adapter_model"
_MODEL = "base_model.model."
"""PEFT's prefix of every name."""
_HEADS = {"out_head.weight": f"{_MODEL}score.weight", "out_head.bias": f"{_MODEL}score.bias"}
"""A classifier's head, all of which is new."""
_FINAL_NORM = {
    "final_norm.weight": f"{_MODEL}transformer.ln_f.weight",
    "final_norm.bias": f"{_MODEL}transformer.ln_f.bias",
}
"""Written with a head that has a bias, for PEFT alone: see `_for_peft`."""
_FIXED: Mapping[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    **dict.fromkeys(("use_rslora", "use_dora", "lora_bias"), False),
    "rank_pattern": {},
    "alpha_pattern": {},
}
"""Settings of PEFT's LoRA that gptpl has no choice of."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What LoRA has trained: matrices whose product is scaled by alpha / rank, and a classifier's head.

    Attributes:
        tensors: `<layer>.lora_A` (R, I) and `<layer>.lora_B` (O, R) by the names of our layers, and a
            classifier's `out_head.weight` and `out_head.bias`.
        dropout: in training; kept for those who train on.
        final_norm: the base's `final_norm.weight` and `final_norm.bias`, to write a head with a bias.
    """

    tensors: Mapping[str, Tensor]
    rank: int
    alpha: float
    dropout: float = 0.0
    final_norm: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def scale(self) -> float:
        """Factor of the matrices' product."""
        return self.alpha / self.rank


def is_adapter(path: Path) -> bool:
    """Whether this is an adapter's folder."""
    return (path / _CONFIG_FILE).is_file()


def write_adapter(adapter: Adapter, config: GPTConfig, folder: Path, *, base: str) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json` into an existing folder.

    PEFT adds them to the base model that gptpl exported as `hf`, which `base` names.
    """
    check_is_gpt2(config, f"format={FORMAT}")
    names, for_peft = _names(config), _for_peft(adapter)
    held = {names[name]: tensor for name, tensor in adapter.tensors.items()} | for_peft
    tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in held.items()}
    write_tensors(tensors, folder / f"{_STEM}.safetensors")
    # PEFT tells layers by the ends of their names, and two end with c_proj.
    layers = {names[name].removeprefix(_MODEL) for name in adapter.tensors if is_low_rank(name)}
    targets = {".".join(layer.partition(".lora_")[0].split(".")[-2:]) for layer in layers}
    classifies = "out_head.weight" in adapter.tensors
    their_config = {
        **_FIXED,
        "task_type": "SEQ_CLS" if classifies else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": sorted(targets),
        "fan_in_fan_out": True,  # the weights of transformers' Conv1D are (in, out)
        "init_lora_weights": True,
        "modules_to_save": ["score", *(["ln_f"] if for_peft else [])] if classifies else None,
    }
    write_json(folder / _CONFIG_FILE, their_config)


def _for_peft(adapter: Adapter) -> dict[str, Tensor]:
    """A final LayerNorm that replaces the head's bias, which transformers' classifiers lack.

    See `bias_as_shift`; where there is no such shift, PEFT's logits are without the bias.
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
    """The adapter in a folder, for a model of this shape.

    Raises InputError for damaged files, other kinds of adapters, and tensors that do not fit.
    """
    check_is_gpt2(config, str(folder))
    path = folder / _CONFIG_FILE
    settings = read_json(path)
    allowed = {fixed: (value,) for fixed, value in _FIXED.items()}
    check_settings(settings, allowed, path, remedy="merge the adapter with PEFT, and use the merged model")
    rank, alpha = required(settings, ("r", "lora_alpha"), path)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise InputError(f"{path}: r must be a positive whole number, got {rank}: restore the file")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise InputError(f"{path}: lora_alpha must be a number, got {alpha}: restore the file")
    source = safetensors_of(folder, _STEM)
    shapes = {ours: source.shapes[theirs] for ours, theirs in _HEADS.items() if theirs in source.shapes}
    with torch.device("meta"):
        weights = GPTModel(config).state_dict()
    names = _names(config)
    held = [ours for ours, theirs in names.items() if theirs in source.shapes and is_low_rank(ours)]
    for layer in {name.rpartition(".")[0] for name in held}:
        outputs, inputs = weights[f"{layer}.weight"].shape
        shapes |= {f"{layer}.lora_A": (rank, inputs), f"{layer}.lora_B": (outputs, rank)}
    rows = [Row(ours, (theirs,)) for ours, theirs in names.items() if ours in shapes]
    # A final norm with a head that has a bias is for PEFT alone: the base has its own.
    unused = set(_FINAL_NORM.values()) if "out_head.bias" in shapes else set()
    check_rows(rows, shapes, source, unused=unused)
    tensors = {ours: source.read(names[ours]) for ours in shapes}
    return Adapter(tensors=tensors, rank=rank, alpha=float(alpha))


def _names(config: GPTConfig) -> dict[str, str]:
    """PEFT's names of everything of ours that an adapter may hold."""
    names = dict(_HEADS)
    for row in table().expanded(config.n_layers):
        layer, _, kind = row.ours.rpartition(".")
        if kind == "weight" and layer.rpartition(".")[2] in TARGETS:
            theirs = _MODEL + row.theirs[0].removesuffix(".weight")
            names |= {f"{layer}.{matrix}": f"{theirs}.{matrix}.weight" for matrix in ("lora_A", "lora_B")}
    return names
