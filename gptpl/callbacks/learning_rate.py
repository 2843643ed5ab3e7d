"""The learning rate of every update."""

from typing import Any

import lightning as L
from torch.optim import Optimizer


class LearningRate(L.Callback):
    """Logs the rate each update was made with as `lr`; groups that carry a name as `lr/<name>`.

    Lightning's own monitor logs the rate of the update to come, under a name for each parameter group.
    """

    def __init__(self) -> None:
        super().__init__()
        self._rates: dict[str, float] = {}

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Notes the rates before the schedule moves on."""
        self._rates = {
            f"lr/{group['name']}" if "name" in group else "lr": float(group["lr"])
            for group in optimizer.param_groups
        }

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs them with the other numbers of the step."""
        for name, rate in self._rates.items():
            pl_module.log(name, rate)
