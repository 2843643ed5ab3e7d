"""A callback with a setting, a state of its own, and a metric that may be monitored."""

from typing import Any, ClassVar

import lightning as L
import torch


class WeightNorm(L.Callback):
    """Logs the norm of all weights every so many optimizer steps, and its largest so far at evaluations.

    Args:
        every_n_steps: optimizer steps between values.
    """

    metrics: ClassVar = {"lab/largest_norm": "min"}

    def __init__(self, *, every_n_steps: int = 1) -> None:
        self.every_n_steps = every_n_steps
        self.largest = 0.0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            norm = torch.nn.utils.get_total_norm(list(pl_module.parameters())).item()
            self.largest = max(self.largest, norm)
            pl_module.log("lab/weight_norm", norm)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.log("lab/largest_norm", self.largest)

    def state_dict(self) -> dict[str, Any]:
        return {"largest": self.largest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.largest = state_dict["largest"]
