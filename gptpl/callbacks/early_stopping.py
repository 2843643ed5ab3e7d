"""Ends a training that no longer gets better."""

import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping as LightningEarlyStopping

from gptpl.callbacks.checkpoints import declared_mode
from gptpl.training.task import Better


class EarlyStopping(LightningEarlyStopping):
    """Lightning's, except that it knows which way a metric is better, and which `patience` counts.

    That is the run's own: Lightning's takes it from the checkpoint, and ignores one given to the resumed run.
    The metric is better as the task, or a callback, declares it, unless `mode` says it.
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
        """Finds out which way is better."""
        if self._mode_given is None and stage == "fit":
            self.mode = declared_mode(self.monitor, trainer, pl_module)
            sign = -1 if self.mode == "min" else 1
            self.min_delta = sign * abs(self.min_delta)
            if not torch.isfinite(self.best_score):
                self.best_score = torch.tensor(-sign * math.inf)
        super().setup(trainer, pl_module, stage)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the best score so far and the evaluations since."""
        super().load_state_dict(state_dict | {"patience": self.patience})
