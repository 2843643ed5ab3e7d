"""The LightningModule that all tasks share: set up, then in the order of a training step.

A step, as Lightning calls the methods here:

1. `training_step`, once for each micro-batch: its loss, by the task's `batch_loss` (for a language model the
   cross-entropy of its logits, see `gptpl.training.language_model`); Lightning backpropagates.
2. `on_before_optimizer_step`: the gradient becomes the mean over the micro-batches and ranks.
3. `configure_gradient_clipping`: the norm is measured, checked and clipped. Then the optimizer steps.
4. `lr_scheduler_step`: the learning rate of the next step.
5. `on_train_batch_end`: the step is logged, and an evaluation scheduled where one is due.
6. `after_step` of gptpl's callbacks, when all of that is done (see `gptpl.callbacks.after_step`): saving,
   sampling, stopping.
7. Where it is due, an evaluation: `validation_step`, once for each batch of both splits.
"""

import copy
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from gptpl.checkpoints.format import HEADER_KEY, RANDOM, check_same_model, checkpoint_header, describe
from gptpl.checkpoints.resume_state import RESUME_KEY, Position
from gptpl.errors import InputError
from gptpl.model.loss import Head, wide_dtype
from gptpl.model.parameters import ALL
from gptpl.tokenizers import Tokenizer
from gptpl.training.lightning_internals import (
    count_logged_steps,
    evaluate_after_this_batch,
    unscales_in_step,
)
from gptpl.training.optimizers import adamw, factory_name
from gptpl.training.performance import product_dtype
from gptpl.training.schedules import apply_changes, as_configured, scheduler_of
from gptpl.training.sharding import FullyShardedStrategy, shard, whole
from gptpl.training.task import EVALUATED, Sums, Task

_WEIGHT_UNIT = 1024
"""Divides the weights of micro-batches: losses times thousands of targets could exceed half precision.

A power of 2 rounds nothing.
"""


class NonFiniteError(ArithmeticError):
    """A step with an infinite or undefined loss or gradient; the weights are still those before it.

    `step` counts from 1; `report` describes the batch and the model, line by line.
    """

    def __init__(self, step: int, report: list[str]) -> None:
        super().__init__(f"the loss or the gradient of step {step} is not finite")
        self.step = step
        self.report = report


@dataclass(frozen=True, kw_only=True)
class _MicroBatch:
    """A batch of the step in progress; `number` is its place in the epoch, from 1."""

    number: int
    inputs: Tensor
    loss: Tensor
    weight: Tensor | None
    tokens: int


