"""Two processes that share the model's parameters train as one process: through the command, for real."""

import functools
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from gptpl.checkpoints.files import write_checkpoint
from gptpl.checkpoints.format import read_checkpoint
from gptpl.checkpoints.loading import load_model
from gptpl.checkpoints.resume_state import state_digest
from gptpl.model import GPTConfig, GPTModel
from gptpl.training.optimizers import muon
from gptpl.training.sharding import shard

STEPS = 6  # as many as `train` makes
ONE = ("trainer=cpu", "data.batch_size=8")
TWO = ("trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2", "data.batch_size=4")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def one(tmp_path_factory, train):
    """The folder of the run of one process."""
    return train(tmp_path_factory.mktemp("one"), *ONE)


@pytest.fixture(scope="module")
def two(tmp_path_factory, train):
    """The folder of the run of two."""
    return train(tmp_path_factory.mktemp("two"), *TWO)


def assert_same_state(run_dir: Path, expected: Path) -> None:
    """Weights and the optimizer's state, under the same names and numbers, up to rounding."""
    ours, theirs = (read_checkpoint(each / "checkpoints" / "last.ckpt") for each in (run_dir, expected))
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    for name, weight in theirs["state_dict"].items():
        torch.testing.assert_close(ours["state_dict"][name], weight, atol=2e-5, rtol=0, msg=name)
    (our_optimizer,), (their_optimizer,) = ours["optimizer_states"], theirs["optimizer_states"]
    groups = [
        [group["params"] for group in each["param_groups"]] for each in (our_optimizer, their_optimizer)
    ]
    assert groups[0] == groups[1]
    assert our_optimizer["state"].keys() == their_optimizer["state"].keys()
    for number, state in their_optimizer["state"].items():
        for name, value in state.items():
            torch.testing.assert_close(our_optimizer["state"][number][name], value, atol=1e-6, rtol=1e-4)


def test_the_losses_are_the_same_at_every_step(one, two, logged):
    ours, theirs = logged(two), logged(one)
    assert list(ours) == list(theirs) == list(range(STEPS + 1))
    for name in ("train/loss", "val/loss", "eval/train_loss", "train/grad_norm", "lr", "train/tokens_seen"):
        expected = [row[name] for row in theirs.values() if name in row]
        assert len(expected) >= 3
        assert [row[name] for row in ours.values() if name in row] == pytest.approx(expected, abs=1e-5), name


def test_the_checkpoint_is_that_of_one_process(one, two):
    assert_same_state(two, one)
    assert load_model(two / "checkpoints" / "best.ckpt").step == STEPS
    said = (two / "train.log").read_text()
    assert said.count("No text samples: the strategy fsdp") == 1


def test_bf16_weights_are_gathered_in_bf16_and_train_like_one_process(tmp_path, train, logged):
    rows = []
    for name, processes in (("one", ONE), ("two", TWO)):
        (tmp_path / name).mkdir()
        rows.append(
            logged(train(tmp_path / name, *processes, "trainer.precision=bf16-mixed", "trainer.max_steps=3"))
        )
    assert 3 in rows[0]
    for step, row in rows[0].items():
        for key in ("train/loss", "val/loss"):
            if key in row:
                assert rows[1][step][key] == pytest.approx(row[key], abs=0.03), (step, key)


def test_lora_trains_the_same_resumes_and_leaves_the_same_adapter(tmp_path, one, train, logged):
    """The frozen weights are sharded like the others."""
    lora = ("tune=lora", "init=run", f"init.checkpoint={one}", "optimizer.lr=1e-2")
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    alone = train(tmp_path / "one", *lora, *ONE)
    both = train(tmp_path / "two", *lora, *TWO, "trainer.stop_at_step=3")
    train(tmp_path / "two", f"resume={both}", "trainer.stop_at_step=null", *TWO)
    ours, theirs = logged(both), logged(alone)
    assert theirs[1]["train/loss"] - theirs[STEPS]["train/loss"] > 0.01
    for name in ("train/loss", "val/loss", "train/grad_norm"):
        expected = [row[name] for row in theirs.values() if name in row]
        assert [row[name] for row in ours.values() if name in row] == pytest.approx(expected, abs=1e-4), name
    adapters = [load_file(each / "adapter" / "adapter_model.safetensors") for each in (both, alone)]
    assert adapters[0].keys() == adapters[1].keys()
    base, tuned = (read_checkpoint(each / "checkpoints/last.ckpt")["state_dict"] for each in (one, both))
    assert all(tuned[name].equal(weight) for name, weight in base.items())


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, train):
    """`stopped(*overrides)`: the folder of the run that stops after step 3."""
    return functools.cache(
        lambda *overrides: train(tmp_path_factory.mktemp("stopped"), *overrides, "trainer.stop_at_step=3")
    )


