"""Stops a training that no longer improves."""

import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping as LightningEarlyStopping

from gptpl.callbacks.checkpoints import declared_mode
from gptpl.training.task import Better


class EarlyStopping(LightningEarlyStopping):
    """Lightning's, but for `mode` None: see `gptpl.callbacks.checkpoints.declared_mode`.

    And a resumed run has its own `patience`, where Lightning's would have that of the checkpoint.
    """

    def __init__(
        self,
        *,
        monitor: str = "val/loss",
        patience: int = 5,
        min_delta: float = 0.0,
        mode: Better | None = None,
        verbose: bool = True,
        check_finite: bool = True,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
    ) -> None:
        super().__init__(
            monitor=monitor,
            patience=patience,
            min_delta=min_delta,
            mode=mode or "min",
            verbose=verbose,
            check_finite=check_finite,
            stopping_threshold=stopping_threshold,
            divergence_threshold=divergence_threshold,
        )
        self._mode_given = mode

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find out whether low or high is better."""
        if self._mode_given is None and stage == "fit":
            self.mode = declared_mode(self.monitor, trainer, pl_module)
            sign = -1 if self.mode == "min" else 1
            self.min_delta = sign * abs(self.min_delta)
            if not torch.isfinite(self.best_score):
                self.best_score = torch.tensor(-sign * math.inf)
        super().setup(trainer, pl_module, stage)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the best score so far, and the number of evaluations since."""
        super().load_state_dict(state_dict | {"patience": self.patience})
