"""Both optimizers against torch's own, stepped by hand, and what schedules and checkpoints ask of them."""

# B batch, T time

import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from gptpl.checkpoints.resume_state import digest, one_state
from gptpl.errors import InputError
from gptpl.model import GPTConfig, GPTModel
from gptpl.training.optimizers import MuonWithAdamW, adamw, muon, optimizer_of, peak_lr

ADAMW: dict[str, Any] = {
    "lr": 1e-2,
    "weight_decay": 0.1,
    "betas": (0.9, 0.95),
    "eps": 1e-8,
    "decay": "matrices",
}
MUON: dict[str, Any] = ADAMW | {"muon_lr": 2e-2, "momentum": 0.9}


def net_of(*, tie_weights: bool = False) -> GPTModel:
    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=13,
        context_length=8,
        emb_dim=8,
        n_heads=2,
        n_layers=2,
        drop_rate=0.0,
        qkv_bias=False,
        tie_weights=tie_weights,
    )
    return GPTModel(config)


def batch(step: int) -> Tensor:
    return torch.randint(0, 13, (3, 9), generator=torch.Generator().manual_seed(step))  # (B, T + 1)


def train(net: nn.Module, step: Callable[[], Any], steps: range, zero_grad: Callable[[], Any]) -> None:
    for number in steps:
        tokens = batch(number)
        zero_grad()
        F.cross_entropy(net(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:]).backward()
        step()


def run(net: nn.Module, optimizer: Optimizer, steps: range) -> None:
    train(net, optimizer.step, steps, optimizer.zero_grad)


def is_spared(name: str) -> bool:
    return name.endswith("bias") or "norm" in name


