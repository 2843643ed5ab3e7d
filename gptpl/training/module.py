"""What the LightningModules of all tasks share: steps, schedule, checks, evaluation, checkpoints."""

# B batch, T time

import copy
import math
import sys
from collections.abc import Callable, Mapping, Sequence
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
from gptpl.data.training_data import planned_batches
from gptpl.errors import InputError
from gptpl.model.loss import Head
from gptpl.model.tuning import ALL
from gptpl.tokenizers import Tokenizer
from gptpl.training.optimizers import adamw, factory_name
from gptpl.training.schedules import apply_changes, as_configured, scheduler_of
from gptpl.training.sharding import FullyShardedStrategy, shard, whole
from gptpl.training.task import EVALUATED, Sums, Task

_NEVER = sys.maxsize
"""As an interval of batches between evaluations, and as a number of steps: without end."""
_WEIGHT_UNIT = 1024
"""Of micro-batches' weights, so that their losses stay small; to divide by a power of 2 rounds nothing."""


class NonFiniteError(ArithmeticError):
    """A step whose loss or gradient is infinite or not a number; the weights are still those before it.

    `step` counts from 1; `report` are lines that describe the batch and the model.
    """

    def __init__(self, step: int, report: list[str]) -> None:
        super().__init__(f"the loss or the gradient of step {step} is not finite")
        self.step = step
        self.report = report


