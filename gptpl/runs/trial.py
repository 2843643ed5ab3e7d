"""Training steps that leave nothing behind: their memory, a few real ones, and one on many devices.

That one is the step of the first of many processes that do not exist, without memory: what it would send.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]  # not in its __all__
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from gptpl.callbacks.stopping import RunStopped, interrupts
from gptpl.errors import InputError
from gptpl.model import GPTBackbone, GPTClassifier
from gptpl.model.loss import training_loss
from gptpl.runs.build import Settled
from gptpl.runs.parallel_plan import Cluster, Layout, Work, collectives
from gptpl.runs.parts import memory_settings
from gptpl.runs.trainer import build_trainer
from gptpl.text import bytes_text, count_text
from gptpl.training.costs import (
    USABLE,
    Prepare,
    StepMemory,
    free_memory,
    largest_batch_size,
    made_with,
    step_memory,
)
from gptpl.training.lightning_internals import CollectiveCounter, ShapesAlone, fake_processes, let_module_end
from gptpl.training.module import TrainingModule
from gptpl.training.performance import FastPath, device_type, product_dtype
from gptpl.training.sharding import shard


def step_memory_of(settled: Settled, batch_size: int | None = None) -> StepMemory:
    """Memory of a training step with the run's own batch, or with another one that is a whole step."""
    own = batch_size is None
    return step_memory(
        settled.config,
        settled.fast_path,
        batch_size=settled.datamodule.batch_size if batch_size is None else batch_size,
        accumulates=own and settled.cfg.trainer.accumulate_grad_batches > 1,
        **memory_settings(settled.cfg, settled.datamodule, settled.fast_path.precision.precision),
    )


def largest_batch_of(settled: Settled, most: int) -> int | None:
    """The largest power of two of up to `most` sequences that fits; 0 if none does; None: not known."""
    usable = usable_memory(settled)
    if usable is None:
        return None
    try:
        return largest_batch_size(
            settled.config,
            settled.fast_path,
            sequences=2 ** (most.bit_length() - 1),
            free=round(usable / USABLE),
            **memory_settings(settled.cfg, settled.datamodule, settled.fast_path.precision.precision),
        )
    except InputError:  # not even one sequence fits
        return 0


def check_fits(settled: Settled) -> None:
    """Raises InputError where the run's training step needs more memory than is free."""
    needed, usable = step_memory_of(settled).peak, usable_memory(settled)
    if usable is not None and needed > usable:
        raise InputError(
            f"data.batch_size={settled.datamodule.batch_size}: a step needs about {needed / 1e9:.1f} GB and"
            f" may take {usable / 1e9:.1f} GB of what is free: lower data.batch_size, or give"
            " trainer.recompute_activations=true"
        )


def usable_memory(settled: Settled) -> int | None:
    """Bytes of the device that a training step may take; None where the device does not tell."""
    kind = device_type(settled.cfg.trainer.accelerator)
    return None if kind == "mps" else int(USABLE * free_memory(kind))


def check_one_device(settled: Settled, command: str) -> None:
    """Raises InputError for a run of several processes."""
    if settled.trainer.world_size > 1:
        raise InputError(
            f"gptpl {command} measures one device, this run has {settled.trainer.world_size}:"
            " add trainer.devices=1 trainer.num_nodes=1"
        )


def train_a_little(
    settled: Settled,
    module: TrainingModule,
    *,
    steps: int,
    callbacks: Sequence[L.Callback],
    evaluates: bool = False,
) -> None:
    """Train the module for a few optimizer steps on one device, with the run's settings.

    No loggers, checkpoints or samples; if `evaluates`, with the evaluation before the first step. Raises
    KeyboardInterrupt for a signal, and what the callbacks raise.
    """
    cfg = settled.cfg.copy()
    cfg.trainer.max_time, cfg.trainer.stop_at_step = None, steps
    module.total_steps = max(module.total_steps, steps + 1)  # after the last one it would evaluate
    with tempfile.TemporaryDirectory(prefix="gptpl-trial-") as folder:
        trainer = build_trainer(
            cfg,
            precision=settled.fast_path.precision.precision,
            callbacks=callbacks,
            logger=False,
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_progress_bar=False,
            **({} if evaluates else {"limit_val_batches": 0}),
        )
        let_module_end(trainer)
        try:
            with interrupts():
                trainer.fit(module, datamodule=settled.datamodule)
        except RunStopped as stop:
            if stop.status:  # a signal
                raise KeyboardInterrupt from None


