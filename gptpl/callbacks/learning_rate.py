"""The learning rate of every update."""

from typing import Any

import lightning as L
from torch.optim import Optimizer


class LearningRate(L.Callback):
    """Logs the learning rate of each update as `lr`, and of parameter groups with a name as `lr/<name>`.

    Lightning's own monitor logs that of the next update.
    """

    def __init__(self) -> None:
        super().__init__()
        self._rates: dict[str, float] = {}

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Note the learning rates before the schedule advances."""
        self._rates = {
            f"lr/{group['name']}" if "name" in group else "lr": float(group["lr"])
            for group in optimizer.param_groups
        }

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log them with the step's other metrics."""
        for name, rate in self._rates.items():
            pl_module.log(name, rate)
