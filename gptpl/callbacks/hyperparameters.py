"""The run's settings next to the best values it reached, for TensorBoard's HPARAMS tab."""

from typing import Any

import lightning as L
import numpy as np

from gptpl.callbacks.after_step import language_module, metric
from gptpl.files.run_record import LOSS
from gptpl.files.run_settings import flat_settings
from gptpl.training.loggers import log_hyperparameters
from gptpl.training.task import known_metrics


class Hyperparameters(L.Callback):
    """Sends the settings to the loggers once, and at every evaluation the best values so far.

    These are `best_val/loss`, and `best_<metric>` of each metric that the module declares better high
    (`metrics: Mapping[str, "min" | "max"]`).
    """

    def __init__(self) -> None:
        super().__init__()
        self._best: dict[str, float] = {}
        self._logged = False

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Update and log the best values."""
        if trainer.state.fn != "fit":
            return
        highest = [name for name, mode in known_metrics(pl_module).items() if mode == "max"]
        better = {LOSS: np.fmin} | dict.fromkeys(highest, np.fmax)
        for name, better_of in better.items():  # fmin and fmax: nan is never the best
            if (value := metric(trainer, name)) is not None:
                best = f"best_{name}"
                self._best[best] = float(better_of(value, self._best.get(best, value)))
        settings = {} if self._logged else flat_settings(language_module(pl_module).run_config)
        log_hyperparameters(trainer.loggers, settings, self._best, trainer.global_step)
        self._logged = True

    def state_dict(self) -> dict[str, Any]:
        """The best values so far."""
        return {"best": dict(self._best)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the best values of the run that is resumed."""
        lowest = state_dict.get("lowest", {})  # of gptpl 0.1.0
        self._best = {f"best_{LOSS}": lowest["hp/val_loss"]} if "hp/val_loss" in lowest else {}
        self._best |= state_dict.get("best", {})