def groups_by_hand(named: list[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    return [
        {"params": [p for name, p in named if not is_spared(name)], "weight_decay": 0.1},
        {"params": [p for name, p in named if is_spared(name)], "weight_decay": 0.0},
    ]


def assert_same_weights(ours: nn.Module, theirs: nn.Module, tolerance: float) -> None:
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (a - b).abs().max().item() <= tolerance, name


# --- against torch's own --------------------------------------------------------------------------------


@pytest.mark.parametrize("tie_weights", [False, True])
def test_adamw_is_torchs_unfused_adamw(tie_weights):
    ours, theirs = net_of(tie_weights=tie_weights), net_of(tie_weights=tie_weights)
    optimizer = torch.optim.AdamW(
        groups_by_hand(list(theirs.named_parameters())),
        lr=1e-2,
        betas=(0.9, 0.95),
        eps=1e-8,
        fused=False,
        foreach=False,
    )
    run(ours, adamw(ours, **ADAMW), range(20))
    run(theirs, optimizer, range(20))
    assert_same_weights(ours, theirs, 1e-6)


def test_adamw_takes_its_settings():
    """A list for the betas too, as a YAML gives it."""
    optimizer = adamw(net_of(), **ADAMW | {"betas": [0.8, 0.7], "eps": 1e-5})
    assert optimizer.defaults["betas"] == (0.8, 0.7)
    assert optimizer.defaults["eps"] == 1e-5
    assert optimizer.defaults["fused"]


def in_blocks(net: GPTModel) -> set[str]:
    """The matrices that Muon is for: those of attention and feed-forward."""
    layers = [
        f"blocks.{number}.{name}"
        for number, block in enumerate(net.blocks)
        for name, layer in block.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    return {f"{name}.weight" for name in layers}


@pytest.mark.parametrize("tie_weights", [False, True])
def test_muon_gets_the_matrices_of_the_blocks_and_adamw_the_rest(tie_weights):
    net = net_of(tie_weights=tie_weights)
    optimizer = muon(net, **MUON)
    names = {id(p): name for name, p in net.named_parameters()}
    held = {
        part: [names[id(p)] for group in inner.param_groups for p in group["params"]]
        for part, inner in optimizer.parts.items()
    }
    assert set(held["muon"]) == in_blocks(net)
    assert len(held["muon"]) == 2 * 4  # query-key-value, out projection, two of the feed-forward
    assert sorted(held["muon"] + held["adamw"]) == sorted(names.values())


def test_muon_with_adamw_is_both_of_torchs_stepped_by_hand():
    """Query, key and value are three parameters there."""
    ours, theirs = net_of(), net_of()
    hidden = {name: p for name, p in theirs.named_parameters() if name in in_blocks(theirs)}
    matrices = {
        name: [nn.Parameter(part.clone()) for part in p.detach().chunk(3 if "qkv" in name else 1)]
        for name, p in hidden.items()
    }
    torchs_muon = torch.optim.Muon(
        [each for of_one in matrices.values() for each in of_one],
        lr=2e-2,
        momentum=0.9,
        weight_decay=0.1,
        adjust_lr_fn="match_rms_adamw",
    )
    # Fused, as ours: Muon's bfloat16 steps would blow up the last bit in which unfused differs.
    rest = [(name, p) for name, p in theirs.named_parameters() if name not in hidden]
    torchs_adamw = torch.optim.AdamW(groups_by_hand(rest), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, fused=True)

    @torch.no_grad()
    def step() -> None:
        for name, whole in hidden.items():
            assert whole.grad is not None
            for each, gradient in zip(matrices[name], whole.grad.chunk(len(matrices[name])), strict=True):
                each.grad = gradient
        torchs_muon.step()
        torchs_adamw.step()
        for name, whole in hidden.items():
            whole.copy_(torch.cat([*matrices[name]]))

    optimizer = muon(ours, **MUON)
    run(ours, optimizer, range(20))
    train(theirs, step, range(20), theirs.zero_grad)
    assert_same_weights(ours, theirs, 1e-6)
    for name, whole in ours.named_parameters():
        if name in hidden:
            momenta = [torchs_muon.state[each]["momentum_buffer"] for each in matrices[name]]
            kept = optimizer.parts["muon"].state[whole]["momentum_buffer"]
            torch.testing.assert_close(kept, torch.cat(momenta), atol=1e-6, rtol=0)


def test_the_state_of_torchs_own_muon_is_taken_over():
    """That of older runs: one momentum buffer for query, key and value."""
    net = net_of()
    old = torch.optim.Muon([{"params": [p for n, p in net.named_parameters() if n in in_blocks(net)]}])
    run(net, old, range(2))
    (ours := muon(net, **MUON).parts["muon"]).load_state_dict(old.state_dict())
    for parameter, state in old.state.items():
        assert ours.state[parameter]["momentum_buffer"].equal(state["momentum_buffer"])


# --- one optimizer to everybody else --------------------------------------------------------------------

MAKERS = [
    pytest.param(lambda net: adamw(net, **ADAMW), id="adamw"),
    pytest.param(lambda net: muon(net, **MUON), id="muon"),
]


@pytest.mark.parametrize("make", MAKERS)
def test_a_saved_state_goes_on_bit_for_bit(make):
    whole, half = net_of(), net_of()
    run(whole, make(whole), range(10))

    first = make(half)
    run(half, first, range(5))
    file = io.BytesIO()
    torch.save({"net": half.state_dict(), "optimizer": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    resumed = net_of()
    resumed.load_state_dict(saved["net"])
    second = make(resumed)
    second.load_state_dict(saved["optimizer"])
    run(resumed, second, range(5, 10))
    assert_same_weights(resumed, whole, 0)


def test_a_state_of_before_goes_on_bit_for_bit():
    """With a state for each part under its name, its parameters numbered from 0."""
    whole, half = net_of(), net_of()
    run(whole, muon(whole, **MUON), range(10))
    first = muon(half, **MUON)
    run(half, first, range(5))
    state = first.state_dict()
    numbers = [n for group in state["param_groups"] for n in group["params"]]
    assert numbers == sorted(state["state"]) == list(range(len(numbers)))
    count = len(state["param_groups"][0]["params"])
    before = {
        name: {
            "state": {number - start: value for number, value in state["state"].items() if number in ours},
            "param_groups": [g | {"params": [n - start for n in g["params"]]} for g in groups],
        }
        for name, start, ours, groups in (
            ("muon", 0, range(count), state["param_groups"][:1]),
            ("adamw", count, range(count, len(numbers)), state["param_groups"][1:]),
        )
    }
    assert digest(one_state(before)) == digest(state)
    second = muon(half, **MUON)
    second.load_state_dict(before)
    run(half, second, range(5, 10))
    assert_same_weights(half, whole, 0)


@pytest.mark.parametrize("make", MAKERS)
def test_a_schedule_drives_every_part(make):
    """With a factor of 0 nothing moves; after a resume the schedule still reaches the parts."""
    net = net_of()
    optimizer = make(net)
    peaks = [group["lr"] for group in optimizer.param_groups]
    optimizer.load_state_dict(make(net_of()).state_dict())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 4)
    rates = []
    for step in range(4):
        rates.append([group["lr"] for group in optimizer.param_groups])
        run(net, optimizer, range(step, step + 1))
        schedule.step()
    assert rates == [[pytest.approx(peak * share) for peak in peaks] for share in (1, 0.75, 0.5, 0.25)]
    before = [p.detach().clone() for p in net.parameters()]
    run(net, optimizer, range(4, 5))
    assert all(p.equal(b) for p, b in zip(net.parameters(), before, strict=True))


def test_the_schedule_changes_what_the_parts_use():
    optimizer = muon(net_of(), **MUON)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert [group["lr"] for group in optimizer.parts["muon"].param_groups] == [1e-2]
    assert [group["lr"] for group in optimizer.parts["adamw"].param_groups] == [5e-3, 5e-3]
    assert schedule.get_last_lr() == [1e-2, 5e-3, 5e-3]


def test_a_closure_is_evaluated_once_with_gradients_and_its_loss_returned():
    net, calls = net_of(), []
    optimizer = muon(net, **MUON)

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        tokens = batch(0)
        loss = F.cross_entropy(net(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:])
        loss.backward()
        return loss

    before = closure().item()
    calls.clear()
    assert optimizer.step(closure).item() == pytest.approx(before)
    assert calls == [True]
    assert closure().item() < before


def test_muon_trains_through_lightning(pretraining):
    """Clipping, the schedule and the checkpoint see one optimizer."""

    def make(net: nn.Module) -> Optimizer:
        return muon(net, **MUON | {"lr": pretraining.lr})

    module = pretraining.module(make_optimizer=make)
    pretraining.fit(module=module)
    losses = list(pretraining.column("train/loss").values())
    assert losses[0] - losses[-1] > 1
    optimizer = module.optimizers(use_pl_optimizer=False)
    assert isinstance(optimizer, MuonWithAdamW)
    floor = pretraining.schedule.min_lr / pretraining.lr
    assert optimizer.parts["muon"].param_groups[0]["lr"] == pytest.approx(MUON["muon_lr"] * floor)


# --- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", 0.0),
        ("lr", -1e-4),
        ("lr", float("nan")),
        ("weight_decay", -0.1),
        ("weight_decay", float("nan")),
        ("betas", (0.9, 1.0)),
        ("betas", (-0.1, 0.9)),
        ("betas", (0.9,)),
        ("eps", -1e-8),
    ],
)
@pytest.mark.parametrize("make", [adamw, muon])
def test_numbers_out_of_range_are_refused(make, name, value):
    settings = (ADAMW if make is adamw else MUON) | {name: value}
    with pytest.raises(InputError, match=rf"^optimizer\.{name} must be [^\n]*, got [^\n]*$"):
        make(net_of(), **settings)


@pytest.mark.parametrize(("name", "value"), [("muon_lr", 0.0), ("momentum", 1.0), ("momentum", -0.5)])
def test_muons_own_numbers_out_of_range_are_refused(name, value):
    with pytest.raises(InputError, match=rf"^optimizer\.{name} must be [^\n]*, got {value}$"):
        muon(net_of(), **MUON | {name: value})


def test_muon_is_refused_where_there_is_nothing_for_it():
    with pytest.raises(InputError, match="optimizer=muon finds no whole matrix"):
        muon(nn.Linear(2, 2), **MUON)


def test_another_optimizers_state_is_refused():
    with pytest.raises(InputError, match="not Muon with AdamW"):
        muon(net_of(), **MUON).load_state_dict(adamw(net_of(), **ADAMW).state_dict())


# --- any class like torch's -----------------------------------------------------------------------------


def with_decay_by_hand(kind: Any, **settings: Any) -> Callable[[nn.Module], Optimizer]:
    return lambda net: kind(groups_by_hand(list(net.named_parameters())), **settings)


@pytest.mark.parametrize(
    ("factory", "by_hand"),
    [
        (
            partial(torch.optim.SGD, lr=0.1, weight_decay=0.1),
            with_decay_by_hand(torch.optim.SGD, lr=0.1),
        ),
        (partial(torch.optim.NAdam, weight_decay=0.1), with_decay_by_hand(torch.optim.NAdam)),
        (torch.optim.Rprop, lambda net: torch.optim.Rprop(net.parameters())),
        (partial(adamw, **ADAMW), lambda net: adamw(net, **ADAMW)),
        (adamw, lambda net: adamw(net, lr=4e-4, weight_decay=0.1, betas=(0.9, 0.999), eps=1e-8)),
    ],
)
def test_torchs_classes_decay_as_ours(factory: Any, by_hand: Any) -> None:
    ours, theirs = net_of(), net_of()
    run(ours, optimizer_of(factory, ours), range(4))
    run(theirs, by_hand(theirs), range(4))
    assert_same_weights(ours, theirs, 0.0)


def test_frozen_parameters_are_not_handed_over() -> None:
    net = net_of()
    net.requires_grad_(False)
    net.out_head.requires_grad_(True)
    for factory in (torch.optim.SGD, torch.optim.Rprop):
        groups = optimizer_of(factory, net).param_groups
        assert [p.shape for group in groups for p in group["params"]] == [net.out_head.weight.shape]


def test_the_peak_of_the_learning_rate() -> None:
    assert peak_lr(partial(torch.optim.SGD, lr=0.25), net_of()) == 0.25
    assert peak_lr(partial(muon, lr=1e-2, muon_lr=3e-2), net_of()) == 1e-2
    assert peak_lr(lambda params, **settings: torch.optim.SGD(params, lr=0.5), net_of()) == 0.5


def takes_two(params: Any, other: Any) -> Any: ...


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (partial(torch.optim.SGD, lr=-1.0), r"SGD refuses its settings: Invalid learning rate: -1\.0$"),
        (partial(torch.optim.SGD, nesterov=True), "SGD refuses its settings: Nesterov momentum requires"),
        (takes_two, "takes_two refuses its settings: .* missing 1 required positional argument: 'other'"),
        (list, r"optimizer: list returned list, not a torch Optimizer$"),
        (torch.optim.LBFGS, "LBFGS computes the loss several times a step"),
        (partial(adamw, lr=-1.0), r"^optimizer\.lr must be positive, got -1\.0"),
    ],
)
def test_what_a_class_refuses_is_one_line(factory: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        optimizer_of(factory, net_of())
    assert "\n" not in str(caught.value)
