"""Strategies for a run on many devices, on paper: memory, communication and time of an optimizer step.

Collectives are those of torch's DDP and FSDP2, as `gptpl.runs.trial` counts them; of tensor parallelism
those of Shoeybi et al. 2019, "Megatron-LM", without sequence parallelism.
"""

# B sequences in a batch, T time, D model, L blocks, N devices

import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch

from gptpl.config.compose import Config
from gptpl.errors import InputError
from gptpl.model import GPTBackbone, GPTClassifier, GPTConfig, GPTModel
from gptpl.model.gpt import MultiHeadAttention
from gptpl.model.parameters import TuneHead
from gptpl.runs.parts import (
    class_of,
    is_gpt,
    memory_settings,
    model_config,
    optimizer_factory,
    preparation,
    step_settings,
)
from gptpl.runs.trainer import UNKNOWN_VOCABULARY
from gptpl.settings import NOT_NEGATIVE, POSITIVE, SIZE, check_limits
from gptpl.text import bytes_text, table
from gptpl.training.costs import (
    PEAKS,
    RECOMPUTED_BLOCKS,
    USABLE,
    Prepare,
    StepMemory,
    counted_flops_per_token,
    step_memory,
)
from gptpl.training.optimizers import hidden_matrices, muon
from gptpl.training.performance import AUTO, FastPath, product_dtype
from gptpl.training.processes import find_launcher
from gptpl.training.sharding import SHARDED

if TYPE_CHECKING:
    from gptpl.runs.build import Settled

Operation = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]
Phase = Literal["forward", "backward", "last backward", "exposed"]
"""The computation behind which a collective runs; "last backward" is that of a step's last batch."""

REACHED_FRACTION = 0.4
"""Of the published peak, where `Cluster.tflops` is None: about what the llm.c baseline reaches on an H100."""
BUCKET_BYTES = 25 * 2**20  # DDP's default
MOST_SEQUENCES = 64
"""The largest batch that is considered: more at a time makes no device faster."""

# --- what is planned for --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Equal devices in equal nodes, which need not be here. By default those of an H100 SXM machine.

    Attributes:
        memory_gb: of a device; a training step is planned for 80 % of it.
        tflops: arithmetic that a device reaches in training; None: 40 % of an H100's peak in bf16.
        gb_per_second_within, gb_per_second_between: what a device sends to others of its node, and to other
            nodes, in one direction (NVLink 4: 450; a 400 Gbit/s adapter for each device: 50).
        microseconds_per_hop: from one device to the next, however few the bytes (assumed).
    """

    nodes: Annotated[int, SIZE] = 1
    devices_per_node: Annotated[int, SIZE] = 8
    memory_gb: Annotated[float, POSITIVE] = 80.0
    tflops: Annotated[float | None, POSITIVE] = None
    gb_per_second_within: Annotated[float, POSITIVE] = 450.0
    gb_per_second_between: Annotated[float, POSITIVE] = 50.0
    microseconds_per_hop: Annotated[float, NOT_NEGATIVE] = 5.0

    def __post_init__(self) -> None:
        check_limits(Cluster, "plan.", **vars(self))

    @property
    def devices(self) -> int:
        """N."""
        return self.nodes * self.devices_per_node

    def reached_flops(self, precision: str) -> float:
        """FLOP/s of a device. Raises InputError for fp32, which `tflops` has no default for."""
        if self.tflops is not None:
            return self.tflops * 1e12
        if product_dtype(precision) == torch.float32:
            raise InputError(
                f"plan.tflops has no default for trainer.precision={precision}: give the TFLOP/s that a"
                " device reaches, or trainer.precision=bf16-mixed"
            )
        return REACHED_FRACTION * PEAKS["H100"]

    def prepared(self, cfg: Config) -> Config:
        """A copy of a run's config that can be settled here, with as many processes, and nothing measured."""
        cfg = cfg.copy()
        chosen = {"precision": "bf16-mixed", "attention": "sdpa", "head": "fused", "compile": "off"}
        for name, choice in chosen.items():
            if cfg.trainer[name] == AUTO:
                cfg.trainer[name] = choice
        cfg.trainer.accelerator, cfg.trainer.keep_freed_memory, cfg.trainer.compile = "cpu", False, "off"
        cfg.trainer.num_nodes, cfg.trainer.devices = self.nodes, self.devices_per_node
        cfg.trainer.sharded_checkpoints = False
        if cfg.trainer.strategy not in SHARDED:
            cfg.trainer.strategy = "ddp" if self.devices > 1 else "auto"
        if cfg.data.get("batch_size") == AUTO:  # every strategy has the largest that fits
            cfg.data.batch_size = 1
        return cfg


