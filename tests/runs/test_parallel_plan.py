"""Strategies on paper, against volumes counted by hand, and against what torch calls without memory."""

from dataclasses import replace
from functools import lru_cache

import pytest
import torch

from gptpl.config.compose import compose
from gptpl.errors import InputError
from gptpl.model import GPTBackbone, GPTConfig, GPTModel
from gptpl.model.parameters import TuneLastBlock
from gptpl.runs.parallel_plan import Cluster, Layout, Work, collectives, layouts, parallel_plan, work_of
from gptpl.runs.trial import dry_run
from gptpl.training.costs import step_memory
from gptpl.training.optimizers import adamw, muon
from gptpl.training.performance import FastPath, choose_fast_path

V, T, D, L = 512, 32, 64, 3
CONFIG = GPTConfig(
    vocab_size=V, context_length=T, emb_dim=D, n_heads=4, n_layers=L, drop_rate=0.0, qkv_bias=False,
    tie_weights=True, init="gpt2",
)  # fmt: skip
BLOCK = 12 * D * D + 2 * 2 * D + 6 * D  # matrices, norms, biases of output (D) and feed-forward (4 D, D)
ROOT = V * D + T * D + 2 * D
EIGHT = Cluster(nodes=2, devices_per_node=4, microseconds_per_hop=0)


def path(precision: str = "bf16-mixed", **choices) -> FastPath:
    return choose_fast_path(
        device_type="cpu", precision=precision, total_steps=1, attention="sdpa", head="fused", compile="off",
        **choices,
    )  # fmt: skip


@lru_cache
def work(config: GPTConfig = CONFIG, precision: str = "bf16-mixed", **changes) -> Work:
    given = {"sequences": 64, "max_length": T, "low": precision != "32-true"} | changes
    return work_of(config, path(precision), **given)


def layout(name: str, cluster: Cluster = EIGHT) -> Layout:
    return next(each for each in layouts(cluster, CONFIG) if each.name == name)


def sent(name: str, **changes) -> dict[tuple[str, str], list[float]]:
    """Calls, bytes of the tensors, bytes sent within and between nodes, by operation and what is sent."""
    found: dict[tuple[str, str], list[float]] = {}
    for each in collectives(work(), layout(name), EIGHT, **({"batch_size": 4, "accumulate": 2} | changes)):
        numbers = (each.calls, each.bytes, each.sent_within, each.sent_between)
        before = found.get((each.operation, each.of), [0.0] * 4)
        found[each.operation, each.of] = [old + new for old, new in zip(before, numbers, strict=True)]
    return found


def ring(size: float) -> list[float]:
    """Of a ring of 8, in which a fourth of the edges is between nodes."""
    return [7 / 8 * size * 3 / 4, 7 / 8 * size / 4]


def test_what_a_plan_says_to_type_chooses_that_strategy():
    typed = {each.name: each.trainer for each in layouts(EIGHT, CONFIG) if each.tensor == 1}
    chosen = {name: compose(*str(words).split()).trainer.strategy for name, words in typed.items()}
    assert chosen == {"DDP": "ddp", "FSDP": "fsdp", "HSDP, 4 shards": "hsdp"}


def test_ddp_sums_all_gradients_once_a_step():
    size = 4 * (L * BLOCK + ROOT)
    assert sent("DDP") == {("all_reduce", "gradients"): [2, size, *ring(2 * size)]}


def test_fsdp_gathers_and_scatters_for_every_batch():
    gathered, scattered = 2 * 2 * (2 * L * BLOCK + ROOT), 2 * 4 * (L * BLOCK + ROOT)
    assert sent("FSDP") == {
        ("all_gather", "weights"): [2 * (2 * L + 1), gathered, *ring(gathered)],
        ("reduce_scatter", "gradients"): [2 * (L + 1), scattered, *ring(scattered)],
    }


def test_hsdp_sends_shards_alone_between_nodes():
    found = sent("HSDP, 4 shards")
    shards = 2 * 4 * (L * BLOCK + ROOT) / 4
    assert found["all_reduce", "shards of gradients"] == [2 * (L + 1), shards, 0, shards]  # 2 (2 - 1) / 2
    assert found["all_gather", "weights"][3] == found["reduce_scatter", "gradients"][3] == 0


