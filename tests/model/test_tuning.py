"""What trains, by name; what does not, stays as it was to the last bit."""

# B batch, T time, V vocabulary

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptpl.errors import InputError
from gptpl.model import ClassifierConfig, GPTClassifier, GPTConfig, GPTModel
from gptpl.model.lora import LowRankLinear, add_low_rank
from gptpl.model.parameters import TuneAll, TuneHead, TuneLastBlock, TuneLowRank, Tuning, low_rank_scale
from gptpl.training.optimizers import adamw, muon

V, D = 13, 8
LORA = TuneLowRank(rank=2, alpha=4.0, dropout=0.1, targets=("qkv", "down_proj"))
MATRICES = {
    f"blocks.{i}.{layer}.{matrix}"
    for i in range(2)
    for layer in ("attn.qkv", "ff.down_proj")
    for matrix in ("lora_A", "lora_B")
}
LAST = {
    *(f"blocks.1.{norm}.{kind}" for norm in ("norm1", "norm2") for kind in ("weight", "bias")),
    "blocks.1.attn.qkv.weight",
    *(f"blocks.1.{layer}.{kind}"
      for layer in ("attn.out_proj", "ff.up_proj", "ff.down_proj") for kind in ("weight", "bias")),
    "final_norm.weight",
    "final_norm.bias",
}  # fmt: skip
CLASSES = {"out_head.weight", "out_head.bias"}


def language_model(*, tied: bool = False) -> GPTModel:
    torch.manual_seed(0)
    return GPTModel(
        GPTConfig(
            vocab_size=V,
            context_length=8,
            emb_dim=D,
            n_heads=2,
            n_layers=2,
            drop_rate=0.1,
            qkv_bias=False,
            tie_weights=tied,
            init="gpt2",
        )
    )


def tied_model() -> GPTModel:
    return language_model(tied=True)


def classifier() -> GPTClassifier:
    return GPTClassifier.on(tied_model(), ClassifierConfig(n_classes=3))


def trained(net: torch.nn.Module) -> set[str]:
    return {name for name, parameter in net.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    "make, tuning, expected",
    [
        (language_model, TuneHead(), {"out_head.weight"}),
        (language_model, TuneLastBlock(), {*LAST, "out_head.weight"}),
        (language_model, LORA, MATRICES),
        (tied_model, TuneLastBlock(), LAST),
        (tied_model, LORA, MATRICES),
        (classifier, TuneHead(), CLASSES),
        (classifier, TuneLastBlock(), {*LAST, *CLASSES}),
        (classifier, LORA, {*MATRICES, *CLASSES}),
    ],
)
def test_what_trains(make, tuning, expected):
    net = make()
    tuning.apply(net)
    assert trained(net) == expected
    sizes = {name: parameter.numel() for name, parameter in net.named_parameters()}
    some, every = sum(sizes[name] for name in expected), sum(sizes.values())
    assert f"), {some:,} of {every:,} parameters train ({some / every:.1%})" in tuning.report(net)


def test_all_changes_nothing():
    net = language_model()
    TuneAll().apply(net)
    assert trained(net) == set(net.state_dict()) == set(language_model().state_dict())


def test_what_is_said_of_heads():
    assert "not the head, which is tied" in TuneLastBlock().report(tied_model())
    assert "and the new head" in LORA.report(classifier())


def test_a_tied_head_alone_is_refused():
    net = tied_model()
    with pytest.raises(
        InputError, match=r"^tune=head would train the token embedding.*: give tune=last_block"
    ):
        TuneHead().apply(net)
    assert trained(net) == trained(tied_model())


def test_a_classifiers_head_gets_no_matrices():
    with pytest.raises(InputError, match=r"^tune\.targets has out_head, a classifier's head.*: omit it"):
        TuneLowRank(rank=2, alpha=4.0, dropout=0.0, targets=("out_head",)).apply(classifier())


def test_states_are_plain_and_give_the_scale():
    assert [low_rank_scale(t.state()) for t in (TuneAll(), TuneHead(), TuneLastBlock(), LORA)] == [
        None,
        None,
        None,
        2.0,
    ]
    assert LORA.state() == {
        "name": "lora", "rank": 2, "alpha": 4.0, "dropout": 0.1, "targets": ["qkv", "down_proj"]
    }  # fmt: skip


SETTINGS: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.5, "betas": (0.9, 0.99), "eps": 1e-8, "decay": "all"}
ADAMW: Callable[..., Any] = partial(adamw, **SETTINGS)
MUON: Callable[..., Any] = partial(muon, muon_lr=0.1, momentum=0.9, **SETTINGS)


def loss_of(net: GPTModel | GPTClassifier) -> Tensor:
    tokens = torch.randint(0, V, (3, 8))
    if isinstance(net, GPTClassifier):
        return F.cross_entropy(net(tokens, torch.tensor([8, 3, 5])), torch.tensor([0, 2, 1]))
    return F.cross_entropy(net(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "make, tuning, make_optimizer",
    [
        (language_model, TuneHead(), ADAMW),
        (tied_model, LORA, ADAMW),
        (classifier, LORA, ADAMW),
        (classifier, TuneLastBlock(), MUON),
    ],
)
def test_frozen_weights_stay_to_the_bit_and_cost_no_gradient(make, tuning, make_optimizer, recompute):
    net = make().train()
    tuning.apply(net)
    net.recompute_blocks = recompute
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    names = trained(net)
    optimizer = make_optimizer(net)
    of_optimizer = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(p) for p in of_optimizer} == {id(dict(net.named_parameters())[name]) for name in names}
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(net).backward()
        assert {name for name, p in net.named_parameters() if p.grad is not None} == names
        optimizer.step()
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in names), name


def test_no_activation_below_the_last_block_is_kept():
    """What autograd keeps of the frozen blocks would be as much as for a training of all."""

    def kept(tuning: Tuning) -> int:
        net = language_model()
        tuning.apply(net)
        own = {parameter.data_ptr() for parameter in net.parameters()}
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in own:
                sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = loss_of(net)
        del loss
        return sum(sizes.values())

    assert kept(TuneHead()) < kept(TuneLastBlock()) < 0.75 * kept(TuneAll())


def test_muon_refuses_what_leaves_it_no_whole_matrix():
    net = language_model()
    LORA.apply(net)
    with pytest.raises(InputError, match=r"^optimizer=muon finds no whole matrix .*: use optimizer=adamw$"):
        MUON(net)


def test_muon_leaves_matrices_of_low_rank_to_adamw():
    net = language_model()
    add_low_rank(net, rank=2, alpha=4.0, dropout=0.0, targets=["qkv"])
    assert isinstance(net.blocks[0].attn.qkv, LowRankLinear)  # type: ignore[union-attr]
    parts = MUON(net).parts
    of_muon = {id(p) for group in parts["muon"].param_groups for p in group["params"]}
    named = {name for name, p in net.named_parameters() if id(p) in of_muon}
    assert named == {name for name, p in net.named_parameters() if ".weight" in name and p.dim() == 2
                     and name.startswith("blocks.")}  # fmt: skip