def cluster_of(cfg: Config) -> Cluster | None:
    """The cluster of the settings `plan`; None where the run is planned for the devices that are here.

    Nodes and devices that the settings leave out are those of the trainer, whose GPUs count as a cluster
    where there are more of them than here.
    """
    names = (field.name for field in fields(Cluster))
    given = {name: value for name in names if (value := cfg.plan[name]) is not None}
    trainer, count = cfg.trainer, cfg.trainer.devices
    if isinstance(count, str) and count.isdecimal():
        count = int(count)
    is_number = isinstance(count, int) and count > 0
    gpus_here = torch.cuda.device_count() or int(torch.backends.mps.is_available())
    on_gpus = trainer.accelerator in ("gpu", "cuda") or (trainer.accelerator == "auto" and gpus_here > 0)
    too_many = on_gpus and is_number and count > max(1, gpus_here)
    several_nodes = trainer.num_nodes > 1 and trainer.accelerator in ("auto", "gpu", "cuda")
    if not (given or too_many or several_nodes):
        return None
    if "devices_per_node" not in given and not is_number:
        raise InputError(
            f"trainer.devices={trainer.devices} is no number: give plan.devices_per_node, the GPUs of a node"
        )
    return Cluster(**{"nodes": trainer.num_nodes, "devices_per_node": count} | given)


@dataclass(frozen=True)
class Unit:
    """Parameters that FSDP gathers together, by their shapes: those of a block, or all others."""

    shapes: tuple[torch.Size, ...]
    trained: tuple[torch.Size, ...]


ORTHOGONAL_STEPS = 5  # of torch.optim.Muon, by default