def test_tensor_parallelism_sums_activations_within_a_node():
    calls, size = 2 * (4 * L + 2), 4 * T * D * 2
    assert sent("TP 2 x FSDP 4")["all_reduce", "activations"] == [calls, calls * size, calls * size, 0]
    again = sent("TP 2 x FSDP 4", recompute=True)["all_reduce", "activations"][0]
    assert again == 2 * (6 * L + 2)


def test_a_collective_takes_as_long_as_its_slower_link_and_its_hops():
    [blocks, root] = collectives(work(), layout("DDP"), EIGHT, batch_size=1, accumulate=1)
    size = 2 * 7 / 8 * 4 * L * BLOCK
    assert blocks.seconds(EIGHT) == pytest.approx(max(size / 450e9, size / 4 / 50e9))
    assert blocks.seconds(replace(EIGHT, gb_per_second_between=500.0)) == pytest.approx(size / 450e9)
    slow = replace(EIGHT, microseconds_per_hop=7.0)
    assert root.seconds(slow) - root.seconds(EIGHT) == pytest.approx(2 * 3 * 7e-6)  # a tree of 8: up and down


SMALL = GPTConfig(
    vocab_size=50257, context_length=1024, emb_dim=768, n_heads=12, n_layers=2, drop_rate=0.1, qkv_bias=True,
    tie_weights=True, init="gpt2",
)  # fmt: skip
"""As wide as GPT-2 small."""


@pytest.mark.parametrize(
    ("config", "precision", "cluster"),
    [
        (CONFIG, "32-true", Cluster(devices_per_node=2, tflops=1)),
        (CONFIG, "bf16-mixed", Cluster(nodes=8)),
        (SMALL, "bf16-mixed", Cluster(nodes=8)),
    ],
    ids=["tiny, 2", "tiny, 64", "768 wide, 64"],
)
def test_torch_calls_what_was_computed(config, precision, cluster):
    """Of 64 ranks each has less than one row of some tensors: these are padded."""
    one = work(config, precision)
    strategies = [each for each in layouts(cluster, config) if each.tensor == 1]
    assert len(strategies) == (2 if cluster.nodes == 1 else 3)
    for each in strategies:
        run = dry_run(one, each, cluster, path(precision), make_optimizer=adamw)
        assert run.agrees, run.rows()
        sizes = {name: size for name, (_, size) in run.called.items()}
        assert sizes == {name: size for name, (_, size) in run.computed.items()}
    assert not torch.distributed.is_initialized()


def test_recomputed_activations_and_weights_in_bf16_send_what_was_computed():
    low = work(precision="bf16-true", weight_bytes=2)
    chosen = path("bf16-true", recompute=True)
    for each in (layout("DDP"), layout("FSDP")):
        run = dry_run(low, each, EIGHT, chosen, make_optimizer=adamw)
        assert run.agrees, run.rows()
    assert run.called["reduce_scatter"][1] == 2 * 4 * (L * BLOCK + ROOT)


def test_a_plain_head_and_frozen_blocks_send_what_was_computed():
    """The plain head's root is gathered twice, for the backward pass what trains and one block before it."""

    def last_block(net: GPTModel) -> GPTBackbone:
        TuneLastBlock().apply(net)
        return net

    untied, chosen = replace(CONFIG, tie_weights=False), replace(path(), head="plain")
    frozen = work_of(untied, path(), sequences=64, max_length=T, low=True, prepare=last_block)
    run = dry_run(frozen, layout("FSDP"), EIGHT, path(), make_optimizer=adamw, prepare=last_block)
    assert run.agrees, run.rows()
    assert run.called["all_gather"][0] == 2 * (1 + L + 2)
    plain = work_of(CONFIG, chosen, sequences=64, max_length=T, low=True)
    run = dry_run(plain, layout("FSDP"), EIGHT, chosen, make_optimizer=adamw)
    assert run.agrees, run.rows()
    assert run.called["all_gather"][0] == 2 * (2 + 2 * L)


