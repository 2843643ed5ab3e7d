"""The Llama-like variant of GPTModel against transformers' Llama, and through every kernel and precision."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from gptpl.model import ClassifierConfig, GPTClassifier, GPTConfig, GPTModel, empty_model
from gptpl.model.gpt import rope_angles, rotate
from gptpl.model.loss import training_loss
from gptpl.training.optimizers import decay_groups, muon

V, C, D, H, L, F_ = 61, 32, 24, 3, 2, 40
TOKENS = torch.randint(V, (3, C), generator=torch.Generator().manual_seed(1))
MODERN: dict[str, Any] = {
    "vocab_size": V,
    "context_length": C,
    "emb_dim": D,
    "n_heads": H,
    "n_layers": L,
    "drop_rate": 0.0,
    "qkv_bias": False,
    "position": "rope",
    "norm": "rmsnorm",
    "feed_forward": "swiglu",
    "linear_bias": False,
}


def model(**changes: Any) -> GPTModel:
    torch.manual_seed(0)
    net = GPTModel(GPTConfig(**(MODERN | changes)))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.3)
    return net.eval()


def under_our_names(theirs: Mapping[str, Tensor], *, tied: bool) -> dict[str, Tensor]:
    ours = {"tok_emb.weight": theirs["model.embed_tokens.weight"]}
    ours["final_norm.weight"] = theirs["model.norm.weight"]
    names = {
        "norm1": "input_layernorm",
        "norm2": "post_attention_layernorm",
        "attn.out_proj": "self_attn.o_proj",
    }
    names |= {f"ff.{name}_proj": f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    for i in range(L):
        block = f"model.layers.{i}."
        for kind in ("weight", "bias"):
            for name, their_name in names.items():
                if f"{block}{their_name}.{kind}" in theirs:
                    ours[f"blocks.{i}.{name}.{kind}"] = theirs[f"{block}{their_name}.{kind}"]
            parts = [theirs.get(f"{block}self_attn.{part}_proj.{kind}") for part in "qkv"]
            if parts[0] is not None:
                ours[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)  # type: ignore[arg-type]
    return ours if tied else ours | {"out_head.weight": theirs["lm_head.weight"]}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_logits_and_gradients_are_those_of_transformers_llama(tied: bool, bias: bool) -> None:
    torch.manual_seed(0)
    rope: dict[str, Any] = {"rope_theta": 500.0}  # under whatever name this version has for it
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V,
            max_position_embeddings=C,
            hidden_size=D,
            num_attention_heads=H,
            num_hidden_layers=L,
            intermediate_size=F_,
            rms_norm_eps=1e-5,
            attention_bias=bias,
            mlp_bias=bias,
            tie_word_embeddings=tied,
            **rope,
        )
    )
    theirs.set_attn_implementation("eager")  # attention written out, unlike ours
    with torch.no_grad():
        for parameter in theirs.parameters():  # norms and biases too: no zero hides a mistake
            parameter.normal_(std=0.3)
    ours = model(hidden_dim=F_, rope_base=500.0, qkv_bias=bias, linear_bias=bias, tie_weights=tied)
    missing, unexpected = ours.load_state_dict(
        under_our_names(dict(theirs.named_parameters()), tied=tied), strict=False
    )
    assert (missing, unexpected) == (["out_head.weight"] if tied else [], [])

    our_logits, their_logits = ours(TOKENS), theirs(TOKENS).logits
    assert our_logits.std() > 0.2
    torch.testing.assert_close(our_logits, their_logits, rtol=0, atol=1e-5)
    for logits in (our_logits, their_logits):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    expected = under_our_names(gradients, tied=tied)
    torch.testing.assert_close(
        {n: p.grad for n, p in ours.named_parameters()}, expected, rtol=1e-4, atol=1e-5
    )


def test_products_of_rotated_queries_and_keys_depend_on_distance_alone() -> None:
    K, shift = 8, 5
    query, key = torch.randn(2, K, dtype=torch.float64)

    def product(query_at: int, key_at: int) -> float:
        qkv = torch.stack([torch.cat([query, key, key]), torch.cat([query, key, key])])[None]  # (1, 2, 3 K)
        turned = rotate(qkv, rope_angles(torch.tensor([query_at, key_at]), K, 100.0), 1)
        assert torch.equal(turned[..., 2 * K :], qkv[..., 2 * K :])
        return float(turned[0, 0, :K] @ turned[0, 1, K : 2 * K])

    assert product(7, 3) == pytest.approx(product(7 + shift, 3 + shift), abs=1e-5)
    assert product(7, 7) == pytest.approx(float(query @ key), abs=1e-5)
    assert abs(product(7, 3) - product(7, 2)) > 1e-3


@pytest.mark.parametrize("kernel", ["blocked", "sdpa"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("head", ["fused", "plain"])
def test_kernels_recomputation_and_heads_give_one_gradient(kernel: Any, recompute: bool, head: Any) -> None:
    def gradients(**settings: Any) -> dict[str, Tensor | None]:
        net = model().train()
        net.recompute_blocks = settings["recompute"]
        for block in net.blocks:
            block.get_submodule("attn").kernel = settings["kernel"]
        training_loss(net, TOKENS[:, :-1], TOKENS[:, 1:], head=settings["head"]).backward()
        return {name: parameter.grad for name, parameter in net.named_parameters()}

    expected = gradients(kernel="sdpa", recompute=False, head="plain")
    found = gradients(kernel=kernel, recompute=recompute, head=head)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_bf16_is_near_fp32_in_a_long_context() -> None:
    """Positions are not rounded with the weights: 999 and 1000 would be one in bf16."""
    net = model(context_length=1024, n_layers=1)
    with torch.no_grad():
        net.get_parameter("blocks.0.attn.qkv.weight").mul_(3)  # attention that depends on positions
        tokens = torch.randint(V, (1, 1024), generator=torch.Generator().manual_seed(2))
        exact = net(tokens)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = net(tokens)
        low = net.to(torch.bfloat16)(tokens)
    for logits in (mixed, low):
        assert (logits.float() - exact).norm() < 0.05 * exact.norm()


def test_an_empty_model_that_is_filled_is_the_model() -> None:
    """What no state dict holds is not left uninitialised."""
    net = model()
    filled = empty_model(net.config)
    filled.load_state_dict(net.state_dict())
    assert torch.equal(filled.eval()(TOKENS), net(TOKENS))


def test_a_classifier_shares_its_layers() -> None:
    net = model()
    classifier = GPTClassifier.on(net, ClassifierConfig(n_classes=3)).eval()
    logits = classifier(TOKENS, torch.tensor([C, 5, 1]))
    expected = classifier.out_head(net.hidden(TOKENS[1:2, :5])[:, -1])
    torch.testing.assert_close(logits[1:2], expected, rtol=0, atol=1e-5)


def test_norms_are_not_decayed_and_muon_gets_every_matrix_of_the_blocks() -> None:
    net = model(tie_weights=True)
    spared = decay_groups(net, weight_decay=0.1)[1]["params"]
    norms = [parameter for name, parameter in net.named_parameters() if "norm" in name]
    assert [id(parameter) for parameter in spared] == [id(parameter) for parameter in norms]
    if hasattr(torch.optim, "Muon"):
        given = muon(net).parts["muon"].param_groups
        assert sum(p.numel() for group in given for p in group["params"]) == L * net.config.block_matrices