class TrainingModule(Task, L.LightningModule):
    """Trains a model, whatever its task, and evaluates it on a part of both splits.

    Logged at every optimizer step: `train/loss` (mean over the micro-batches and ranks of the step, with
    dropout), `train/grad_norm` (before clipping), `train/tokens_seen`, and what `step_metrics` adds. At every
    evaluation, in evaluation mode: what `evaluation_metrics` makes of both splits, `eval/train_loss` and
    `val/loss` among it. Losses are in nats.

    What a batch is, what it costs, and what is measured, a subclass says by the methods of `Task`.

    Model and tokenizer are enough to train with a stock `lightning.Trainer`, whose own arguments then say how
    long and when to evaluate. A resumed run repeats the bits of one that was never stopped only with the
    callback `ExactResume`, the first of all, and checkpoints of `LastCheckpoint`, which the Trainer's plugin
    `DurableCheckpointIO` writes; without `eval_every_n_steps` it does not make up for an evaluation that was
    due at the step it resumes from.

    Args:
        net: the model; it stays a plain torch module.
        lr_factor: the multiple of the peak learning rate for the update after so many finished ones; None:
            the peak throughout.
        make_scheduler: builds a scheduler such as torch's instead, see `scheduler_of`.
        total_steps: optimizer steps the run is planned for; after them it evaluates once more and ends. None:
            the Trainer ends it.
        eval_every_n_steps: optimizer steps between evaluations; Lightning would count batches. None: it does.
        lr_ceiling: the multiple of the peak learning rate that the schedule is cut off at; None: it is not.
        skip_steps: optimizer steps, from 1, that leave the weights as they are.
        global_batch: sequences of all ranks in one batch.
        start: what the model's weights began as; see `gptpl.checkpoints.format.lineage_of`.
        tune: which weights are trained; see `gptpl.model.tuning`.
        model_config: what a `net` that is no `GPTModel` was built from, as plain data: `_target_`, its class,
            and its keywords. None: the name of the class alone.
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
        start: Mapping[str, Any] = RANDOM,
        tune: Mapping[str, Any] = ALL,
        model_config: Mapping[str, Any] | None = None,
        head: Head = "plain",
    ) -> None:
        super().__init__()
        self.net = net
        self.tokenizer = tokenizer
        self.make_optimizer = make_optimizer
        self.lr_factor = lr_factor or _peak_throughout
        self.make_scheduler = make_scheduler
        self._total_steps = total_steps
        self.run_config: dict[str, Any] = dict(run_config or {})
        self.eval_every_n_steps = eval_every_n_steps
        self.lr_ceiling = lr_ceiling
        self.skip_steps = frozenset(skip_steps)
        self.data_sha256 = data_sha256
        self.global_batch = global_batch
        self.start = start
        self.tune = tune
        self.head = head
        self.model_state = describe(net, model_config)
        self.position = Position(step=0, epoch=0, batch=0, tokens_seen=0)
        self.updating = False
        self.tokens_seen = 0
        self.tokens_per_second: float | None = None
        self.mfu: float | None = None
        self._as_configured: dict[str, Any] = {}
        self._resumed_configuration: dict[str, Any] | None = None
        self._scheduler_before_evaluation: dict[str, Any] | None = None
        self._micro_batches: list[Tensor] = []
        self._micro_losses: list[Tensor] = []
        self._micro_weights: list[Tensor] = []
        self._step_weight: Tensor | None = None
        self._grad_norm: Tensor | None = None
        self._sums: dict[str, Sums] = {}

    def configure_model(self) -> None:
        """Spreads the model over the processes, where the strategy is to."""
        if isinstance(self.trainer.strategy, FullyShardedStrategy):
            shard(self.net, self.trainer.strategy.mesh)

    @property
    def total_steps(self) -> int:
        """Optimizer steps that the run, or else its Trainer, is planned for."""
        if self._total_steps is not None:
            return self._total_steps
        return _steps(self.trainer, self.trainer.num_training_batches)

    @total_steps.setter
    def total_steps(self, steps: int | None) -> None:
        self._total_steps = steps

    def capped_lr_factor(self, step: int) -> float:
        """The multiple of the peak learning rate for the update after so many finished ones."""
        factor = self.lr_factor(step)
        return factor if self.lr_ceiling is None else min(factor, self.lr_ceiling)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimizer, with a schedule that is asked at every optimizer step."""
        optimizer = self.make_optimizer(self.net)
        if self.make_scheduler is None:
            scheduler: LRScheduler = LambdaLR(optimizer, self.capped_lr_factor)
        else:
            scheduler = scheduler_of(self.make_scheduler, optimizer, total_steps=self._total_steps)
        self._as_configured = as_configured(optimizer, scheduler)
        config = {"scheduler": scheduler, "interval": "step", "name": "lr", "reduce_on_plateau": False}
        return {"optimizer": optimizer, "lr_scheduler": config}  # type: ignore[typeddict-item]

    # --- training -------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Applies the configured settings to an optimizer that was restored with those it was saved with."""
        optimizer = cast(Optimizer, self.optimizers(use_pl_optimizer=False))
        scheduler = cast(LRScheduler, self.lr_schedulers())
        if self.make_scheduler is None:
            groups = self._as_configured["groups"]
            for group, settings in zip(optimizer.param_groups, groups, strict=True):
                rate = settings["initial_lr"] * self.capped_lr_factor(self.trainer.global_step)
                group.update(settings | {"lr": rate})
            scheduler.base_lrs = [settings["initial_lr"] for settings in groups]
        elif self._resumed_configuration is not None:
            if isinstance(scheduler, ReduceLROnPlateau):
                # Saved in the middle of the step after, the optimizer had the rate after the evaluation.
                for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
                    group["lr"] = rate
            before, now = self._resumed_configuration, self._as_configured
            apply_changes(optimizer, scheduler, before=before, now=now)
        self._schedule_evaluation()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Keeps Lightning's count of steps right, by which `trainer.log_every_n_steps` goes."""
        # It counts an evaluation that a resumed run makes up for as one more.
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.trainer.global_step

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Mean loss of one micro-batch, times what it counts in a step of several."""
        loss = self.batch_loss(batch)
        alone = self.trainer.world_size == self.trainer.accumulate_grad_batches == 1
        weight = None if alone else self.loss_weight(batch)
        self._micro_batches.append(self.inputs_of(batch))
        self._micro_losses.append(loss.detach())
        tokens, world_size = self.tokens_in(batch), self.trainer.world_size
        if world_size == 1 or not self.padded:
            self.tokens_seen += tokens * world_size  # without waiting for a device
        else:
            here = torch.tensor(tokens, device=self.device)
            self.tokens_seen += int(self.trainer.strategy.reduce(here, reduce_op="sum"))
        if weight is None:
            return loss
        self._micro_weights.append(weight)
        return loss * (weight / _WEIGHT_UNIT)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Makes the gradient the mean over the step: by `loss_weight`, or over its micro-batches.

        An epoch's last accumulation may have fewer of them.
        """
        # Lightning divides by accumulate_grad_batches, the strategy by the number of ranks.
        scale = self.trainer.accumulate_grad_batches / len(self._micro_losses)
        if self._micro_weights:
            here = torch.stack(self._micro_weights).sum()
            self._step_weight = cast(Tensor, self.trainer.strategy.reduce(here, reduce_op="sum"))
            means = self.trainer.accumulate_grad_batches * self.trainer.world_size
            scale = means * _WEIGHT_UNIT / self._step_weight.item()
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
        """Measures the gradient's norm, checks it, and clips it where `trainer.gradient_clip_val` is set.

        Done here because Lightning refuses to clip for fused optimizers under mixed precision, although bf16
        has no loss scale to undo, and fp16's can be undone first. Raises NonFiniteError before the weights
        are touched.
        """
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler.unscale_(optimizer)  # with fp16 a fused optimizer would do it in its step, after this norm
        parameters = [p for p in self.net.parameters() if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        self._grad_norm = norm
        if self.trainer.global_step + 1 in self.skip_steps:
            for parameter in parameters:
                parameter.grad = None  # which every optimizer passes over
            return
        if scaler is None:  # fp16's scaler leaves out such steps by itself, and goes on with a smaller scale
            self._check_finite(norm)
        if gradient_clip_val and gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        elif gradient_clip_val:
            torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)
        self.updating = True

    def _check_finite(self, grad_norm: Tensor) -> None:
        """A loss that is not finite has such a gradient, too; and the gradient is the same on every rank."""
        if torch.isfinite(grad_norm):
            return
        at = self.position
        report = [
            f"step {at.step + 1}: epoch {at.epoch}, after its batch {at.batch};"
            f" gradient norm {grad_norm.item():g}",
            "",
            "parameter: norm of its values, norm of its gradient",
        ]
        for name, parameter in self.net.named_parameters():
            gradient = "none" if parameter.grad is None else f"{_norm(parameter.grad):.4g}"
            report.append(f"  {name}: {_norm(parameter):.4g}, {gradient}")
        micro_batches = zip(self._micro_batches, self._micro_losses, strict=True)
        for number, (inputs, loss) in enumerate(micro_batches, start=at.batch + 1):
            report += ["", f"batch {number} of the epoch: loss {loss.item():g}"]
            report += [f"  {self.tokenizer.decode(row)!r}" for row in inputs.tolist()]
        raise NonFiniteError(self.trainer.global_step + 1, report)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """One optimizer step of a scheduler; ReduceLROnPlateau makes its own after an evaluation."""
        if isinstance(scheduler, ReduceLROnPlateau):
            return
        try:
            scheduler.step()
        except ValueError as error:  # OneCycleLR beyond its last step
            raise InputError(f"scheduler: {type(scheduler).__name__} has come to its end: {error}") from error

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Logs the optimizer step that this batch completed, if any; ends the run after the last."""
        if self.eval_every_n_steps is not None:
            self.trainer.val_check_batch = _NEVER
        if self._grad_norm is None:  # a micro-batch before the step's last
            return
        self.updating = False
        self._scheduler_before_evaluation = None
        step = self.trainer.global_step
        self.position = Position(
            step=step, epoch=self.trainer.current_epoch, batch=batch_idx + 1, tokens_seen=self.tokens_seen
        )
        self._log_step(step, self._grad_norm)
        self._micro_batches.clear()
        self._micro_losses.clear()
        self._micro_weights.clear()
        self._step_weight = self._grad_norm = None
        # Lightning would keep the gradients through the next forward pass, where memory is short.
        self.zero_grad()
        self._schedule_evaluation()
        if self._is_over(step):
            # Asked to stop, Lightning evaluates once more, also off the interval.
            self.trainer.should_stop = True

    def _log_step(self, step: int, grad_norm: Tensor) -> None:
        losses = torch.stack(self._micro_losses)
        if self._step_weight is None:
            loss = self.trainer.strategy.reduce(losses.mean(), reduce_op="mean")
        else:
            total = (losses * torch.stack(self._micro_weights)).sum()
            loss = self.trainer.strategy.reduce(total, reduce_op="sum") / self._step_weight
        if step in self.skip_steps:  # Lightning would log the numbers of the step before, if there were none
            loss, grad_norm = torch.full_like(loss, math.nan), torch.full_like(grad_norm, math.nan)
        self.log("step", float(step))  # Lightning would count from 0
        self.log("train/loss", loss)
        for name, value in self.step_metrics(loss).items():
            self.log(name, value)
        self.log("train/tokens_seen", float(self.tokens_seen))
        self.log("train/grad_norm", grad_norm)
        if self.tokens_per_second is not None:
            self.log("train/tokens_per_second", self.tokens_per_second)
        if self.mfu is not None:
            self.log("train/mfu", self.mfu)

    def evaluates_after(self, step: int) -> bool:
        """Whether an evaluation follows this optimizer step."""
        due = self.eval_every_n_steps is not None and step % self.eval_every_n_steps == 0
        return step > 0 and (due or self._is_over(step))

    def _is_over(self, step: int) -> bool:
        """Whether the run ends after this step; False where the Trainer decides."""
        return self._total_steps is not None and step >= self._total_steps

    def _schedule_evaluation(self) -> None:
        """Makes Lightning evaluate now, or not after this batch.

        It would count batches, which in epochs that end with a short accumulation are not steps.
        """
        if self.eval_every_n_steps is not None:
            due = self.evaluates_after(self.trainer.global_step)
            self.trainer.val_check_batch = 1 if due else _NEVER

    # --- evaluation -----------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Starts new sums."""
        self._sums = {}
        if (scheduler := self._plateau_scheduler()) is not None:
            self._scheduler_before_evaluation = copy.deepcopy(scheduler.state_dict())

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds one batch to the sums of its split."""
        loaders = len(self.trainer.num_val_batches)
        split = EVALUATED[dataloader_idx - loaders]  # one loader alone is of validation examples
        before = self._sums.get(split)
        found = self.evaluation_sums(batch)
        self._sums[split] = found if before is None else {name: before[name] + found[name] for name in found}

    def on_validation_epoch_end(self) -> None:
        """Logs what all batches of all ranks come to; before the first step too."""
        reduce = self.trainer.strategy.reduce
        sums = {
            split: {name: reduce(total, reduce_op="sum") for name, total in of_split.items()}
            for split, of_split in self._sums.items()
        }
        metrics = self.evaluation_metrics(sums)
        self.log_dict(metrics, sync_dist=True)  # equal on every rank already; Lightning warns without it
        if (scheduler := self._plateau_scheduler()) is not None and "val/loss" in metrics:
            scheduler.step(metrics["val/loss"])
        if not self.trainer.sanity_checking:
            self.log("step", float(self.trainer.global_step), sync_dist=True)
        elif math.isinf(self.trainer.num_sanity_val_steps):  # a whole evaluation
            for logger in self.loggers:
                logger.log_metrics(metrics, step=0)

    def _plateau_scheduler(self) -> ReduceLROnPlateau | None:
        """The scheduler that this evaluation is a step of, if any."""
        if self.trainer.state.fn != TrainerFn.FITTING or self.trainer.sanity_checking:
            return None
        scheduler = self.lr_schedulers()
        return scheduler if isinstance(scheduler, ReduceLROnPlateau) else None

    def on_validation_end(self) -> None:
        """Ends a run that was resumed after its last step, to make up for the evaluation of it."""
        if not self.trainer.sanity_checking and self._is_over(self.trainer.global_step):
            self.trainer.should_stop = True

    # --- checkpoints ----------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what is needed to rebuild model and tokenizer, and the count of tokens seen."""
        checkpoint[HEADER_KEY] = {
            **checkpoint_header(self.model_state, self.tokenizer, self.run_config, self.start),
            "task": self.task_state(),
            "tune": dict(self.tune),
            "tokens_seen": self.position.tokens_seen,
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
        """Refuses a checkpoint of another model, tokenizer or scheduler before any weight is touched."""
        header = checkpoint[HEADER_KEY]
        check_same_model(header, self.model_state, self.tokenizer.state())
        self.tokens_seen = int(header["tokens_seen"])
        self._resumed_configuration = header.get("scheduler")
        theirs = (self._resumed_configuration or {}).get("name")
        ours = None if self.make_scheduler is None else factory_name(self.make_scheduler)
        if "optimizer_states" in checkpoint and ours != theirs:
            raise InputError(
                f"the checkpoint's scheduler is {theirs or 'a schedule of gptpl'}, this run wants"
                f" {ours or 'a schedule of gptpl'}: only gptpl's own schedules can replace one another"
            )


def planned_steps(trainer: L.Trainer, batches: int) -> int:
    """Optimizer steps of a run whose data have so many batches an epoch, by the Trainer's own arguments."""
    return _steps(trainer, planned_batches(trainer, batches))


def _steps(trainer: L.Trainer, planned: float) -> int:
    limits = [] if trainer.max_steps == -1 else [trainer.max_steps]
    if trainer.max_epochs not in (None, -1) and math.isfinite(planned):
        limits.append(trainer.max_epochs * math.ceil(planned / trainer.accumulate_grad_batches))
    return min(limits, default=_NEVER)


def _norm(tensor: Tensor) -> float:
    """In fp32, or the norm of a large half-precision tensor would be infinite by itself."""
    return float(whole(torch.linalg.vector_norm(tensor.detach(), dtype=torch.float32)))


def _peak_throughout(step: int) -> float:
    return 1.0