@dataclass(frozen=True)
class Matrices:
    """A parameter of Muon, and how many matrices are stacked in it."""

    shape: torch.Size
    stacked: int

    @property
    def flops(self) -> int:
        """FLOP to orthogonalise them: three products a step, of which one is of the smaller side alone."""
        small, large = sorted((self.shape[0] // self.stacked, self.shape[1]))
        return self.stacked * ORTHOGONAL_STEPS * (4 * small * small * large + 2 * small**3)


def padded(shapes: Sequence[torch.Size], ways: int) -> int:
    """Numbers in parameters whose rows are spread over so many devices, each with equally many of them."""
    return sum(-(-shape[0] // ways) * ways * math.prod(shape[1:]) for shape in shapes)


@dataclass(frozen=True, kw_only=True)
class Work:
    """An optimizer step that devices divide among them.

    `units` are the others, then each block. `memory` is that of a step on one device, of a number of
    sequences at a time, with or without recomputed activations. `matrices` are those that Muon
    orthogonalises, in the order in which sharding devices take turns.
    """

    config: GPTConfig
    units: tuple[Unit, ...]
    sequences: int
    max_length: int
    precision: str
    weight_bytes: int
    flops_per_token: int
    memory: Callable[[int, bool], StepMemory]
    recompute: bool = False  # always
    matrices: tuple[Matrices, ...] = ()
    root_twice: bool = False
    """Whether FSDP gathers the root again for the backward pass: where `forward` calls `hidden`, and it wraps
    both (torch 2.13)."""

    @property
    def product_bytes(self) -> int:
        """Of a number in a matrix product, and in weights that FSDP gathers."""
        return product_dtype(self.precision).itemsize


def work_of(
    config: GPTConfig,
    path: FastPath,
    *,
    sequences: int,
    max_length: int,
    prepare: Prepare = lambda net: net,
    weight_bytes: int = 4,
    with_muon: bool = False,
    **memory: Any,
) -> Work:
    """The work of a step of so many sequences; `memory` are further arguments of `step_memory`."""
    with torch.device("meta"):
        net = prepare(GPTModel(config))
    units: dict[str, dict[torch.nn.Parameter, None]] = {"": {}}
    for name, parameter in net.named_parameters():
        block = name.split(".")[1] if name.startswith("blocks.") else ""
        units.setdefault(block, {})[parameter] = None

    hidden = hidden_matrices(net) if with_muon else {}
    matrices = [Matrices(parameter.shape, stacked) for parameter, stacked in hidden.items()]

    def in_flash_attention(net: GPTModel) -> GPTBackbone:
        prepared = prepare(net)
        for module in prepared.modules():
            if isinstance(module, MultiHeadAttention):
                module.drop_rate = 0.0  # on a CPU, dropped attention weights are kept
        return prepared

    @cache
    def on_one_device(batch_size: int, recompute: bool) -> StepMemory:
        return step_memory(
            config, replace(path, recompute=recompute), batch_size=batch_size, max_length=max_length,
            prepare=in_flash_attention, weight_bytes=weight_bytes, **memory,
        )  # fmt: skip

    return Work(
        config=config,
        units=tuple(
            Unit(tuple(p.shape for p in unit), tuple(p.shape for p in unit if p.requires_grad))
            for unit in units.values()
        ),
        sequences=sequences,
        max_length=max_length,
        precision=path.precision.precision,
        weight_bytes=weight_bytes,
        flops_per_token=counted_flops_per_token(config, max_length, prepare),
        memory=on_one_device,
        recompute=path.recompute,
        matrices=tuple(
            sorted(matrices, key=lambda each: each.shape.numel(), reverse=True)  # see `each_whole`
        ),
        root_twice=path.head == "plain" or isinstance(net, GPTClassifier),
    )


def work_of_run(settled: "Settled") -> Work:
    """The work of a run's step on all its devices."""
    cfg, data, path = settled.cfg, settled.datamodule, settled.fast_path
    sequences = data.batch_size * cfg.trainer.accumulate_grad_batches * settled.trainer.world_size
    return work_of(
        settled.config,
        path,
        sequences=sequences,
        with_muon=class_of(cfg, "optimizer") is muon,
        **memory_settings(cfg, data, path.precision.precision),
    )


# --- what is sent ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Collective:
    """Equal calls in an optimizer step, each over a group of devices.

    `bytes` are those of the whole tensors of all calls together, of an all-to-all those that the first device
    divides among all, as which none has more. `per_node` are the group's devices on one node.
    """

    operation: Operation
    of: str
    phase: Phase
    ranks: int
    per_node: int
    calls: int
    bytes: int

    @property
    def sent(self) -> float:
        """Bytes that a device sends around a ring: (n - 1) / n of the tensor, to sum and distribute twice."""
        return (2 if self.operation == "all_reduce" else 1) * (self.ranks - 1) / self.ranks * self.bytes

    @property
    def sent_between(self) -> float:
        """Bytes of a device to other nodes: the devices of a node share its links to the next.

        In an all-to-all a device sends to each of the others itself.
        """
        if self.operation == "all_to_all":
            return (self.ranks - self.per_node) / self.ranks * self.bytes
        return self.sent / self.per_node if self.ranks > self.per_node else 0.0

    @property
    def sent_within(self) -> float:
        """Bytes of a device to others of its node."""
        return self.sent - self.sent_between

    def seconds(self, cluster: Cluster) -> float:
        """The slower of the two links, and the hops of each call: a ring's, or a tree's in an all-reduce."""
        hops = self.ranks - 1
        if self.operation == "all_reduce":
            hops = 2 * min(hops, math.ceil(math.log2(self.ranks)))
        within = self.sent / cluster.gb_per_second_within if self.per_node > 1 else 0.0
        between = self.sent_between / cluster.gb_per_second_between
        return max(within, between) / 1e9 + self.calls * hops * cluster.microseconds_per_hop / 1e6


# --- strategies -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a strategy divides N devices: `tensor` of them share each matrix product, `shards` each weight.

    `shards` counts the ranks of FSDP; where they are fewer than the N / `tensor` that have batches of their
    own, groups of them hold the same shards.
    """

    name: str
    trainer: str | None  # what to type; None: not built yet
    devices: int
    shards: int = 1
    tensor: int = 1

    @property
    def batches(self) -> int:
        """Ranks that have batches of their own."""
        return self.devices // self.tensor


def layouts(cluster: Cluster, config: GPTConfig) -> list[Layout]:
    """All that are possible: tensor parallelism within a node, by divisors of its devices and the heads."""
    N, per_node = cluster.devices, cluster.devices_per_node
    if N == 1:
        return [Layout(name="one device", trainer="trainer=gpu", devices=1)]
    found = [
        Layout(name="DDP", trainer="trainer=ddp", devices=N),
        Layout(name="FSDP", trainer="trainer=fsdp", devices=N, shards=N),
    ]
    if cluster.nodes > 1 and per_node > 1:
        name, trainer = f"HSDP, {per_node} shards", "trainer=fsdp trainer.strategy=hsdp"
        found.append(Layout(name=name, trainer=trainer, devices=N, shards=per_node))
    for ways in range(2, per_node + 1):
        if per_node % ways == config.n_heads % ways == 0:
            name = f"TP {ways} x FSDP {N // ways}" if ways < N else f"TP {ways}"
            found.append(Layout(name=name, trainer=None, devices=N, shards=N // ways, tensor=ways))
    return found


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of a step on the device that has most, by part; see `StepMemory`."""

    step: StepMemory
    gathered: int
    """Weights of the root and of two blocks, and gradients before they are summed and divided."""
    orthogonal: int = 0
    """A matrix that Muon orthogonalises, and rows of others, when what is gathered has been freed."""

    @property
    def peak(self) -> int:
        """The most at any time."""
        of = self.step
        return max(of.peak + self.gathered, of.weights + of.gradients + of.optimizer + self.orthogonal)


def memory_of(work: Work, layout: Layout, *, batch_size: int, accumulate: int, recompute: bool) -> Memory:
    """Memory of a step that is divided so, from that of one device."""
    one, stays = work.memory(batch_size, recompute), accumulate > 1
    if layout.shards == layout.tensor == 1:  # DDP's buckets are the gradients
        return Memory(step=replace(one, gradients_stay=stays or layout.devices > 1), gathered=0)
    ways, tensor, p = layout.shards, layout.tensor, work.product_bytes
    config, (root, *blocks) = work.config, work.units

    def shard(of_unit: Callable[[Unit], tuple[torch.Size, ...]]) -> int:
        return sum(padded(of_unit(unit), ways) for unit in work.units) * work.weight_bytes // (ways * tensor)

    weights, gradients = shard(lambda unit: unit.shapes), shard(lambda unit: unit.trained)
    activations, head, gathered = one.activations, one.head, 0
    kept_blocks = RECOMPUTED_BLOCKS if recompute else config.n_layers
    if ways > 1:
        if p < work.weight_bytes:  # autocast keeps copies of the matrices; gathered ones are freed
            matrices = padded([shape for shape in blocks[0].shapes if len(shape) > 1], 1)
            activations = max(0, activations - kept_blocks * matrices * p)
        block = max(padded(unit.shapes, 1) for unit in blocks)
        summed = max(padded(unit.trained, 1) for unit in blocks)
        gathered = p * (padded(root.shapes, 1) + padded(root.trained, 1) + 2 * block + summed) + 4 * summed
    if tensor > 1:
        # Every device has the residual stream, the inputs of both products, and dropout's masks.
        rows, D = batch_size * work.max_length, config.emb_dim
        whole = kept_blocks * 2 * rows * D * (4 + p + (config.drop_rate > 0))
        whole = min(activations, whole + recompute * config.n_layers * rows * D * work.weight_bytes)
        activations = whole + (activations - whole) // tensor
        head, gathered = head // tensor, gathered // tensor
    return Memory(
        step=StepMemory(
            weights=weights,
            gradients=gradients,
            optimizer=round(one.optimizer * gradients / max(1, one.gradients)),
            activations=activations,
            head=head,
            gradients_stay=stays,
        ),
        gathered=gathered,
        orthogonal=_orthogonal_bytes(work),
    )


def _orthogonal_bytes(work: Work) -> int:
    """Rows of a turn, twice, and the largest parameter, its step, and one of its matrices thrice in bf16."""
    if not work.matrices:
        return 0
    largest = work.matrices[0]
    return largest.shape.numel() * (4 * work.weight_bytes + 3 * 2 // largest.stacked)


def collectives(
    work: Work, layout: Layout, cluster: Cluster, *, batch_size: int, accumulate: int, recompute: bool = False
) -> list[Collective]:
    """What the devices send to one another in an optimizer step, without sums of a few numbers."""
    per_node, ways, tensor = cluster.devices_per_node, layout.shards, layout.tensor
    root, blocks = work.units[:1], work.units[1:]
    p = work.product_bytes
    summed_bytes = 4 if p < 4 else work.weight_bytes  # see `gptpl.training.sharding.shard`
    found: list[Collective] = []
    first = next((number for number, block in enumerate(blocks) if block.trained), len(blocks))
    phases: tuple[tuple[tuple[Unit, ...], Phase, Phase], ...]
    phases = ((blocks, "forward", "backward"), (root, "exposed", "exposed"))

    def add(
        operation: Operation, of: str, phase: Phase, *, ranks: int, on_node: int, calls: int, size: int
    ) -> None:
        if ranks > 1 and size:
            found.append(
                Collective(
                    operation=operation, of=of, phase=phase, ranks=ranks, per_node=min(on_node, ranks),
                    calls=calls, bytes=size,
                )
            )  # fmt: skip

    for units, before, after in phases:
        if ways == 1:
            phase: Phase = "last backward" if units is blocks else "exposed"
            size = sum(padded(unit.trained, 1) for unit in units) * work.weight_bytes
            buckets = -(-size // BUCKET_BYTES)
            ranks = layout.batches
            add("all_reduce", "gradients", phase, ranks=ranks, on_node=per_node, calls=buckets, size=size)
            continue
        of_group = {"ranks": ways, "on_node": min(ways, per_node // tensor)}
        calls = accumulate * len(units)
        size = accumulate * p * sum(padded(unit.shapes, ways) for unit in units) // tensor
        add("all_gather", "weights", before, calls=calls, size=size, **of_group)
        # The next unit is gathered in advance, also where the backward pass ends before it.
        again = units[max(0, first - 1) :] if units is blocks else units * work.root_twice
        size = accumulate * p * sum(padded(unit.shapes, ways) for unit in again) // tensor
        add("all_gather", "weights", after, calls=accumulate * len(again), size=size, **of_group)
        calls = accumulate * sum(1 for unit in units if unit.trained)
        size = accumulate * summed_bytes * sum(padded(unit.trained, ways) for unit in units) // tensor
        add("reduce_scatter", "gradients", after, calls=calls, size=size, **of_group)
        groups = {"ranks": layout.batches // ways, "on_node": 1}
        add("all_reduce", "shards of gradients", after, calls=calls, size=size // ways, **groups)
    if (sharing := ways * tensor) > 1 and work.matrices:
        turns, shapes = -(-len(work.matrices) // sharing), [each.shape for each in work.matrices]
        size = work.weight_bytes * (padded(shapes, sharing) // sharing + padded(shapes[::sharing], 1))
        of_sharing = {"ranks": sharing, "on_node": min(sharing, per_node)}
        add("all_to_all", "updates of Muon", "exposed", calls=2 * turns, size=size, **of_sharing)
    if tensor > 1:
        of_one = work.config.emb_dim * batch_size * work.max_length * p
        calls = accumulate * (4 * len(blocks) + 2 + recompute * 2 * len(blocks))
        of_node = {"ranks": tensor, "on_node": tensor}
        add("all_reduce", "activations", "exposed", calls=calls, size=calls * of_one, **of_node)
    return found


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """An optimizer step by one strategy."""

    layout: Layout
    batch_size: int  # sequences of a rank at a time
    accumulate: int
    recompute: bool
    memory: Memory
    fits: bool
    collectives: tuple[Collective, ...]
    unfit: str | None  # why gptpl cannot train so
    compute_seconds: float
    communication_seconds: float
    step_seconds: float
    """With communication behind the computation that does not wait for it."""
    efficiency: float
    """Of N times the speed of a device that neither waits nor recomputes."""

    @property
    def serial_seconds(self) -> float:
        """Of a step that computes and communicates in turn."""
        return self.compute_seconds + self.communication_seconds

    @property
    def overrides(self) -> str:
        """What to type for it, without the number of devices."""
        again = " trainer.recompute_activations=true" if self.recompute else ""
        batches = f"data.batch_size={self.batch_size} trainer.accumulate_grad_batches={self.accumulate}"
        return f"{self.layout.trainer} {batches}{again}"


def strategy(work: Work, layout: Layout, cluster: Cluster) -> Strategy:
    """The step with the largest batch that fits, and recomputed activations only where nothing fits without.

    Raises InputError where the ranks cannot have equally many sequences.
    """
    if work.sequences % layout.batches:
        raise InputError(
            f"{work.sequences} sequences a step cannot be divided among {layout.batches} devices: change"
            " data.batch_size or data.global_batch_size"
        )
    of_rank, usable = work.sequences // layout.batches, USABLE * cluster.memory_gb * 1e9
    sizes = [size for size in range(min(of_rank, MOST_SEQUENCES), 0, -1) if of_rank % size == 0]
    for recompute, size in itertools.product((True,) if work.recompute else (False, True), sizes):
        accumulate = of_rank // size
        how: dict[str, Any] = {"batch_size": size, "accumulate": accumulate, "recompute": recompute}
        memory = memory_of(work, layout, **how)
        if fits := memory.peak <= usable:
            break
    tokens, flops = work.sequences * work.max_length, cluster.reached_flops(work.precision)
    ideal = tokens * work.flops_per_token / (layout.devices * flops)
    sharing = layout.shards * layout.tensor
    of_each = [sum(each.flops for each in work.matrices[rank::sharing]) for rank in range(sharing)]
    orthogonal = max(of_each) / flops  # without sharding every device does all
    of_head = 6 * work.config.vocab_size * work.config.emb_dim / work.flops_per_token
    forward, backward = ideal / 3, ideal * 2 / 3
    if recompute:
        backward += forward * max(0.0, 1 - of_head)
    sent = collectives(work, layout, cluster, **how)
    hidden_by = {"forward": forward, "backward": backward, "last backward": backward / accumulate}
    seconds = {phase: sum(c.seconds(cluster) for c in sent if c.phase == phase) for phase in hidden_by}
    communication = sum(c.seconds(cluster) for c in sent)
    hidden = sum(min(seconds[phase], time) for phase, time in hidden_by.items())
    step = forward + backward + orthogonal + communication - hidden
    ideal += sum(of_each) / (layout.devices * flops)
    return Strategy(
        layout=layout,
        **how,
        memory=memory,
        fits=fits,
        collectives=tuple(sent),
        unfit=None if layout.trainer else "not built yet",
        compute_seconds=forward + backward + orthogonal,
        communication_seconds=communication,
        step_seconds=step,
        efficiency=ideal / step,
    )


# --- in lines -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ParallelPlan:
    """The strategies for a cluster, best first."""

    cluster: Cluster
    work: Work
    strategies: tuple[Strategy, ...]

    @property
    def best(self) -> Strategy | None:
        """The fastest of those that fit and that gptpl has."""
        return next((each for each in self.strategies if each.fits and not each.unfit), None)

    def record(self) -> dict[str, Any]:
        """The plan as plain data; `peak`, `sent_within` and `sent_between` are bytes of a device and step."""
        rows = []
        for each in self.strategies:
            row = asdict(each)
            row["memory"]["peak"] = each.memory.peak
            for record, collective in zip(row["collectives"], each.collectives, strict=True):
                record["sent_within"] = collective.sent_within
                record["sent_between"] = collective.sent_between
                record["seconds"] = collective.seconds(self.cluster)
            rows.append(row)
        reached = self.cluster.reached_flops(self.work.precision) / 1e12
        return {"cluster": asdict(self.cluster) | {"tflops": reached}, "strategies": rows}

    def topics(self) -> dict[str, list[str]]:
        """The plan for a person: lines by topic."""
        return {
            "devices": self._cluster_lines(),
            "memory": self._memory_lines(),
            "sent": self._sent_lines(),
            "step": [*self._step_lines(), *self.advice()],
        }

    def _cluster_lines(self) -> list[str]:
        of = self.cluster
        source = "" if of.tflops else f" ({REACHED_FRACTION:.0%} of an H100's peak in bf16)"
        reached = of.reached_flops(self.work.precision) / 1e12
        lines = [
            f"{of.devices:,} = {of.nodes:,} nodes x {of.devices_per_node:,}, each of {of.memory_gb:g} GB,"
            f" {reached:,.0f} TFLOP/s reached{source} in {self.work.precision}",
            f"each sends {of.gb_per_second_within:g} GB/s within a node, {of.gb_per_second_between:g} GB/s to"
            f" others (H100 SXM: NVLink 450, 400 Gbit/s 50), {of.microseconds_per_hop:g} us a hop",
        ]
        if of.devices > 1 and not any(each.layout.tensor > 1 for each in self.strategies):
            heads = self.work.config.n_heads
            why = f"n_heads={heads} and {of.devices_per_node} devices of a node have no common divisor"
            lines.append(f"no tensor parallelism: {why}")
        return lines

    def _memory_lines(self) -> list[str]:
        head = ("of a device", "at most", "weights", "gradients", "optimizer", "activations", "gathered")
        rows: list[tuple[str, ...]] = [(*head, "fits", "batch")]
        for each in self.strategies:
            of, again = each.memory.step, ", recomputed" if each.recompute else ""
            parts = (of.weights, of.gradients, of.optimizer, of.activations + of.head, each.memory.gathered)
            sizes = map(bytes_text, (each.memory.peak, *parts))
            batch = f"{each.batch_size} x {each.accumulate}{again}"
            rows.append((each.layout.name, *sizes, "yes" if each.fits else "NO", batch))
        usable = bytes_text(USABLE * self.cluster.memory_gb * 1e9)
        return [
            *table(rows, right=range(1, 7)),
            f"batch: sequences at a time x batches a step, so that a step takes at most {usable} (80 %);",
            "activations: with the logits, whose place gradients take later; gathered: by FSDP, for a while",
        ]

    def _sent_lines(self) -> list[str]:
        head = ("of a step", "collective", "of", "calls", "tensors", "within", "between", "seconds")
        rows: list[tuple[str, ...]] = [head]
        for each in self.strategies:
            merged: dict[tuple[str, str], list[Collective]] = {}
            for collective in each.collectives:
                merged.setdefault((collective.operation, collective.of), []).append(collective)
            name = each.layout.name
            for (operation, of), calls in merged.items():
                numbers = [sum(c.bytes for c in calls), sum(c.sent_within for c in calls)]
                sizes = map(bytes_text, (*numbers, sum(c.sent_between for c in calls)))
                count, seconds = sum(c.calls for c in calls), sum(c.seconds(self.cluster) for c in calls)
                rows.append((name, operation, of, f"{count:,}", *sizes, f"{seconds:.3g}"))
                name = ""
        return table(rows, right=range(3, 8)) if len(rows) > 1 else ["nothing"]

    def _step_lines(self) -> list[str]:
        rows: list[tuple[str, ...]] = [
            ("seconds", "computing", "sending", "in turn", "overlapped", "tokens/s", "of ideal", "")
        ]
        tokens = self.work.sequences * self.work.max_length
        for each in self.strategies:
            times = (each.compute_seconds, each.communication_seconds, each.serial_seconds, each.step_seconds)
            speed = f"{tokens / each.step_seconds:,.0f}"
            notes = ", ".join(filter(None, ("" if each.fits else "does not fit", each.unfit)))
            seconds = [f"{time:.3g}" for time in times]
            rows.append((each.layout.name, *seconds, speed, f"{each.efficiency:.0%}", notes))
        return table(rows, right=range(1, 7))

    def advice(self) -> list[str]:
        """Which strategy to use, and what to type for it."""
        best, first = self.best, self.strategies[0]
        if best is None:
            return ["no strategy that gptpl has fits: more devices, more memory, or a smaller model"]
        of = self.cluster
        where = f"trainer.num_nodes={of.nodes} trainer.devices={of.devices_per_node}"
        lines = [
            f"use {best.layout.name}: {best.overrides}",
            f"  {where} trainer.precision={self.work.precision}",
        ]
        if first is not best:
            gain = best.step_seconds / first.step_seconds - 1
            lines.append(f"{first.layout.name} would be {gain:.1%} faster: {first.unfit}")
        return lines


def parallel_plan(work: Work, cluster: Cluster) -> ParallelPlan:
    """All strategies, those that fit first, in the order of their steps' seconds.

    Raises InputError where the ranks of one cannot have equally many sequences.
    """
    found = [strategy(work, layout, cluster) for layout in layouts(cluster, work.config)]
    ordered = sorted(found, key=lambda each: (not each.fits, each.step_seconds))
    return ParallelPlan(cluster=cluster, work=work, strategies=tuple(ordered))


# --- for the devices that are here ----------------------------------------------------------------------


def process_count(cfg: Config) -> int:
    """The processes of a run, before it has a Trainer; 1 where they cannot be told."""
    if (launcher := find_launcher()) is not None:
        return launcher.world_size
    devices = cfg.trainer.devices
    if devices in ("auto", -1, "-1"):
        return torch.cuda.device_count()
    if isinstance(devices, str):
        return int(devices) if devices.isdecimal() else len([each for each in devices.split(",") if each])
    return devices if isinstance(devices, int) else len(devices)


def must_be_sharded(cfg: Config, path: FastPath, *, processes: int, device_bytes: int) -> str | None:
    """Why a run can only be trained by FSDP, in words: on no device a whole model has room, a part of it has.

    What is compared is all of a device's memory, with weights, gradients and optimizer state of DDP, which
    every batch needs, and with a step of FSDP. None: it can be trained by DDP, or by neither; or the choice
    is not gptpl's: of a model of the user's own class, and in a notebook, whose processes are forked.
    """
    if processes < 2 or not is_gpt(cfg) or hasattr(sys, "ps1"):
        return None
    tune_class = class_of(cfg, "tune")
    if not _is_own(tune_class) or (tune_class is TuneHead and cfg.trainer.head != "plain"):
        return None  # see `gptpl.runs.trainer.check_strategy`
    vocab_size = cfg.model.get("vocab_size") or cfg.tokenizer.get("vocab_size")
    config, precision = model_config(cfg, vocab_size or UNKNOWN_VOCABULARY), path.precision.precision
    size, optimizer = cfg.data.get("batch_size"), class_of(cfg, "optimizer")
    size = size if isinstance(size, int) and size > 0 else 1
    length = cfg.data.get("max_length") or config.context_length
    work = work_of(
        config,
        path,
        sequences=size * processes,
        with_muon=optimizer is muon,
        **step_settings(
            precision,
            optimizer_factory(cfg) if _is_own(optimizer) else None,
            config=config,
            prepare=preparation(cfg, None),
            max_length=min(length, config.context_length),
        ),
    )
    whole, part = (
        memory_of(
            work, Layout(name=name, trainer=None, devices=processes, shards=shards),
            batch_size=size, accumulate=cfg.trainer.accumulate_grad_batches, recompute=path.recompute,
        )
        for name, shards in (("DDP", 1), ("FSDP", processes))
    )  # fmt: skip
    needed = whole.step.weights + whole.step.gradients + whole.step.optimizer
    if needed <= device_bytes or part.peak > device_bytes:
        return None
    return (
        f"weights, gradients and optimizer state ({bytes_text(needed)}) do not fit into the memory of a"
        f" device ({bytes_text(device_bytes)}); divided among {processes} processes a step needs"
        f" {bytes_text(part.peak)} on each"
    )


def _is_own(kind: Any) -> bool:
    """Whether a class is gptpl's; one of the user's may not do without numbers."""
    return str(kind.__module__).partition(".")[0] == "gptpl"
