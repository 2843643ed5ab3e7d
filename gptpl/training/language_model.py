"""The LightningModule of pretraining: next-token prediction on plain text."""

# B batch, T time

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer

from gptpl.data.tokenizers import Tokenizer
from gptpl.model import GPTModel
from gptpl.training.checkpoint import HEADER_KEY, check_same_model, checkpoint_header
from gptpl.training.loss import next_token_loss, perplexity, summed_next_token_loss

Batch = tuple[Tensor, Tensor]
EVALUATED = ("eval/train_loss", "val/loss")
"""What the two evaluation loaders measure, in the order in which the datamodule gives them."""


class LanguageModelingModule(L.LightningModule):
    """Trains a `GPTModel` on windows of tokens and evaluates it on training and validation windows.

    Logged at every optimizer step: `train/loss` (mean over the micro-batches and ranks of the step, with
    dropout), `train/perplexity`, `train/grad_norm` (before clipping), `train/tokens_seen`. At every
    evaluation, in evaluation mode: `eval/train_loss`, `val/loss`, `val/perplexity`. Losses are in nats per
    token.

    Args:
        net: the model; it stays a plain torch module.
        tokenizer: what turned text into the tokens; its state goes into every checkpoint.
        make_optimizer: builds the optimizer of the model's parameters.
        lr_factor: the multiple of the peak learning rate for the update after so many finished ones.
        total_steps: optimizer steps the run is planned for.
        run_config: the resolved configuration as plain data, kept in every checkpoint.
    """

    def __init__(
        self,
        net: GPTModel,
        *,
        tokenizer: Tokenizer,
        make_optimizer: Callable[[nn.Module], Optimizer],
        lr_factor: Callable[[int], float],
        total_steps: int,
        run_config: dict[str, Any],
    ) -> None:
        super().__init__()
        self.net = net
        self.tokenizer = tokenizer
        self.make_optimizer = make_optimizer
        self.lr_factor = lr_factor
        self.total_steps = total_steps
        self.run_config = run_config
        self.tokens_seen = 0
        self.tokens_per_second: float | None = None
        self._micro_losses: list[Tensor] = []
        self._grad_norm: Tensor | None = None
        self._sums: dict[str, Tensor] = {}

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, V) of tokens (B, T)."""
        return self.net(tokens)

    # --- training -------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss of one micro-batch of (inputs, targets), each (B, T)."""
        inputs, targets = batch
        loss = next_token_loss(self(inputs), targets)
        self._micro_losses.append(loss.detach())
        self.tokens_seen += inputs.numel() * self.trainer.world_size
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Makes the gradient of an epoch's last, short accumulation the mean over its micro-batches too.

        Lightning divides by `trainer.accumulate_grad_batches`, however few micro-batches are left.
        """
        scale = self.trainer.accumulate_grad_batches / len(self._micro_losses)
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
        """Measures the gradient's norm and, where `trainer.gradient_clip_val` is set, clips to it.

        Done here because Lightning refuses to clip for fused optimizers under mixed precision, although bf16
        has no loss scale to undo, and fp16's can be undone first.
        """
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler.unscale_(optimizer)  # with fp16 a fused optimizer would do it in its step, after this norm
        limit = gradient_clip_val or float("inf")
        # FSDP: only the wrapper knows the norm across the shards.
        clip_sharded = getattr(self.trainer.strategy.model, "clip_grad_norm_", None)
        if clip_sharded is not None:
            self._grad_norm = clip_sharded(limit)
        elif gradient_clip_val:
            self._grad_norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), limit)
        else:
            gradients = [p.grad for p in self.net.parameters() if p.grad is not None]
            self._grad_norm = torch.nn.utils.get_total_norm(gradients)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Logs the optimizer step that this batch completed, if any; ends the run after the last."""
        if self._grad_norm is None:  # a micro-batch before the step's last
            return
        loss = torch.stack(self._micro_losses).mean()
        self._micro_losses.clear()
        loss = self.trainer.strategy.reduce(loss, reduce_op="mean")
        self.log("step", float(self.trainer.global_step))  # Lightning would count from 0
        self.log("train/loss", loss)
        self.log("train/perplexity", loss.exp())
        self.log("train/tokens_seen", float(self.tokens_seen))
        self.log("train/grad_norm", self._grad_norm)
        self._grad_norm = None
        if self.tokens_per_second is not None:
            self.log("train/tokens_per_second", self.tokens_per_second)
        if self.trainer.global_step >= self.total_steps:
            # Asked to stop, Lightning evaluates once more, also off the interval.
            self.trainer.should_stop = True

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimizer, with a schedule that is asked at every optimizer step."""
        optimizer = self.make_optimizer(self.net)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"},
        }

    # --- evaluation -----------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Starts new sums."""
        self._sums = {}

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds one batch to the sums of its loader; targets of -100 are left out."""
        inputs, targets = batch
        name = EVALUATED[dataloader_idx]
        total, count = summed_next_token_loss(self(inputs), targets)
        pair = torch.stack([total, count])
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def on_validation_epoch_end(self) -> None:
        """Logs the means over all tokens of all ranks; before the first step too."""
        metrics: dict[str, float] = {}
        for name, pair in self._sums.items():
            total, count = self.trainer.strategy.reduce(pair, reduce_op="sum").tolist()
            metrics[name] = total / count
        if "val/loss" in metrics:
            metrics["val/perplexity"] = perplexity(metrics["val/loss"])
        self.log_dict(metrics, sync_dist=True)  # equal on every rank already; Lightning warns without it
        if self.trainer.sanity_checking:
            for logger in self.loggers:
                logger.log_metrics(metrics, step=0)
        else:
            self.log("step", float(self.trainer.global_step), sync_dist=True)

    # --- checkpoints ----------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what is needed to rebuild model and tokenizer, and the count of tokens seen."""
        checkpoint[HEADER_KEY] = {
            **checkpoint_header(self.net.config, self.tokenizer, self.run_config),
            "tokens_seen": self.tokens_seen,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another model or tokenizer before any weight is touched."""
        check_same_model(checkpoint[HEADER_KEY], self.net.config, self.tokenizer)
        self.tokens_seen = int(checkpoint[HEADER_KEY]["tokens_seen"])