class TrainingModule(Task, L.LightningModule):
    """Trains a model for any task, and evaluates it on a part of both splits.

    Logged at every optimizer step: `train/loss` (mean over the micro-batches and ranks of the step, with
    dropout), `train/grad_norm` (before clipping), `train/tokens_seen`, and the task's `step_metrics`. At
    every evaluation, in evaluation mode: the task's `evaluation_metrics` of both splits, `eval/train_loss`
    and `val/loss` among them. Losses are in nats.

    A subclass says by the methods of `Task` what a batch is, what it costs, and what is measured.

    Model and tokenizer are enough to train with a stock `lightning.Trainer`, whose own arguments then say how
    long and when to evaluate. To repeat an uninterrupted run bit for bit, a resumed one needs the callback
    `ExactResume` before all others, checkpoints of `LastCheckpoint` written by the Trainer's plugin
    `DurableCheckpointIO`, and `eval_every_n_steps`, to run an evaluation that was due where it stopped.

    Args:
        net: the model; it stays a plain torch module.
        tokenizer: kept in every checkpoint; it decodes the batch in the report of a non-finite step.
        make_optimizer: builds the optimizer of the model.
        lr_factor: the learning rate of an optimizer step as a multiple of the peak, given the number of steps
            finished before it; None: constant.
        make_scheduler: builds a scheduler such as torch's instead, see `scheduler_of`.
        total_steps: optimizer steps the run is planned for; after them it evaluates once more and ends. None:
            the Trainer ends it.
        run_config: all settings of the run, kept in every checkpoint.
        eval_every_n_steps: optimizer steps between evaluations. None: Lightning decides, by batches.
        lr_ceiling: the largest multiple of the peak learning rate that the schedule may give; None: any.
        skip_steps: optimizer steps, from 1, whose update is left out.
        data_sha256: of the data, kept in every checkpoint.
        global_batch: sequences that a checkpoint counts as one batch: `micro_batches` batches of every rank.
        micro_batches: more than 1 in a run that is resumed on fewer devices, which share the same batch.
        start: where the initial weights came from; see `gptpl.checkpoints.format.lineage_of`.
        tune: which weights are trained; see `gptpl.model.parameters`.
        model_config: for a `net` other than a `GPTModel`: its class, as `_target_`, and its keywords, as
            plain data. None: the name of the class alone.
        head: see `gptpl.model.loss.training_loss`.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        tokenizer: Tokenizer,
        make_optimizer: Callable[[nn.Module], Optimizer] = adamw,
        lr_factor: Callable[[int], float] | None = None,
        make_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        total_steps: int | None = None,
        run_config: Mapping[str, Any] | None = None,
        eval_every_n_steps: int | None = None,
        lr_ceiling: float | None = None,
        skip_steps: Sequence[int] = (),
        data_sha256: str = "",
        global_batch: int = 0,
        micro_batches: int = 1,
        start: Mapping[str, Any] = RANDOM,
        tune: Mapping[str, Any] = ALL,
        model_config: Mapping[str, Any] | None = None,
        head: Head = "plain",
    ) -> None:
        super().__init__()
        self.net = net
        self.tokenizer = tokenizer
        self.make_optimizer = make_optimizer
        self.lr_factor = lr_factor or _constant
        self.make_scheduler = make_scheduler
        self._total_steps = total_steps
        self.run_config: dict[str, Any] = dict(run_config or {})
        self.eval_every_n_steps = eval_every_n_steps
        self.lr_ceiling = lr_ceiling
        self.skip_steps = frozenset(skip_steps)
        self.data_sha256 = data_sha256
        self.global_batch = global_batch
        self.micro_batches = micro_batches
        self.start = start
        self.tune = tune
        self.head = head
        self.compiled = False  # whether gptpl has compiled the blocks of `net`
        self.model_state = describe(net, model_config)
        self.position = Position(step=0, epoch=0, batch=0, tokens_seen=0)
        self.updating = False  # the weights may be half updated: an error now must not save them
        self.tokens_seen = 0
        self.tokens_per_second: float | None = None  # set by the callback `Throughput`
        self.grad_norm: Tensor | None = None  # before clipping; None until the step's gradient is complete
        self.evaluation_seconds = 0.0
        self._as_configured: dict[str, Any] = {}
        self._resumed_configuration: dict[str, Any] | None = None
        self._scheduler_before_evaluation: dict[str, Any] | None = None
        self._micro_batches: list[_MicroBatch] = []
        self._step_loss: Tensor | None = None
        self._sums: dict[str, Sums] = {}
        self._evaluation_started = 0.0

    # --- setting up -----------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Shard the model over the processes with `trainer.strategy=fsdp` or `hsdp`."""
        if isinstance(self.trainer.strategy, FullyShardedStrategy):
            shard(self.net, self.trainer.strategy.mesh(), product_dtype(str(self.trainer.precision)))

    @property
    def total_steps(self) -> int:
        """Optimizer steps that the run, or without a plan its Trainer, will make."""
        if self._total_steps is not None:
            return self._total_steps
        return planned_steps(self.trainer, self.trainer.num_training_batches)

    @total_steps.setter
    def total_steps(self, steps: int | None) -> None:
        self._total_steps = steps

    def capped_lr_factor(self, step: int) -> float:
        """The learning rate after `step` finished steps, as a multiple of the peak."""
        factor = self.lr_factor(step)
        return factor if self.lr_ceiling is None else min(factor, self.lr_ceiling)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimizer, and a schedule that is stepped with it."""
        optimizer = self.make_optimizer(self.net)
        if self.make_scheduler is None:
            scheduler: LRScheduler = LambdaLR(optimizer, self.capped_lr_factor)
        else:
            scheduler = scheduler_of(self.make_scheduler, optimizer, total_steps=self._total_steps)
        self._as_configured = as_configured(optimizer, scheduler)
        config = {"scheduler": scheduler, "interval": "step", "name": "lr", "reduce_on_plateau": False}
        return {"optimizer": optimizer, "lr_scheduler": config}  # type: ignore[typeddict-item]

    def uncompiled(self) -> AbstractContextManager[Any]:
        """A context in which the blocks that gptpl has compiled for training run eagerly.

        Evaluations have batches of other sizes: their compilation takes longer than it saves in most runs,
        and the training step would then be compiled for any size.
        """
        return torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()

    def on_fit_start(self) -> None:
        """Give each rank a random seed of its own, now that their weights are equal, for its dropout masks.

        A resumed run goes back to the random states in its checkpoint later, when training starts.
        """
        if rank := self.trainer.global_rank:
            torch.manual_seed(int(torch.randint(2**62, ())) + rank)

    def on_train_start(self) -> None:
        """Begin with no step in progress, and with this run's settings in a restored optimizer."""
        self._micro_batches.clear()  # of a step that an error ended
        self._step_loss = self.grad_norm = None
        optimizer = cast(Optimizer, self.optimizers(use_pl_optimizer=False))
        scheduler = cast(LRScheduler, self.lr_schedulers())
        if self.make_scheduler is None:
            groups = self._as_configured["groups"]
            for group, settings in zip(optimizer.param_groups, groups, strict=True):
                lr = settings["initial_lr"] * self.capped_lr_factor(self.trainer.global_step)
                group.update(settings | {"lr": lr})
            scheduler.base_lrs = [settings["initial_lr"] for settings in groups]
        elif self._resumed_configuration is not None:
            if isinstance(scheduler, ReduceLROnPlateau):
                # A checkpoint saved within the following step has the learning rate after the evaluation.
                for group, lr in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
                    group["lr"] = lr
            apply_changes(optimizer, scheduler, before=self._resumed_configuration, now=self._as_configured)
        self._schedule_evaluation(due=self.evaluates_after(self.trainer.global_step))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Correct Lightning's count of logged steps, see `count_logged_steps`."""
        count_logged_steps(self.trainer)

    # --- batch -> loss --------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Mean loss of one micro-batch; times its `loss_weight`, unless it is the whole step."""
        loss = self.batch_loss(batch)
        alone = self.trainer.world_size == self.trainer.accumulate_grad_batches == 1
        weight = None if alone else self.loss_weight(batch)
        self._micro_batches.append(
            _MicroBatch(
                number=batch_idx + 1,
                inputs=self.inputs_of(batch),
                loss=loss.detach(),
                weight=weight,
                tokens=self.tokens_in(batch),
            )
        )
        return loss if weight is None else loss * (weight / _WEIGHT_UNIT)

    # --- the gradient of the step ---------------------------------------------------------------------

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Make the gradient the mean over the step: weighted by `loss_weight`, or over its micro-batches.

        The last step of an epoch may have fewer micro-batches. The loss and the tokens of the step are added
        up over the ranks together with the weights, in one reduction.
        """
        losses = torch.stack([micro.loss for micro in self._micro_batches])
        weights = [micro.weight for micro in self._micro_batches if micro.weight is not None]
        counts = torch.stack(weights) if weights else torch.ones_like(losses)
        tokens = sum(micro.tokens for micro in self._micro_batches)
        totals = [counts.sum(), (losses * counts).sum()]
        if self.padded:  # else every rank has as many, and there is no need to wait for the device
            totals.append(torch.tensor(tokens, device=self.device))
        sums = torch.stack([total.to(wide_dtype(self.device)) for total in totals])
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(sums)  # Lightning's own reductions have a barrier each
        self._step_loss = (sums[1] / sums[0]).to(losses)
        self.tokens_seen += int(sums[2]) if self.padded else tokens * self.trainer.world_size
        # Lightning has divided by accumulate_grad_batches, the strategy by the number of ranks.
        scale = self.trainer.accumulate_grad_batches / len(self._micro_batches)
        if weights:
            divided_by = self.trainer.accumulate_grad_batches * self.trainer.world_size
            scale = divided_by * _WEIGHT_UNIT / sums[0].item()
        if scale != 1:
            for parameter in self.net.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(scale)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Measure the gradient's norm, check it, and clip it where `trainer.gradient_clip_val` is set.

        Lightning refuses to clip for fused optimizers under mixed precision, although bf16 has no loss scale
        to undo, and fp16's can be undone first. Raises NonFiniteError before the weights are touched; with a
        loss scale only if the loss is not finite, as the scaler skips a step whose gradient alone is not.
        """
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and unscales_in_step(optimizer):
            scaler.unscale_(optimizer)
        parameters = [p for p in self.net.parameters() if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        self.grad_norm = norm
        if self.trainer.global_step + 1 in self.skip_steps:
            for parameter in parameters:
                parameter.grad = None  # every optimizer passes over such parameters
            return
        loss = cast(Tensor, self._step_loss)
        if not torch.isfinite(norm + loss) and (scaler is None or not torch.isfinite(loss)):
            raise self._not_finite(norm)
        if gradient_clip_val and gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        elif gradient_clip_val:
            torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)
        self.updating = True

    def _not_finite(self, grad_norm: Tensor) -> NonFiniteError:
        """Report the step: norm and loss are those of all ranks, the batches those of this one."""
        step = self.trainer.global_step + 1
        where = f"step {step}: epoch {self.trainer.current_epoch}, batch {self._micro_batches[0].number} on"
        report = [f"{where}; gradient norm {grad_norm.item():g}", ""]
        report.append("parameter: norm of its values, norm of its gradient")
        for name, parameter in self.net.named_parameters():
            gradient = "none" if parameter.grad is None else f"{_norm(parameter.grad):.4g}"
            report.append(f"  {name}: {_norm(parameter):.4g}, {gradient}")
        for micro in self._micro_batches:
            report += ["", f"batch {micro.number} of the epoch: loss {micro.loss.item():g}"]
            report += [f"  {self.tokenizer.decode(row)!r}" for row in micro.inputs.tolist()]
        return NonFiniteError(step, report)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step the scheduler after the optimizer; ReduceLROnPlateau steps after an evaluation instead."""
        if isinstance(scheduler, ReduceLROnPlateau):
            return
        try:
            scheduler.step()
        except ValueError as error:  # OneCycleLR beyond its last step
            raise InputError(f"scheduler: {type(scheduler).__name__} has no step left: {error}") from error

    # --- after the step -------------------------------------------------------------------------------

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the optimizer step that this batch completed, if any; end the run after the last."""
        if self._step_loss is None or self.grad_norm is None:  # a micro-batch before the step's last
            self._schedule_evaluation(due=False)
            return
        self.updating = False
        self._scheduler_before_evaluation = None
        step = self.trainer.global_step
        self.position = Position(
            step=step,
            epoch=self.trainer.current_epoch,
            batch=(batch_idx + 1) // self.micro_batches,
            tokens_seen=self.tokens_seen,
        )
        loss, grad_norm = self._step_loss, self.grad_norm
        if step in self.skip_steps:  # nan: no update. Without a value, Lightning would log the step before's
            loss, grad_norm = torch.full_like(loss, math.nan), torch.full_like(grad_norm, math.nan)
        self.log("step", float(step))  # the loggers' step axis, which Lightning would count from 0
        self.log_dict({"train/loss": loss, **self.step_metrics(loss)})
        self.log_dict({"train/tokens_seen": float(self.tokens_seen), "train/grad_norm": grad_norm})
        self._micro_batches.clear()
        self._step_loss = self.grad_norm = None
        # Lightning would keep the gradients through the next forward pass, where memory is short.
        self.zero_grad()
        self._schedule_evaluation(due=self.evaluates_after(step))
        if self._is_over(step):
            self.trainer.should_stop = True  # Lightning then runs the evaluation scheduled above, and ends

    def evaluates_after(self, step: int) -> bool:
        """Whether an evaluation follows this optimizer step."""
        due = self.eval_every_n_steps is not None and step % self.eval_every_n_steps == 0
        return step > 0 and (due or self._is_over(step))

    def _is_over(self, step: int) -> bool:
        """Whether the run ends after this step; False where the Trainer ends it."""
        return self._total_steps is not None and step >= self._total_steps

    def _schedule_evaluation(self, *, due: bool) -> None:
        if self.eval_every_n_steps is not None:
            evaluate_after_this_batch(self.trainer, due)

    # --- evaluation -----------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Start new sums, and keep the scheduler's state for a checkpoint of the step before."""
        self._sums, self._evaluation_started = {}, time.perf_counter()
        if (scheduler := self._plateau_scheduler()) is not None:
            self._scheduler_before_evaluation = copy.deepcopy(scheduler.state_dict())

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add one batch to the sums of its split."""
        loaders = len(self.trainer.num_val_batches)
        splits = getattr(self.trainer.datamodule, "evaluated", EVALUATED)  # type: ignore[attr-defined]
        split = splits[dataloader_idx - loaders]  # from the end: a single loader has the validation examples
        before = self._sums.get(split)
        with self.uncompiled():
            found = self.evaluation_sums(batch)
        self._sums[split] = found if before is None else {name: before[name] + found[name] for name in found}

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of all batches of all ranks; also of the evaluation before the first step."""
        reduce = self.trainer.strategy.reduce
        sums = {
            split: {name: reduce(total, reduce_op="sum") for name, total in of_split.items()}
            for split, of_split in self._sums.items()
        }
        if parts := [sums[split] for split in sums if split.startswith("val/")]:
            sums["val"] = {name: cast(Tensor, sum(part[name] for part in parts)) for name in parts[0]}
        metrics = self.evaluation_metrics(sums)
        self.log_dict(metrics, sync_dist=True)  # equal on every rank already; Lightning warns without it
        if (scheduler := self._plateau_scheduler()) is not None and "val/loss" in metrics:
            scheduler.step(metrics["val/loss"])
        if not self.trainer.sanity_checking:
            self.log("step", float(self.trainer.global_step), sync_dist=True)
        elif math.isinf(self.trainer.num_sanity_val_steps):  # a whole evaluation
            for logger in self.loggers:
                logger.log_metrics(metrics, step=0)

    def on_validation_end(self) -> None:
        """End a resumed run of which only the evaluation after its last step was left."""
        self.evaluation_seconds += time.perf_counter() - self._evaluation_started
        if not self.trainer.sanity_checking and self._is_over(self.trainer.global_step):
            self.trainer.should_stop = True

    def _plateau_scheduler(self) -> ReduceLROnPlateau | None:
        """The scheduler that steps after this evaluation, if any."""
        if self.trainer.state.fn != TrainerFn.FITTING or self.trainer.sanity_checking:
            return None
        scheduler = self.lr_schedulers()
        return scheduler if isinstance(scheduler, ReduceLROnPlateau) else None

    # --- checkpoints ----------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what is needed to rebuild model and tokenizer, and the number of tokens seen."""
        # Lightning's own callback saves after the optimizer step and before `on_train_batch_end`.
        noted = self.position.step == self.trainer.global_step
        checkpoint[HEADER_KEY] = {
            **checkpoint_header(self.model_state, self.tokenizer, self.run_config, self.start),
            "task": self.task_state(),
            "tune": dict(self.tune),
            "tokens_seen": self.position.tokens_seen if noted else self.tokens_seen,
            "data_sha256": self.data_sha256,
            "global_batch": self.global_batch,
            "world_size": self.trainer.world_size,
            "total_steps": self.total_steps,
            "lr_ceiling": self.lr_ceiling,
        }
        if self.make_scheduler is not None:
            name = factory_name(self.make_scheduler)
            checkpoint[HEADER_KEY]["scheduler"] = {"name": name, **self._as_configured}
            if RESUME_KEY in checkpoint and self._scheduler_before_evaluation is not None:
                checkpoint["lr_schedulers"] = [self._scheduler_before_evaluation]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model, tokenizer or scheduler before any weight is touched."""
        header = checkpoint[HEADER_KEY]
        check_same_model(header, self.model_state, self.tokenizer.state())
        self.tokens_seen = int(header["tokens_seen"])
        self._resumed_configuration = header.get("scheduler")
        recorded = (self._resumed_configuration or {}).get("name")
        given = None if self.make_scheduler is None else factory_name(self.make_scheduler)
        if "optimizer_states" in checkpoint and given != recorded:
            raise InputError(
                f"the checkpoint's scheduler is {recorded or 'a schedule of gptpl'}, this run has"
                f" {given or 'a schedule of gptpl'}: only gptpl's own schedules can replace one another"
            )


def planned_steps(trainer: L.Trainer, batches: float) -> int:
    """Optimizer steps of a run with this number of batches an epoch, by the Trainer's own arguments."""
    limits = [] if trainer.max_steps == -1 else [trainer.max_steps]
    if trainer.max_epochs not in (None, -1) and math.isfinite(batches):
        limits.append(trainer.max_epochs * math.ceil(batches / trainer.accumulate_grad_batches))
    return min(limits, default=sys.maxsize)


def _norm(tensor: Tensor) -> float:
    """At least in fp32: the norm of a large tensor can exceed half precision."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return float(whole(torch.linalg.vector_norm(tensor.detach(), dtype=dtype)))


def _constant(step: int) -> float:
    return 1.0
