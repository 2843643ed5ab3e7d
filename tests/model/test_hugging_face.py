"""GPTModel computes what Hugging Face's GPT-2 computes from the same random weights: logits and gradients."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from gptpl.model import GPTConfig, GPTModel

V, C, D, H, L = 61, 16, 24, 3, 2


def hugging_face_model(*, tied: bool) -> GPT2LMHeadModel:
    """A tiny GPT-2 whose every weight, LayerNorms and biases too, is random: no zero hides a mistake."""
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=V,
            n_positions=C,
            n_embd=D,
            n_head=H,
            n_layer=L,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            tie_word_embeddings=tied,
        )
    )
    model.set_attn_implementation("eager")  # attention written out, unlike ours
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_and_gradients_agree(tied: bool, qkv_bias: bool, to_ours: Any) -> None:
    torch.manual_seed(0)
    theirs = hugging_face_model(tied=tied).train()
    if not qkv_bias:
        with torch.no_grad():
            for block in theirs.transformer.h:
                block.attn.c_attn.bias.zero_()
    ours = GPTModel(
        GPTConfig(
            vocab_size=V,
            context_length=C,
            emb_dim=D,
            n_heads=H,
            n_layers=L,
            drop_rate=0.0,
            qkv_bias=qkv_bias,
            tie_weights=tied,
        )
    ).train()
    ours.load_state_dict(to_ours(dict(theirs.named_parameters()), layers=L, qkv_bias=qkv_bias))

    tokens = torch.randint(V, (3, C + 1))
    our_logits = ours(tokens[:, :-1])
    their_logits = theirs(tokens[:, :-1]).logits
    torch.testing.assert_close(our_logits, their_logits, rtol=0, atol=1e-5)
    assert our_logits.std() > 0.5  # logits that say something, not a row of near-zeros

    for logits in (our_logits, their_logits):
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    their_gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    our_gradients = {name: p.grad for name, p in ours.named_parameters()}
    expected = to_ours(their_gradients, layers=L, qkv_bias=qkv_bias)
    if tied:
        del expected["out_head.weight"]  # the token embedding's, once more
    torch.testing.assert_close(our_gradients, expected, rtol=1e-4, atol=1e-6)