@pytest.mark.parametrize("cluster", [Cluster(devices_per_node=5), Cluster(nodes=8)])
def test_muon_exchanges_what_was_computed(cluster):
    """Of 12 matrices some are left for a last turn, and of 64 ranks most have none."""
    one = work(with_muon=True)
    for each in layouts(cluster, CONFIG):
        if each.tensor == 1:
            run = dry_run(one, each, cluster, path(), make_optimizer=muon)
            assert run.agrees, run.rows()
            assert run.called.get("all_to_all", (0, 0))[0] == 2 * -(-4 * L // each.shards) * (each.shards > 1)


def test_muons_matrices_are_gathered_by_one_device_and_sent_back():
    """Of 12 matrices, by 8 devices in two turns: a feed-forward's of 4 D x D, then one of D x D."""
    [all_to_all] = [
        each
        for each in collectives(work(with_muon=True), layout("FSDP"), EIGHT, batch_size=4, accumulate=2)
        if each.operation == "all_to_all"
    ]
    size = 4 * (L * 12 * D * D // 8 + 4 * D * D + 3 * D * D)
    assert (all_to_all.calls, all_to_all.bytes) == (2 * 2, size)
    assert (all_to_all.sent_within, all_to_all.sent_between) == (3 / 8 * size, 4 / 8 * size)


def test_orthogonalising_is_divided_among_devices_that_shard():
    """Under DDP every device does all. A product of (m, n) and (n, m) is 2 m m n FLOP."""
    of = [
        {each.layout.name: each for each in parallel_plan(work(with_muon=yes), EIGHT).strategies}
        for yes in (False, True)
    ]
    square, wide = 5 * 6 * D**3, 5 * (2 * 4 * 2 + 2) * D**3
    flops = EIGHT.reached_flops("bf16-mixed")
    more = {name: of[1][name].compute_seconds - each.compute_seconds for name, each in of[0].items()}
    assert more["DDP"] == pytest.approx(L * (4 * square + 2 * wide) / flops)
    assert more["FSDP"] == pytest.approx((wide + 3 * square) / flops)  # the first of two turns, the second
    assert of[1]["FSDP"].unfit is None
    assert of[1]["FSDP"].memory.peak == of[0]["FSDP"].memory.peak  # gathered weights are freed before
    [alone] = parallel_plan(work(sequences=8, with_muon=True), Cluster(devices_per_node=1)).strategies
    assert alone.efficiency == pytest.approx(1)


def test_memory_is_that_of_one_device_divided():
    one, plan = work(), parallel_plan(work(), EIGHT)
    of = {each.layout.name: each for each in plan.strategies}
    whole = step_memory(CONFIG, path(), batch_size=8, max_length=T, low=True)
    assert of["DDP"].memory.step == replace(whole, gradients_stay=True)
    fsdp, hsdp = of["FSDP"].memory, of["HSDP, 4 shards"].memory
    assert (fsdp.step.weights, hsdp.step.weights) == (whole.weights // 8, whole.weights // 4)
    assert (fsdp.step.gradients, fsdp.step.optimizer) == (whole.gradients // 8, whole.optimizer // 8)
    assert fsdp.step.activations == whole.activations - L * 12 * D * D * 2  # without autocast's copies
    assert fsdp.gathered == 2 * (2 * ROOT + 2 * BLOCK + BLOCK) + 4 * BLOCK
    [alone] = parallel_plan(replace(one, sequences=8), Cluster(devices_per_node=1)).strategies
    assert (alone.memory.step, alone.memory.peak, alone.collectives) == (whole, whole.peak, ())
    assert alone.efficiency == 1


def test_what_does_not_fit_is_last_and_marked():
    """DDP's 16 bytes a parameter are more than these devices have; the largest batches that fit are taken."""
    plan = parallel_plan(work(), replace(EIGHT, memory_gb=0.003))
    fits = [each.fits for each in plan.strategies]
    assert fits == sorted(fits, reverse=True)
    assert (plan.strategies[-1].layout.name, fits[-1], plan.strategies[-1].recompute) == ("DDP", False, True)
    assert plan.best is not None
    assert plan.best.layout.name == "FSDP"
    assert all(each.memory.peak <= 0.8 * 0.003e9 for each in plan.strategies if each.fits)
    seconds = [each.step_seconds for each in plan.strategies if each.fits]
    assert seconds == sorted(seconds)
    lines = [line for lines in plan.topics().values() for line in lines]
    assert any(line.startswith("DDP") and "does not fit" in line for line in lines)
    assert any(line.startswith("use FSDP: trainer=fsdp") for line in lines)


def test_a_step_takes_between_its_computation_and_all_in_turn():
    for each in parallel_plan(work(), EIGHT).strategies:
        assert each.compute_seconds < each.step_seconds < each.serial_seconds
        assert 0 < each.efficiency < 1
        assert each.batch_size * each.accumulate * each.layout.batches == 64


def test_sequences_that_ranks_cannot_share_are_refused():
    with pytest.raises(InputError, match="12 sequences a step cannot be divided among 8 devices"):
        parallel_plan(work(sequences=12), EIGHT)
