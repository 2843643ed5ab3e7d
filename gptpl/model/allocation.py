"""A model whose weights come from elsewhere: memory for them, and no random number drawn."""

import torch

from gptpl.model.config import GPTConfig
from gptpl.model.gpt import GPTModel


def empty_model(
    config: GPTConfig, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> GPTModel:
    """A `GPTModel` of arbitrary numbers, to be filled; its head is tied where the configuration says so."""
    with torch.device("meta"):
        net = GPTModel(config)
    net = net.to(dtype).to_empty(device=device)
    if config.tie_weights:  # `to_empty` makes two tensors of the shared one
        net.out_head.weight = net.tok_emb.weight
    return net
