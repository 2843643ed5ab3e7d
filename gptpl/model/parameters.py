"""The size of a model, known before any memory is spent on it, and a model for which nothing is drawn."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from gptpl.model.classifier import ClassifierConfig, GPTClassifier
from gptpl.model.gpt import GPTConfig, GPTModel
from gptpl.model.lora import is_low_rank

_PARTS = {
    "tok_emb": "token embedding",
    "pos_emb": "position embedding",
    "attn": "attention",
    "ff": "feed-forward",
    "norm1": "norms",
    "norm2": "norms",
    "final_norm": "norms",
    "out_head": "head",
}
"""The part of the model that a module belongs to, by its name."""


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Parameters of a model: the total, with the head tied to the embedding, and with a head of its own.

    `fp32_bytes` are those of the total; gradients and optimizer state come on top. `parts` is the total by
    part of the model, in the order of the data; a tied head has none.
    """

    total: int
    tied: int
    untied: int
    fp32_bytes: int
    parts: Mapping[str, int]


def parameters_of(net: nn.Module) -> int:
    """The number of a model's parameters, in all its shards together, without low-rank matrices."""
    return sum(parameter.numel() for name, parameter in net.named_parameters() if not is_low_rank(name))


def count_parameters(config: GPTConfig, classifier: ClassifierConfig | None = None) -> ParameterCount:
    """Count the parameters of `GPTModel(config)`, or of a classifier, without allocating them.

    A classifier's head is its own: it counts in `total`, `tied` and `untied`.
    """
    with torch.device("meta"):
        model = GPTModel(config) if classifier is None else GPTClassifier(config, classifier)
    parts = dict.fromkeys(_PARTS.values(), 0)
    for name, parameter in model.named_parameters():  # lists a tied weight once, as the embedding's
        module = name.split(".")[2] if name.startswith("blocks.") else name.split(".")[0]
        parts[_PARTS[module]] += parameter.numel()
    total, head = sum(parts.values()), model.out_head.weight.numel()
    if classifier is not None:
        return ParameterCount(total=total, tied=total, untied=total, fp32_bytes=4 * total, parts=parts)
    tied = total - parts["head"]
    return ParameterCount(total=total, tied=tied, untied=tied + head, fp32_bytes=4 * total, parts=parts)


def empty_model(
    config: GPTConfig, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> GPTModel:
    """A `GPTModel` with uninitialised parameters, to be filled: nothing is drawn. Tied as configured."""
    with torch.device("meta"):
        net = GPTModel(config)
    net = net.to(dtype).to_empty(device=device)
    assert not list(net.buffers()), "a buffer that no state dict holds would stay uninitialised"
    if config.tie_weights:  # `to_empty` makes two tensors of the shared one
        net.out_head.weight = net.tok_emb.weight
    return net
