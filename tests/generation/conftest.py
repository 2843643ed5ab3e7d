"""A tiny GPT-2 with opinions, twice: Hugging Face's and ours, from the same random weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from gptpl.model import GPTConfig, GPTModel

V, C = 61, 48


@pytest.fixture(scope="session")
def twins(to_ours: Callable[..., dict[str, Tensor]]) -> tuple[Any, GPTModel]:
    """(theirs, ours): vocabulary 61, context 48; logits so far apart that rounding decides nothing."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=V,
        n_positions=C,
        n_embd=24,
        n_head=3,
        n_layer=2,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    theirs = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.4)
        # So that greedy text does not run in a circle of a few tokens.
        theirs.transformer.ln_f.bias.zero_()
        theirs.transformer.wpe.weight.normal_(std=3.0)
    theirs.generation_config.pad_token_id = V - 1
    ours = GPTModel(
        GPTConfig(
            vocab_size=V,
            context_length=C,
            emb_dim=24,
            n_heads=3,
            n_layers=2,
            drop_rate=0.0,
            qkv_bias=True,
            tie_weights=False,
        )
    )
    ours.load_state_dict(to_ours(dict(theirs.named_parameters()), layers=2, qkv_bias=True))
    return theirs.eval(), ours.eval()