# --- on many devices that need not exist ----------------------------------------------------------------

ACCUMULATED = 2
"""Batches of the step, to see what is sent for each of them."""
Counts = Mapping[str, tuple[int, int]]
"""Calls and bytes of the whole tensors, by operation."""


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """Collectives of a step: as torch called them, and as they are computed."""

    strategy: str
    called: Counts
    computed: Counts
    agrees: bool
    """For DDP in bytes alone: all of its first step are in one bucket."""

    def rows(self) -> list[tuple[str, ...]]:
        """Cells for a table: strategy, operation, calls, bytes, and whether it all is as computed."""
        found = [
            (name, count_text(calls, "call"), bytes_text(size)) for name, (calls, size) in self.called.items()
        ]
        said = "as computed" if self.agrees else f"BUT COMPUTED: {dict(self.computed)}"
        return [(self.strategy, *found[0], said), *(("", *row, "") for row in found[1:])]


class _Loss(nn.Module):
    def __init__(self, net: GPTBackbone, path: FastPath) -> None:
        super().__init__()
        self.net: nn.Module = net
        self.path = path

    def forward(self, tokens: Tensor) -> Tensor:
        net = self.net
        if isinstance(net, GPTClassifier):
            return net(tokens, tokens.new_full((len(tokens),), tokens.shape[1])).float().sum()
        return training_loss(net, tokens, tokens, head=self.path.head)


def dry_run(
    work: Work,
    layout: Layout,
    cluster: Cluster,
    path: FastPath,
    *,
    make_optimizer: Callable[[nn.Module], Optimizer],
    prepare: Prepare = lambda net: net,
) -> DryRun:
    """One step of two batches of one sequence, by DDP, FSDP or HSDP, of a model without memory.

    Raises InputError in a process that belongs to a group.
    """
    from torch.distributed.device_mesh import init_device_mesh  # takes most of a second to import

    if torch.distributed.is_initialized():
        raise InputError("plan.dry_run=true needs a process that belongs to no process group")
    sharded = layout.shards > 1
    shape = (layout.devices // layout.shards, layout.shards)[layout.shards == layout.devices :]
    with fake_processes(layout.devices):
        # A mesh has numbers, those of its ranks.
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards")[-len(shape) :])
        with ShapesAlone():
            net = made_with(work.config, work.weight_bytes, prepare)
            path.apply(net)
            if sharded:
                shard(net, mesh, product_dtype(work.precision))
            counted = _counted(_Loss(net, path), make_optimizer(net), work, sharded=sharded)
    called = {name: (counted.calls[name], size) for name, size in counted.bytes.items()}
    computed: dict[str, tuple[int, int]] = {}
    for each in collectives(work, layout, cluster, batch_size=1, accumulate=ACCUMULATED):
        calls, size = computed.get(each.operation, (0, 0))
        computed[each.operation] = (calls + each.calls, size + each.bytes)
    sizes = [{name: size for name, (_, size) in counts.items()} for counts in (called, computed)]
    agrees = called == computed if sharded else sizes[0] == sizes[1]
    return DryRun(strategy=layout.name, called=called, computed=computed, agrees=agrees)


def _counted(model: nn.Module, optimizer: Optimizer, work: Work, *, sharded: bool) -> CollectiveCounter:
    if not sharded:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True, init_sync=False)
        model.register_comm_hook(None, _summed)  # DDP's own waits for a result, which the fake group has not
    tokens = torch.zeros(1, work.max_length, dtype=torch.int64)
    mixed, dtype = "mixed" in work.precision, product_dtype(work.precision)
    with CollectiveCounter() as counted:
        for batch in range(ACCUMULATED):
            is_last = batch == ACCUMULATED - 1
            ddp = model if isinstance(model, DistributedDataParallel) else None  # FSDP sums every batch
            with nullcontext() if ddp is None or is_last else ddp.no_sync():
                with torch.autocast("cpu", dtype if mixed else torch.bfloat16, enabled=mixed):
                    loss = model(tokens)
                loss.backward()
        optimizer.step()
    return counted


def _summed(_state: Any, bucket: GradBucket) -> Future[Tensor]:
    """DDP's all-reduce of a bucket."""
    torch.distributed.all_reduce(bucket.buffer())
    done: Future[Tensor] = Future()
    done.set_result(bucket.buffer())
    return done
