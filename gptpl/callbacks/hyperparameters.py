"""TensorBoard's HPARAMS tab: the run's configuration beside the loss it reached."""

from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger

from gptpl.callbacks.readings import language_module, metric
from gptpl.records.settings import flat_settings

METRICS = {"hp/val_loss": "val/loss", "hp/val_perplexity": "val/perplexity"}
"""Names in the HPARAMS tab, and the metrics whose lowest value they show."""


class Hyperparameters(L.Callback):
    """Logs the configuration once, and the lowest validation loss and perplexity at every evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self._lowest: dict[str, float] = {}
        self._logged = False

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Updates the lowest values and shows them."""
        if trainer.state.fn != "fit":
            return
        for name, source in METRICS.items():
            value = metric(trainer, source)
            if value is not None:
                # A loss that is not a number must not pass for the lowest.
                self._lowest[name] = float(np.fmin(value, self._lowest.get(name, value)))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                if not self._logged:
                    settings = flat_settings(language_module(pl_module).run_config)
                    logger.log_hyperparams(settings, dict(self._lowest), step=trainer.global_step)
                else:
                    logger.log_metrics(self._lowest, step=trainer.global_step)
        self._logged = True

    def state_dict(self) -> dict[str, Any]:
        """The lowest values so far."""
        return {"lowest": self._lowest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from the lowest values of the run that is resumed."""
        self._lowest = dict(state_dict["lowest"])