def test_resumed_it_has_the_bits_of_a_run_without_a_stop(tmp_path, two, train, logged, stopped):
    run_dir = shutil.copytree(stopped(*TWO), tmp_path / "run", symlinks=True)
    assert list(logged(run_dir)) == [0, 1, 2, 3]
    train(tmp_path, f"resume={run_dir}", "trainer.stop_at_step=null", *TWO)
    assert state_digest(last(run_dir)) == state_digest(last(two))


@pytest.mark.parametrize(("before", "after"), [(TWO, ONE), (ONE, TWO)])
def test_a_run_goes_on_with_as_many_processes_as_one_likes(
    tmp_path, one, train, logged, stopped, before, after
):
    run_dir = shutil.copytree(stopped(*before), tmp_path / "run", symlinks=True)
    assert list(logged(run_dir)) == [0, 1, 2, 3]
    train(tmp_path, f"resume={run_dir}", "trainer.stop_at_step=null", *after)
    assert_same_state(run_dir, one)


def half(rank: int, meeting: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    config: dict[str, Any] = {
        "vocab_size": 64, "context_length": 8, "emb_dim": 16, "n_heads": 2, "n_layers": 2, "drop_rate": 0.0,
    }  # fmt: skip
    net: Any = GPTModel(GPTConfig(**config, qkv_bias=True, tie_weights=True))
    names = [name for name, _ in net.named_parameters()]
    net.blocks[0].requires_grad_(False)
    for _ in range(2):  # sharding again changes nothing
        shard(net, init_device_mesh("cpu", (2,)), torch.bfloat16)
    gathered = []
    layer = net.blocks[1].attn.qkv
    layer.register_forward_hook(lambda layer, inputs, output: gathered.append(layer.weight.dtype))
    net(torch.zeros(1, 4, dtype=torch.int64)).float().sum().backward()
    assert gathered == [torch.bfloat16]
    assert {p.dtype for p in net.parameters()} == {layer.weight.grad.dtype} == {torch.float32}
    assert all((p.grad is None) == name.startswith("blocks.0.") for name, p in net.named_parameters())
    assert names == [name for name, _ in net.named_parameters()]
    assert all(p.dim() == len(p.shape) and p.to_local().numel() * 2 == p.numel() for p in net.parameters())
    modern: Any = GPTModel(
        GPTConfig(**config, qkv_bias=False, position="rope", norm="rmsnorm", feed_forward="swiglu")
    )
    shard(modern, init_device_mesh("cpu", (2,)), torch.bfloat16)
    angles = []
    modern.blocks[0].attn.register_forward_pre_hook(lambda layer, inputs: angles.append(inputs[3][0].dtype))
    modern(torch.zeros(1, 4, dtype=torch.int64))
    assert angles == [torch.float32]
    torch.distributed.destroy_process_group()


def on_two(function: Callable[[int, str], None], tmp_path: Path) -> None:
    """Call a function in two copies of this process, with the arguments rank and meeting point."""
    meeting = (tmp_path / "meeting").as_uri()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=function, args=(rank, meeting)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
        assert process.exitcode == 0
        process.close()


def test_every_process_keeps_half_of_every_parameter_and_gathers_it_in_bf16(tmp_path):
    on_two(half, tmp_path)


# --- Muon -----------------------------------------------------------------------------------------------

MUON = ("optimizer=muon", "optimizer.lr=3e-3")  # for new runs alone: it would set a resumed run's
PARTS = (*TWO, "trainer.sharded_checkpoints=true")


@pytest.fixture(scope="module")
def muon_of_one(tmp_path_factory, train):
    """The folder of the run of one process."""
    return train(tmp_path_factory.mktemp("muon_of_one"), *MUON, *ONE)


@pytest.fixture(scope="module")
def muon_of_two(tmp_path_factory, train):
    """The folder of the run of two."""
    return train(tmp_path_factory.mktemp("muon_of_two"), *MUON, *TWO)


def last(run_dir: Path) -> dict[str, Any]:
    return read_checkpoint((run_dir / "checkpoints" / "last.ckpt").resolve())


def assert_like(run_dir: Path, expected: Path) -> None:
    """Muon's bf16 products enlarge the last bit in which sums of gradients differ, under DDP as well."""
    ours, theirs = last(run_dir), last(expected)
    for name, weight in theirs["state_dict"].items():
        torch.testing.assert_close(ours["state_dict"][name], weight, atol=1e-4, rtol=0, msg=name)
    (our_optimizer,), (their_optimizer,) = ours["optimizer_states"], theirs["optimizer_states"]
    assert our_optimizer["param_groups"] == their_optimizer["param_groups"]
    assert our_optimizer["state"].keys() == their_optimizer["state"].keys()
    for number, state in their_optimizer["state"].items():
        assert state.keys() == our_optimizer["state"][number].keys()
        for name, value in state.items():
            torch.testing.assert_close(our_optimizer["state"][number][name], value, atol=1e-5, rtol=1e-3)


def test_muon_trains_like_one_process(muon_of_one, muon_of_two, logged):
    ours, theirs = logged(muon_of_two), logged(muon_of_one)
    for name in ("train/loss", "val/loss", "lr", "lr/muon"):
        expected = [row[name] for row in theirs.values() if name in row]
        assert len(expected) >= 3
        assert [row[name] for row in ours.values() if name in row] == pytest.approx(expected, abs=1e-5), name
    assert_like(muon_of_two, muon_of_one)


def test_muon_resumed_has_the_bits_of_a_run_without_a_stop(tmp_path, muon_of_two, train, stopped):
    run_dir = shutil.copytree(stopped(*MUON, *PARTS), tmp_path / "run", symlinks=True)
    train(tmp_path, f"resume={run_dir}", "trainer.stop_at_step=null", *PARTS)
    assert state_digest(last(run_dir)) == state_digest(last(muon_of_two))


def test_muon_is_resumed_by_one_process_from_parts(tmp_path, muon_of_one, train, stopped):
    run_dir = shutil.copytree(stopped(*MUON, *PARTS), tmp_path / "run", symlinks=True)
    resumed = ("trainer.sharded_checkpoints=false", "trainer.stop_at_step=null")
    train(tmp_path, f"resume={run_dir}", *resumed, *ONE)
    assert_like(run_dir, muon_of_one)


def test_muon_is_resumed_by_two_from_an_older_checkpoint_of_one(tmp_path, muon_of_one, train):
    """With the states of Muon and AdamW by themselves."""
    run_dir = train(tmp_path, *MUON, *ONE, "trainer.stop_at_step=3")
    (state,) = (checkpoint := last(run_dir))["optimizer_states"]
    of_muon, *of_adamw = state["param_groups"]
    count = len(of_muon["params"])
    checkpoint["optimizer_states"] = [
        {
            "muon": {"state": {n: state["state"][n] for n in range(count)}, "param_groups": [of_muon]},
            "adamw": {
                "state": {n - count: state["state"][n] for group in of_adamw for n in group["params"]},
                "param_groups": [g | {"params": [n - count for n in g["params"]]} for g in of_adamw],
            },
        }
    ]
    write_checkpoint(checkpoint, (run_dir / "checkpoints" / "last.ckpt").resolve())
    train(tmp_path, f"resume={run_dir}", "trainer.stop_at_step=null", *TWO)
    assert_like(run_dir, muon_of_one)


def steps_of_muon(rank: int, meeting: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    config = GPTConfig(
        vocab_size=13, context_length=8, emb_dim=15, n_heads=3, n_layers=2, drop_rate=0.0, qkv_bias=True
    )
    for shape in ((2,), (1, 2), (2, 1)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        torch.manual_seed(0)
        whole: Any = GPTModel(config)
        ours: Any = GPTModel(config)
        ours.load_state_dict(whole.state_dict())
        for net in (whole, ours):
            net.blocks[0].attn.out_proj.requires_grad_(False)
        shard(ours, mesh)
        both = [muon(net, lr=1e-2, muon_lr=2e-2, weight_decay=0.1) for net in (whole, ours)]
        for _ in range(3):
            for theirs, mine in zip(whole.parameters(), ours.parameters(), strict=True):
                if theirs.requires_grad:
                    theirs.grad = torch.randn_like(theirs)
                    mine.grad = distribute_tensor(theirs.grad, mesh, mine.placements)
            for optimizer in both:
                optimizer.step()
        kept = 0
        for theirs, mine in zip(whole.parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(mine.full_tensor(), theirs, atol=1e-7, rtol=1e-6)
            if "momentum_buffer" in both[1].state[mine]:
                kept += 1
                momentum = both[1].state[mine]["momentum_buffer"]
                assert momentum.to_local().shape == mine.to_local().shape
                assert momentum.full_tensor().equal(both[0].state[theirs]["momentum_buffer"])
        assert kept == 7  # a last turn with fewer matrices than processes
    torch.distributed.destroy_process_group()


def test_muons_step_on_rows_is_that_on_whole_matrices(tmp_path):
    """With unequal rows; sharded, with copies of one shard, and with one process to each copy."""
    on_two(steps_of_muon, tmp_path)
