"""Memory by part, against bytes counted by hand and against real tensors."""

from functools import partial
from typing import Any

import pytest
import torch

from gptpl.model import ClassifierConfig, GPTBackbone, GPTClassifier, GPTConfig, GPTModel
from gptpl.model.parameters import TuneHead, TuneLastBlock, TuneLowRank, Tuning
from gptpl.training.costs import StepMemory, optimizer_state_bytes, step_memory
from gptpl.training.optimizers import adamw, muon
from gptpl.training.performance import FastPath, choose_fast_path

V, T, D, L = 512, 32, 64, 3
CONFIG = GPTConfig(
    vocab_size=V, context_length=T, emb_dim=D, n_heads=4, n_layers=L, drop_rate=0.0, qkv_bias=False,
    tie_weights=True, init="gpt2",
)  # fmt: skip
MATRICES = L * 12 * D * D  # of the blocks: query, key, value, output, feed-forward
# Norms: gain and bias, two in a block and the last; biases of output (D) and feed-forward (4 D, D).
PARAMETERS = V * D + T * D + MATRICES + (2 * L + 1) * 2 * D + L * 6 * D
ADAMW = partial(adamw, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8, decay="matrices")
MUON = partial(
    muon, lr=1e-3, muon_lr=1e-3, momentum=0.9, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8,
    decay="matrices",
)  # fmt: skip


def path(**choices) -> FastPath:
    return choose_fast_path(device_type="cpu", precision="32-true", drop_rate=0.0, total_steps=1, **choices)


def memory(batch_size: int = 4, **changes) -> StepMemory:
    return step_memory(
        CONFIG, changes.pop("path", path()), batch_size=batch_size, max_length=T, low=False, **changes
    )


def test_weights_and_gradients_are_four_bytes_a_parameter():
    assert memory().weights == memory().gradients == 4 * PARAMETERS
    assert memory(weight_bytes=2).weights == 2 * PARAMETERS


def test_adamw_keeps_two_averages_and_muon_one_momentum_of_the_matrices():
    """And of every tensor AdamW has, the number of its steps."""
    tensors = sum(1 for _ in GPTModel(CONFIG).parameters())
    assert optimizer_state_bytes(CONFIG, ADAMW) == 8 * PARAMETERS + 4 * tensors
    rest = tensors - 4 * L
    assert optimizer_state_bytes(CONFIG, MUON) == 4 * MATRICES + 8 * (PARAMETERS - MATRICES) + 4 * rest


@pytest.mark.parametrize("make_optimizer", [ADAMW, MUON])
def test_the_state_is_as_large_as_that_of_a_real_step(make_optimizer):
    net = GPTModel(CONFIG)
    optimizer = make_optimizer(net)
    net(torch.zeros(1, T, dtype=torch.int64)).sum().backward()
    optimizer.step()

    def size(state) -> int:
        if isinstance(state, torch.Tensor):
            return state.nbytes
        return sum(map(size, state.values())) if isinstance(state, dict) else 0

    assert optimizer_state_bytes(CONFIG, make_optimizer) == size(optimizer.state_dict())


def test_what_is_kept_is_what_autograd_really_keeps():
    chosen = path(attention="sdpa")
    net = GPTModel(CONFIG)
    chosen.apply(net)
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = net.hidden(torch.zeros(4, T, dtype=torch.int64))
    for parameter in net.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    assert hidden.requires_grad
    assert memory(path=chosen).activations == pytest.approx(sum(kept.values()), rel=0.02)


def test_the_head_has_its_logits_and_two_copies_of_its_matrix():
    """512 is a multiple of 64: nothing is filled up."""
    rows = 4 * T
    assert memory().head == 4 * (rows * V + 2 * V * D + rows * D)
    assert memory(path=path(head="plain")).head == 3 * 4 * rows * V


def test_activations_grow_with_the_batch_and_less_where_they_are_made_anew():
    one, two, four = (memory(size).activations for size in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one), rel=0.01)
    deep = GPTConfig(**{**vars(CONFIG), "n_layers": 24})
    kept, anew = (
        step_memory(deep, path(recompute=r), batch_size=4, max_length=T, low=False).activations
        for r in (False, True)
    )
    assert anew < 0.4 * kept


def test_gradients_take_the_place_of_activations_unless_they_stay():
    parts: dict[str, Any] = {"weights": 1, "gradients": 10, "optimizer": 100, "activations": 4, "head": 2}
    assert StepMemory(**parts).peak == 111
    assert StepMemory(**(parts | {"activations": 30})).peak == 133
    assert StepMemory(**parts, gradients_stay=True).peak == 117


PARTS: dict[str, Tuning] = {
    "head": TuneHead(),
    "last_block": TuneLastBlock(),
    "lora": TuneLowRank(rank=4, alpha=8.0, dropout=0.0, targets=("qkv", "up_proj")),
}


@pytest.mark.parametrize("classes", [False, True], ids=["language model", "classifier"])
@pytest.mark.parametrize("part", PARTS)
def test_a_part_keeps_what_a_real_step_of_it_keeps(part, classes):
    """Weights, gradients, optimizer and activations of a model of three blocks, from those of one and two."""

    def prepare(net: GPTModel) -> GPTBackbone:
        tuned: GPTBackbone = GPTClassifier(net.config, ClassifierConfig(n_classes=3)) if classes else net
        PARTS[part].apply(tuned)
        return tuned

    config = GPTConfig(**{**vars(CONFIG), "tie_weights": False})
    chosen = path(attention="sdpa")
    found = step_memory(
        config, chosen, batch_size=4, max_length=T, low=False, prepare=prepare,
        optimizer_bytes=optimizer_state_bytes(config, ADAMW, prepare=prepare),
    )  # fmt: skip
    net = prepare(GPTModel(config))
    chosen.apply(net)
    optimizer = ADAMW(net)
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = net.hidden(torch.zeros(4, T, dtype=torch.int64))
    net.out_head(hidden).sum().backward()
    optimizer.step()
    for parameter in net.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    assert found.weights == sum(p.nbytes for p in net.parameters())
    assert found.gradients == sum(p.nbytes for p in net.parameters() if p.requires_grad)
    state = [value for of_one in optimizer.state_dict()["state"].values() for value in of_one.values()]
    assert found.optimizer == sum(tensor.nbytes for tensor in state)
    assert found.activations == pytest.approx(sum(kept.values()), rel=0.02)
    rows = 4 * T
    logits_and_copy = 4 * (rows * V + V * D + rows * D)
    trained_matrix = 0 if part == "lora" else 4 * V * D
    assert found.head == (0 if classes else logits_and_copy + trained_matrix)
